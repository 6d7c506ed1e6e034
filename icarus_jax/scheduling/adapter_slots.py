"""Which head lies in which adapter slot. Host only.

More heads may be served than the device has slots: a head comes into a slot when a sequence of it is admitted, in place
of the one that was idle the longest, and stays as long as a running sequence uses it.
"""

from __future__ import annotations

from collections import OrderedDict

from icarus_jax.scheduling.registry import NO_SLOT, Model


class AdapterSlots:
    """`num_slots` adapter slots, numbered from 1. Slot 0 is the trunk and always there."""

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self.evictions = 0
        self.loads: list[Model] = []  # heads to be put into their slots before the next step
        self._free = list(range(num_slots, 0, -1))
        self._users: dict[Model, int] = {}  # resident heads, and how many running sequences use each
        self._idle: OrderedDict[Model, None] = OrderedDict()  # resident, used by none, not pinned; oldest first

    @property
    def resident(self) -> list[Model]:
        return list(self._users)

    def acquire(self, model: Model) -> bool:
        """One more user for the model, which is given a slot if it has none. False: every slot is in use."""
        if model.kind == "base":
            return True
        if model.slot == NO_SLOT and not self._place(model):
            return False
        self._users[model] += 1
        self._idle.pop(model, None)
        return True

    def release(self, model: Model) -> None:
        """One user less."""
        if model.kind == "base":
            return
        self._users[model] -= 1
        assert self._users[model] >= 0, f"{model.name} was released twice"
        if not self._users[model] and not model.pinned:
            self._idle[model] = None

    def retire(self, model: Model) -> None:
        """The model gets no new requests: its slot goes first."""
        model.pinned = False
        if model in self._users and not self._users[model]:
            self._idle[model] = None
            self._idle.move_to_end(model, last=False)

    def _place(self, model: Model) -> bool:
        if self._free:
            model.slot = self._free.pop()
        elif self._idle:
            old, _ = self._idle.popitem(last=False)
            del self._users[old]
            model.slot, old.slot = old.slot, NO_SLOT
            self.evictions += 1
            if old in self.loads:  # never came to the device
                self.loads.remove(old)
        else:
            return False
        self._users[model] = 0
        self.loads.append(model)
        return True
