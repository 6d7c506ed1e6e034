"""The OpenAI-compatible HTTP API over an engine: requests in, text out.

Owns: the request bodies and their checks, streams and detokenization, metrics, and loading heads while serving.
Takes: HTTP requests. Gives: JSON and server-sent events.
Parts: create_app and run (app), answer (offline: the same without HTTP), HeadLoader (head_loader), HeadResolver
(head_resolver), HeadWatcher (head_watch), Vocabulary and Detokenizer (detokenizer).
"""
