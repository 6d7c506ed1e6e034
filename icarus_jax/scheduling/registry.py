"""The served models by name, and their versions. Host only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from typing import Any

from icarus_jax.config import HeadConfig

NEVER = 1 << 60  # a position that no sequence reaches
NO_SLOT = -1


@dataclasses.dataclass(eq=False)
class Model:
    """One version of a served model, as host code sees it.

    slot: the adapter slot it lies in; 0 for the trunk, NO_SLOT for a head that is not on the device now (slots.py).
    factors: the head's adapter in host memory; host code only passes it on.
    """

    name: str
    kind: str  # 'base' | 'shared' | 'activated' | 'isolated'
    version: int = 0
    invocation: tuple[int, ...] = ()
    pinned: bool = False
    factors: Any = None
    slot: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.slot = 0 if self.kind == "base" else NO_SLOT

    @property
    def salt(self) -> str:
        """What sets the pages that this model makes apart: empty when the trunk alone makes its K/V."""
        return f"{self.name}#{self.version}" if self.kind in ("activated", "isolated") else ""

    def adapted_from(self, tokens: Seq[int]) -> int:
        """The first position whose K/V this model's own adapter makes: NEVER, 0, or for `activated` the start of the
        last invocation in `tokens` (as PEFT has it)."""
        if self.kind == "isolated":
            return 0
        n = len(self.invocation)
        starts = range(len(tokens) - n, -1, -1) if self.kind == "activated" else ()
        return next((i for i in starts if tuple(tokens[i : i + n]) == self.invocation), NEVER)


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
