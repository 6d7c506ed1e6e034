"""Checkpoints of a training run, and the signals that stop it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from icarus_jax.training.step import State

KEPT = 2  # number of checkpoints that stay on disk


class Checkpoints:
    """The state and the data position of a run, saved by Orbax.

    Orbax writes a checkpoint to a temporary folder and renames it, so that a killed run never leaves half of one. Close
    this object to wait for the last one to be written.

    Args:
        folder: Where the checkpoints lie, one folder a step.
    """

    def __init__(self, folder: Path):
        self._manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=KEPT))

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, iterator: Any, examples: int) -> None:
        """Saves a checkpoint, in the background.

        Args:
            step: The number of steps done.
            state: The heads and the optimiser's state.
            iterator: The iterator of training batches, whose position is saved.
            examples: The number of examples trained on so far.
        """
        position = {"iterator": iterator.get_state(), "examples": examples}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position))
        self._manager.save(step, args=items)

    def restore(self, state: State, iterator: Any) -> tuple[State, int]:
        """Restores the newest checkpoint.

        Args:
            state: A state of the same shapes and shardings.
            iterator: The iterator of training batches. It is moved to the saved position.

        Returns:
            The saved state and number of examples; `state` and 0 if there is no checkpoint.
        """
        step = self.newest
        if step is None:
            return state, 0
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        iterator.set_state(restored.data["iterator"])
        return State(*restored.state), restored.data["examples"]

    def close(self) -> None:
        """Waits until what is being saved is written, and closes the folder."""
        self._manager.close()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Catches SIGTERM and SIGINT (Ctrl-C), so that the step under way can end first.

    Yields:
        A list, empty at first, to which the number of each signal is appended.
    """
    stopped: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: stopped.append(n)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
