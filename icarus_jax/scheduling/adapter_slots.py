"""Assigns heads to adapter slots. Host only.

An engine may serve more heads than the device has slots. A head gets a slot when one of its sequences is admitted. If
no slot is empty, it takes the slot of the head that has been idle for the longest time. A head keeps its slot as long
as one of its sequences runs.
"""

from __future__ import annotations

from collections import OrderedDict

from icarus_jax.scheduling.registry import NO_SLOT, Model


class AdapterSlots:
    """The adapter slots of the device, numbered from 1. Slot 0 stands for the trunk, which needs no slot.

    Attributes:
        num_slots: The number of slots.
        evictions: How many heads have lost their slot to another head.
        loads: The heads whose adapters must be copied into their slots before the next step.
    """

    def __init__(self, num_slots: int):
        """Makes `num_slots` empty slots."""
        self.num_slots = num_slots
        self.evictions = 0
        self.loads: list[Model] = []
        self._free = list(range(num_slots, 0, -1))
        self._users: dict[Model, int] = {}  # heads with a slot -> how many running sequences use each
        self._idle: OrderedDict[Model, None] = OrderedDict()  # with a slot, unused and not pinned; oldest first

    @property
    def resident(self) -> list[Model]:
        """The heads that have a slot."""
        return list(self._users)

    def acquire(self, model: Model, last_resort: bool = False) -> bool:
        """Adds a user of the model, and gives the model a slot if it has none.

        Args:
            model: The model of a sequence that is about to run.
            last_resort: Whether even a pinned head that is idle gives up its slot.

        Returns:
            False if the model has no slot and every slot is in use. Nothing has changed then.
        """
        if model.kind == "base":
            return True
        if model.slot == NO_SLOT and not self._place(model, last_resort):
            return False
        self._users[model] += 1
        self._idle.pop(model, None)
        return True

    def release(self, model: Model) -> None:
        """Removes a user of the model. Without users the model keeps its slot until another one needs it.

        Args:
            model: A model that `acquire` was called for.
        """
        if model.kind == "base":
            return
        self._users[model] -= 1
        assert self._users[model] >= 0, f"{model.name} was released twice"
        if not self._users[model] and not model.pinned:
            self._idle[model] = None
            if model.retired:
                self._idle.move_to_end(model, last=False)

    def clear(self) -> None:
        """Takes every head out of its slot. The device's slots count as empty."""
        for model in self._users:
            model.slot = NO_SLOT
        self._users, self._idle, self.loads = {}, OrderedDict(), []
        self._free = list(range(self.num_slots, 0, -1))

    def retire(self, model: Model) -> None:
        """Unpins a model that gets no new requests; its slot is the first to be reused once it is idle.

        Args:
            model: A head that is not served any more, or the old version of a head.
        """
        model.pinned, model.retired = False, True
        if model in self._users and not self._users[model]:
            self._idle[model] = None
            self._idle.move_to_end(model, last=False)

    def _place(self, model: Model, last_resort: bool) -> bool:
        """Gives the model an empty slot or that of the longest idle head; returns False if there is neither."""
        pinned = [head for head, users in self._users.items() if not users and head.pinned] if last_resort else []
        if self._free:
            model.slot = self._free.pop()
        elif self._idle or pinned:
            old = next(iter(self._idle), None) or pinned[0]
            self._idle.pop(old, None)
            del self._users[old]
            model.slot, old.slot = old.slot, NO_SLOT
            self.evictions += 1
            if old in self.loads:  # it was not copied to the device yet
                self.loads.remove(old)
        else:
            return False
        self._users[model] = 0
        self.loads.append(model)
        return True
