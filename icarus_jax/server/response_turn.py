"""One response on its way: the chat completion that does the work, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.response_events import Event, ResponseWriter
from icarus_jax.server.response_fields import ResponseRequest
from icarus_jax.server.response_transcript import Transcript
from icarus_jax.server.responses import ChatView, usage
from icarus_jax.server.streams import Choice, Delta


class Turn:
    """One response while it is made.

    Attributes:
        request: the request that is answered.
        writer: makes the events and the response.
    """

    def __init__(
        self,
        request: ResponseRequest,
        view: ChatView,
        writer: ResponseWriter,
        vocabulary: Vocabulary,
        before: Transcript,
        keep: Callable[[dict[str, Any], Transcript], None],
    ):
        """Starts before the first token.

        Args:
            request: the request that is answered.
            view: writes the chat completion.
            writer: makes the events and the response of it.
            vocabulary: knows the special tokens.
            before: the transcript that the prompt begins with.
            keep: is given the response and its transcript when it has ended, before the client learns of it.
        """
        self.request = request
        self.writer = writer
        self._view, self._vocabulary, self._before, self._keep = view, vocabulary, before, keep
        self._text: list[str] = []
        self._ids: list[int] = []
        self._thought: int | None = None  # how many tokens came before the answer's own text or calls
        self._error: dict[str, Any] | None = None  # of an answer that could not go on

    def take(self, choice: Choice, delta: Delta) -> list[Event]:
        """Takes in what the choice gained, and returns the events that say so."""
        num_before = len(self._ids)
        self._text.append(delta.text)
        self._ids += delta.token_ids
        chunk = None if delta.is_empty else self._view.chunk(choice, delta)
        if chunk is None:
            return []
        shown = chunk["choices"][0]
        said, self._error = shown["delta"], shown.get("error")
        if self._thought is None and (said.get("content") or said.get("tool_calls")):
            self._thought = num_before
        return self.writer.feed(said, (shown["logprobs"] or {}).get("content", []))

    def finish(self, choice: Choice) -> list[Event]:
        """Ends the response and has it kept. Returns the last events."""
        reason = choice.finish_reason
        events = self.writer.end_output(reason == "stop")
        fields: dict[str, Any] = {"usage": self._usage(choice)}
        if self.request.handoff:
            fields["handoffs"] = [{"token": at, "model": name} for at, name in choice.handoffs]
        if self._error is not None:
            fields["error"] = {"code": "invalid_prompt", "message": self._error["message"]}
        events += self.writer.finish({"stop": "completed", "length": "incomplete"}.get(reason or "", "failed"), fields)
        self._keep(self.writer.response, self._transcript(choice))
        return events

    def _transcript(self, choice: Choice) -> Transcript:
        """Returns what the next turn's prompt may begin with, token for token.

        If a special token within the answer was hidden, that is no more than this turn's prompt had: the model would
        read a token that nobody has seen, such as the end of a turn. The next turn has what the items say.
        """
        special, ids = self._vocabulary.special_ids, self._ids
        if choice.finish_reason != "length" and ids[-1:] and ids[-1] in special:
            ids = ids[:-1]
        if self._view.request.skip_special_tokens and not special.isdisjoint(ids):
            return self._before
        return self._before.with_answer(choice.prompt, "".join(self._text), ids)

    def _usage(self, choice: Choice) -> dict[str, Any]:
        """Returns the token counts as the Responses API has them, and those of each model as ours."""
        counts = usage([choice], bool(self.request.handoff))
        cached = counts["prompt_tokens_details"]["cached_tokens"]
        thought = len(self._ids) if self._thought is None else self._thought
        reasoned = any(item["type"] == "reasoning" for item in self.writer.response["output"])
        shown = {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": counts["prompt_tokens"] - cached,
            },
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": thought if reasoned else 0},
            "total_tokens": counts["total_tokens"],
        }
        by_model = {name: {"output_tokens": num} for name, num in choice.tokens_by_model.items()}
        return shown | ({"by_model": by_model} if self.request.handoff else {})
