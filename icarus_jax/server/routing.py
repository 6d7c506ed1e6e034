"""The models that a request names: whether they are served, and whether they go together."""

from __future__ import annotations

from collections.abc import Iterable

from icarus_jax.engine.engine import Engine
from icarus_jax.server.agent_fields import Routing
from icarus_jax.server.body import ApiError
from icarus_jax.server.head_resolver import UnknownModel
from icarus_jax.server.prompts import PromptReader

MAX_NAMES = 20  # of the served models that an error lists


def check_model(name: str | None, engine: Engine, field: str = "model", num_new: int = 1) -> None:
    """Checks that a model is served.

    Args:
        name: the model's name; None passes.
        engine: the engine that serves it.
        field: the request's field that names it.
        num_new: how many models the request names that are not served.

    Raises:
        UnknownModel: there is no such model.
    """
    if name is not None and name not in engine.models:
        message = f"the model {name[:64]!r} is not served; served: {_listed(engine.models)}"
        raise UnknownModel(name, 404, message, field, "model_not_found", num_new)


def _listed(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:MAX_NAMES]) + (f" and {len(first) - MAX_NAMES} more" if len(first) > MAX_NAMES else "")


def named_models(body: Routing) -> list[tuple[str, str]]:
    """Returns the models that a request names, each after the field that names it."""
    named = [("model" if body.models is None else "models", name) for name in body.answering]
    named += [("handoff", rule.model) for rule in body.handoff]
    if body.session and body.session.next_model is not None:
        named.append(("session", body.session.next_model))
    return named


def check_routing(body: Routing, engine: Engine, reader: PromptReader) -> None:
    """Checks the models that a request names, and whether they go together.

    Args:
        body: the request.
        engine: the engine that is to answer it.
        reader: knows the vocabulary.

    Raises:
        UnknownModel: a model is not served.
        ApiError: a model cannot be combined with what else the request asks for.
    """
    models, named = engine.models, named_models(body)
    num_new = len({name for _, name in named} - models.keys())
    for field, name in named:
        if name not in models and field in ("handoff", "session"):
            message = f"{field} names the model {name[:64]!r}, which is not served; served: {_listed(models)}"
            raise UnknownModel(name, 400, message, field, num_new=num_new)
        check_model(name, engine, field, num_new)
    if body.reference_logprobs:
        for field, name in named:
            if field != "session" and name in models and models[name].salt:
                message = f"reference_logprobs need the trunk's K/V, and {field} names {name!r}, which makes its own"
                raise ApiError(400, message, "handoff" if field == "handoff" else "reference_logprobs")
    reader.check_ids([rule.on for rule in body.handoff if isinstance(rule.on, int)], "handoff")
