"""When what happened to each choice of a request."""

from __future__ import annotations

import dataclasses

from icarus_jax.scheduling.request import TokenOutput
from icarus_jax.server.streams import Choice, Delta


@dataclasses.dataclass
class Timeline:
    """When what happened to a choice, in seconds (monotonic). None: it has not happened.

    Attributes:
        choice: the choice.
        arrival: when the request came.
        submitted: when the engine was given it.
        admitted: when the engine began with its prompt. Known from the first output on.
        prefilled: when the engine gave the first output.
        first_token: when it gave the first token.
        last_token: when it gave the last one so far.
        handoffs: when each of the choice's handoffs happened.
        ended: when the choice ended.
        finish_reason: why: that of its last delta, or 'abort' or 'timeout' if nobody wanted the rest.
    """

    choice: Choice
    arrival: float
    submitted: float
    admitted: float | None = None
    prefilled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    handoffs: list[float] = dataclasses.field(default_factory=list)
    ended: float | None = None
    finish_reason: str | None = None

    @property
    def queue_seconds(self) -> float | None:
        """How long it waited in the engine's queue."""
        return between(self.submitted, self.admitted)

    @property
    def prefill_seconds(self) -> float | None:
        """How long its prompt took, up to the first output."""
        return between(self.admitted, self.prefilled)

    @property
    def decode_seconds(self) -> float | None:
        """How long its tokens after the first one took."""
        return between(self.prefilled, self.last_token)

    def take(self, output: TokenOutput, delta: Delta, now: float) -> None:
        """Notes an output of the engine that the choice has been fed.

        Args:
            output: the output.
            delta: what the choice gained by it.
            now: when the engine gave it.
        """
        if self.prefilled is None and output.admitted_at is not None:
            self.admitted, self.prefilled = output.admitted_at, now
        if len(self.handoffs) < len(self.choice.handoffs):  # after the token before this one
            self.handoffs.append(self.last_token or now)
        if delta.token_ids:
            self.first_token, self.last_token = self.first_token or now, now
        if delta.finish_reason:
            self.end(delta.finish_reason, now)

    def end(self, reason: str, now: float) -> None:
        """Notes the choice's end.

        Args:
            reason: why it ended.
            now: when.
        """
        self.finish_reason, self.ended = reason, now


def between(start: float | None, end: float | None) -> float | None:
    """Returns the seconds between two times; None if one of them has not come."""
    return None if start is None or end is None else end - start
