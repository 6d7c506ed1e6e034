"""The OpenAI-compatible HTTP API over an engine: requests in, text out.

Owns: the request bodies and their checks, streams and detokenization, metrics, heads that come and go.
Takes: HTTP. Gives: JSON and server-sent events.
Parts: create_app and run (app), HeadLoader (head_loader), HeadWatcher (head_watch), Vocabulary and Detokenizer
(detokenizer).
"""
