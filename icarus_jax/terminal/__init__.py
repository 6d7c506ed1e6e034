"""A chat in the terminal: one prompt, answered by several models of a server side by side.

Owns: the conversation, and how answers, handoffs and token counts are shown.
Takes: lines that a user types, and a server's streamed chat completions. Gives: text on the terminal.
Parts: Chat (chat), Server (client), Answers (answers).
"""
