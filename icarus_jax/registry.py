"""The served models by name, and their versions. Host only."""

from __future__ import annotations

from typing import Any

from icarus_jax.config import HeadConfig
from icarus_jax.sequence import Model


class Registry:
    """The trunk and its heads. `models` is replaced, never changed: any thread may read it."""

    def __init__(self, trunk_name: str, num_slots: int):
        self.models = {trunk_name: Model(trunk_name, "base")}
        self._num_slots = num_slots
        self._version = 0

    def add(self, head: HeadConfig, factors: Any) -> Model | None:
        """Serves a head from now on; returns the version that it replaces, if any. Raises ValueError."""
        old = self.models.get(head.name)
        if old is not None and old.kind == "base":
            raise ValueError(f"{head.name!r} is the trunk's own name")
        others = [m for m in self.models.values() if m.kind != "base" and m is not old]
        pinned = sum(m.pinned for m in others) + head.pinned
        if pinned + (pinned <= len(others)) > self._num_slots:
            raise ValueError(f"{pinned} pinned heads leave no adapter slot of {self._num_slots} to the others")
        self._version += 1
        model = Model(head.name, head.kv, self._version, head.invocation_tokens, head.pinned, factors)
        self.models = {**self.models, head.name: model}
        return old

    def remove(self, name: str) -> Model:
        """Serves a head no longer. Raises ValueError if there is no such head."""
        model = self.models.get(name)
        if model is None or model.kind == "base":
            heads = [m.name for m in self.models.values() if m.kind != "base"]
            raise ValueError(f"there is no head {name!r}; heads: {', '.join(heads) or 'none'}")
        self.models = {key: value for key, value in self.models.items() if key != name}
        return model
