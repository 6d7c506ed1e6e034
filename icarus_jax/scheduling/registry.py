"""The served models by name, and their versions. Host only."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from icarus_jax.config import HeadConfig

log = logging.getLogger(__name__)

NEVER = 1 << 60  # a position that no sequence reaches
NO_SLOT = -1


@dataclasses.dataclass(eq=False)
class Model:
    """One version of a served model, as the host's code sees it.

    Attributes:
        name: The name that requests use.
        kind: 'base' (the trunk), or how a head uses the KV cache: 'shared', 'activated' (aLoRA) or 'isolated' (an
            ordinary LoRA).
        version: Counts the heads that were registered; two versions of one head differ. 0 for the trunk.
        invocation: The tokens at which an `activated` head's adapter comes on.
        pinned: Whether the head keeps its adapter slot while it is idle.
        factors: The head's adapter in host memory. The host's code only passes it on.
        retired: Whether it gets no new requests, as it was unloaded or replaced.
        slot: The adapter slot that holds the adapter: 0 for the trunk, NO_SLOT for a head that is not on the device.
            `AdapterSlots` sets it.
    """

    name: str
    kind: str
    version: int = 0
    invocation: tuple[int, ...] = ()
    pinned: bool = False
    factors: Any = None
    retired: bool = dataclasses.field(default=False, init=False)
    slot: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.slot = 0 if self.kind == "base" else NO_SLOT

    @property
    def salt(self) -> str:
        """The text that makes the names of the model's pages its own; empty if the trunk makes all of its K/V."""
        return f"{self.name}#{self.version}" if self.kind in ("activated", "isolated") else ""

    def adapted_from(self, tokens: Seq[int]) -> int:
        """Returns the first position whose K/V the model's own adapter makes.

        Args:
            tokens: The tokens of a sequence.

        Returns:
            0 for an `isolated` head. For an `activated` head, the start of the last invocation in `tokens`, as in
            PEFT's aLoRA. NEVER for all others, and if `tokens` holds no invocation.
        """
        if self.kind == "isolated":
            return 0
        if self.kind == "activated":
            length = len(self.invocation)
            for start in range(len(tokens) - length, -1, -1):
                if tuple(tokens[start : start + length]) == self.invocation:
                    return start
        return NEVER


class Registry:
    """The trunk and its heads, by name.

    Attributes:
        models: The served models by name. The dict is replaced and never changed, so that any thread may read it.
    """

    def __init__(self, trunk_name: str, num_slots: int):
        """Registers the trunk.

        Args:
            trunk_name: The trunk's name as a model.
            num_slots: The number of adapter slots, which limits the number of pinned heads.
        """
        self.models = {trunk_name: Model(trunk_name, "base")}
        self._num_slots = num_slots
        self._version = 0

    def add(self, head: HeadConfig, factors: Any) -> Model | None:
        """Registers a head, or a new version of one.

        Args:
            head: The head's name, kind and options.
            factors: Its adapter.

        Returns:
            The version that it replaces; None if the name is new.

        Raises:
            ValueError: The name is the trunk's, or pinned heads would leave no slot to the others.
        """
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
        """Removes a head, which gets no new requests.

        Args:
            name: The head's name.

        Returns:
            The model that was removed.

        Raises:
            ValueError: There is no such head.
        """
        model = self.models.get(name)
        if model is None or model.kind == "base":
            heads = [m.name for m in self.models.values() if m.kind != "base"]
            raise ValueError(f"there is no head {name!r}; heads: {', '.join(heads) or 'none'}")
        self.models = {key: value for key, value in self.models.items() if key != name}
        return model

    def next_model(self, rule: Callable[[int], str | None], token: int) -> Model | None:
        """Applies a handoff rule to a new token.

        Args:
            rule: Returns the name of the model that goes on, or None for no change.
            token: The token id.

        Returns:
            The model that goes on. None for no change, and if the model is not served any more.
        """
        name = rule(token)
        if name is None:
            return None
        if name not in self.models:
            log.warning("a handoff names %r, which is not served any more; the model stays as it is", name)
        return self.models.get(name)
