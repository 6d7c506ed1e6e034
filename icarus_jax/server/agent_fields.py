"""Which models answer a request: side by side (`models`), in turn (`handoff`), and in which conversation (`session`).

"models": ["a", "b"]                                    n choices of each; the prompt is computed once
"handoff": [{"on": "\\nAction:", "model": "b"}, ...]     after the token that completes the text (or has the id)
"reference_logprobs": true                              the trunk's log-probability of each token, too
"session": {"id": "x", "retain": 60 or "pinned", "next_model": "b"}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from icarus_jax.errors import RequestError
from icarus_jax.scheduling.request import SessionHint
from icarus_jax.server.body import Body, Int32

MAX_N = 128
MAX_RULES = 16


class HandoffRule(Body):
    on: str | Int32  # a text, or a token id
    model: str


class Session(Body):
    id: str = Field(min_length=1, max_length=256)
    retain: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["pinned"] | None = None
    next_model: str | None = None

    def hint(self) -> SessionHint:
        return SessionHint(self.id, math.inf if self.retain == "pinned" else self.retain, self.next_model)


class ReleaseRequest(Body):
    """The end of a session: what is retained of it may go."""

    id: str = Field(min_length=1, max_length=256)


class Routing(Body):
    """`model` may be left out beside `models`; if both are given it must be one of them."""

    model: str | None = None
    models: list[str] | None = Field(None, min_length=1, max_length=MAX_N)
    handoff: list[HandoffRule] = Field([], max_length=MAX_RULES)
    reference_logprobs: bool = False
    session: Session | None = None

    @model_validator(mode="after")
    def _check_routing(self) -> Routing:
        if self.models is None and self.model is None:
            raise RequestError("model is missing: name one, or several in models", "model")
        if self.models is not None and self.model not in (None, *self.models):
            raise RequestError("model is not one of models: leave it out, or name one of them", "model")
        if (twice := _first_repeated(self.models or [])) is not None:
            raise RequestError(f"models names {str(twice)[:64]!r} twice; n asks for several choices of each", "models")
        if any(rule.on == "" for rule in self.handoff):
            raise RequestError("handoff has an empty string in on: it would be found everywhere", "handoff")
        if (twice := _first_repeated([rule.on for rule in self.handoff])) is not None:
            raise RequestError(f"handoff has two rules on {str(twice)[:64]!r}", "handoff")
        return self

    @property
    def answering(self) -> tuple[str, ...]:
        """The models that answer, each with n choices."""
        return tuple(self.models or [self.label])

    @property
    def label(self) -> str:
        """The answer's top-level `model`."""
        name = self.model if self.models is None else self.model or self.models[0]
        assert name is not None
        return name

    @property
    def by_model(self) -> bool:
        """True if more than one model may write."""
        return self.models is not None or bool(self.handoff)


def _first_repeated(values: Sequence[str | int]) -> str | int | None:
    return next((value for i, value in enumerate(values) if value in values[:i]), None)
