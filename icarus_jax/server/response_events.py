"""Writes a response: what a chat completion brings piece by piece goes in, and the events of /v1/responses come out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from icarus_jax.server.response_items import new_id

Event = dict[str, Any]


class ResponseWriter:
    """Makes the events of one response, and the response itself. A response that is not streamed is made by the same.

    Attributes:
        response: the response as it is now. Its output holds the items that are done.
    """

    def __init__(self, response: dict[str, Any]):
        """Starts before the first event.

        Args:
            response: the response's fields that are known beforehand.
        """
        self.response = response | {"status": "in_progress", "output": [], "error": None, "incomplete_details": None}
        self._count = 0  # of events
        self._item: dict[str, Any] | None = None  # the one that is being written
        self._pieces: list[str] = []  # of its text
        self._scored: list[Any] = []  # the log-probabilities of its text
        self._waiting: list[Any] = []  # log-probabilities whose text has not come yet

    def begin(self) -> list[Event]:
        """Returns the first events."""
        return [self._event(f"response.{name}", response=dict(self.response)) for name in ("created", "in_progress")]

    def feed(self, delta: Mapping[str, Any], logprobs: list[Any]) -> list[Event]:
        """Takes the next piece in.

        Args:
            delta: what it brings, as the delta of a chat completion's chunk.
            logprobs: the log-probabilities of its tokens, if they are wanted.

        Returns:
            The events that say so.
        """
        events: list[Event] = []
        self._waiting += logprobs
        if text := delta.get("reasoning_content"):
            events += self._text("reasoning", text)
        if text := delta.get("content"):
            events += self._text("message", text)
        for call in delta.get("tool_calls") or []:
            events += self._call(call)
        return events

    def end_output(self, complete: bool) -> list[Event]:
        """Ends the output, and returns the events that say so. `complete`: whether the model ended it."""
        events = [] if self._item or self.response["output"] else self._open("message")  # nothing was said
        return events + self._close("completed" if complete else "incomplete")

    def finish(self, status: str, fields: dict[str, Any]) -> list[Event]:
        """Ends the response, and returns its last event.

        Args:
            status: 'completed', 'incomplete' if it has as many tokens as were allowed, or 'failed'.
            fields: the response's fields that are known now.
        """
        self.response |= fields | {"status": status}
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [self._event(f"response.{status}", response=self.response)]

    def fail(self, message: str) -> list[Event]:
        """Ends the response with an error, wherever it stands, and returns the last events."""
        events = self._close("incomplete")
        return events + self.finish("failed", {"error": {"code": "server_error", "message": message}})

    def _text(self, kind: str, text: str) -> list[Event]:
        """Adds to the text of a message or of the reasoning. It goes on in the open item, if that is of its kind."""
        events = [] if self._item and self._item["type"] == kind else self._open(kind)
        scored, self._waiting = self._waiting, []
        self._pieces.append(text)
        if kind == "reasoning":
            return [*events, self._of_item("response.reasoning_text.delta", content_index=0, delta=text)]
        self._scored += scored
        shown = {"content_index": 0, "delta": text, "logprobs": scored}
        return [*events, self._of_item("response.output_text.delta", **shown)]

    def _call(self, call: Mapping[str, Any]) -> list[Event]:
        """Adds to a function call. Its first piece has its id and its name."""
        events = self._open("function_call", call["id"], call["function"]["name"]) if "id" in call else []
        self._waiting = []
        if arguments := call["function"]["arguments"]:
            self._pieces.append(arguments)
            events.append(self._of_item("response.function_call_arguments.delta", delta=arguments))
        return events

    def _open(self, kind: str, call_id: str = "", name: str = "") -> list[Event]:
        """Begins an item; the one before is done."""
        events = self._close("completed")
        own: dict[str, dict[str, Any]] = {
            "message": {"id": new_id("msg"), "role": "assistant", "content": []},
            "reasoning": {"id": new_id("rs"), "summary": [], "content": []},
            "function_call": {"id": new_id("fc"), "call_id": call_id, "name": name, "arguments": ""},
        }
        self._item, self._pieces, self._scored = {"type": kind, "status": "in_progress"} | own[kind], [], []
        events.append(self._event("response.output_item.added", output_index=self._index, item=self._item))
        if kind != "function_call":
            events.append(self._of_item("response.content_part.added", content_index=0, part=self._part()))
        return events

    def _close(self, status: str) -> list[Event]:
        """Ends the open item, if there is one."""
        if self._item is None:
            return []
        kind, part, text = self._item["type"], self._part(), "".join(self._pieces)
        if kind == "function_call":
            done = {"arguments": text, "name": self._item["name"]}
            events = [self._of_item("response.function_call_arguments.done", **done)]
            own: dict[str, Any] = {"arguments": text}
        else:
            name = "reasoning_text" if kind == "reasoning" else "output_text"
            scored = {} if kind == "reasoning" else {"logprobs": self._scored}
            events = [
                self._of_item(f"response.{name}.done", content_index=0, text=text, **scored),
                self._of_item("response.content_part.done", content_index=0, part=part),
            ]
            own = {"content": [part]}
        item = self._item | {"status": status} | own
        events.append(self._event("response.output_item.done", output_index=self._index, item=item))
        self.response["output"].append(item)
        self._item = None
        return events

    def _part(self) -> dict[str, Any]:
        """Returns the content of the open item so far."""
        assert self._item is not None
        text = "".join(self._pieces)
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._scored)}

    @property
    def _index(self) -> int:
        """The number of the open item in the output."""
        return len(self.response["output"])

    def _of_item(self, kind: str, **fields: Any) -> Event:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=self._index, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._count += 1
        return {"type": kind, "sequence_number": self._count - 1, **fields}
