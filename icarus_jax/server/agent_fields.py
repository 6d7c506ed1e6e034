"""The fields of a request that choose the models that answer it, and name the conversation that it belongs to.

"models": ["a", "b"]                                    each model makes n choices; the prompt is computed once
"handoff": [{"on": "\\nAction:", "model": "b"}, ...]     b goes on after a token that completes the text or has the id
"reference_logprobs": true                              also report the trunk's log-probability of each token
"session": {"id": "x", "retain": 60, "next_model": "b"} keep the pages for 60 seconds (or "pinned": until released)

A session ends by a POST of its id to /v1/release_session. One to /v1/park_session moves its pages to the page store.
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
MAX_ON_CHARACTERS = 1000


class HandoffRule(Body):
    """A rule that hands a choice over to another model.

    Attributes:
        on: the text or the token id that triggers the rule once it has been generated.
        model: the model that generates the tokens after it.
    """

    on: Annotated[str, Field(max_length=MAX_ON_CHARACTERS)] | Int32
    model: str


class Session(Body):
    """The conversation that a request belongs to.

    Attributes:
        id: the client's name of the conversation.
        retain: for how many seconds the pages are kept after the answer; 'pinned' keeps them until the session is
            released. None: as long as there is room.
        next_model: the model that will most likely continue the conversation.
    """

    id: str = Field(min_length=1, max_length=256)
    retain: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["pinned"] | None = None
    next_model: str | None = None

    def hint(self) -> SessionHint:
        """Returns the session as the engine takes it, with 'pinned' as an infinite number of seconds."""
        return SessionHint(self.id, math.inf if self.retain == "pinned" else self.retain, self.next_model)


class SessionRequest(Body):
    """Names a session that is to be released or parked.

    Attributes:
        id: the client's name of the conversation.
        key: the name of the API key whose session it is; None: the caller's. Only an admin may name another.
    """

    id: str = Field(min_length=1, max_length=256)
    key: str | None = None


class Routing(Body):
    """The models that answer a request.

    Attributes:
        model: the model that answers, and the answer's top-level `model`. If `models` is given too, `model` may be
            left out or must be one of them.
        models: several models that answer the same prompt.
        handoff: the rules that hand a choice over to another model.
        reference_logprobs: whether to report the trunk's log-probability of each generated token.
        session: the conversation that the request belongs to.
    """

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
        twice = _first_repeated(self.models or [])
        if twice is not None:
            raise RequestError(f"models names {str(twice)[:64]!r} twice; n asks for several choices of each", "models")
        if any(rule.on == "" for rule in self.handoff):
            raise RequestError("handoff has an empty string in on: it would be found everywhere", "handoff")
        twice = _first_repeated([rule.on for rule in self.handoff])
        if twice is not None:
            raise RequestError(f"handoff has two rules on {str(twice)[:64]!r}", "handoff")
        return self

    @property
    def answering(self) -> tuple[str, ...]:
        """The models that answer. Each of them makes n choices."""
        return tuple(self.models or [self.label])

    @property
    def label(self) -> str:
        """The answer's top-level `model`."""
        name = self.model if self.models is None else self.model or self.models[0]
        assert name is not None
        return name

    @property
    def by_model(self) -> bool:
        """True if more than one model may generate tokens of the answer."""
        return self.models is not None or bool(self.handoff)


def _first_repeated(values: Sequence[str | int]) -> str | int | None:
    return next((value for i, value in enumerate(values) if value in values[:i]), None)
