"""Whether the arrays on a device survived a failed program, and new ones for those that did not."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

import jax

log = logging.getLogger(__name__)

PROBE_SECONDS = 60  # a device that has not answered by then is taken for lost
Tree = TypeVar("Tree")


def is_whole(tree: Tree) -> bool:
    """Returns whether every array of a tree is there, and none was to be made by a program that failed.

    Args:
        tree: A tree of arrays on the device.

    Raises:
        TimeoutError: The device does not answer.
    """
    answer: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def wait() -> None:
        try:
            jax.block_until_ready(tree)
            answer.put(None)
        except Exception as error:
            answer.put(error)

    # A daemon, as the wait for a lost device has no end, and the process must be able to.
    threading.Thread(target=wait, name="device-probe", daemon=True).start()
    try:
        error = answer.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"the device has not answered for {PROBE_SECONDS} s") from None
    if error is not None:
        log.warning("arrays were lost in the failed step: %s", error)
        return False
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def replace_lost(tree: Tree, make: Callable[[], Tree]) -> tuple[bool, Tree]:
    """Keeps a tree of arrays if it is whole, else makes it anew.

    Args:
        tree: A tree of arrays on the device.
        make: Makes it anew.

    Returns:
        Whether it was kept, and the tree.

    Raises:
        TimeoutError: The device does not answer.
        Exception: What `make` raises on a device that is lost.
    """
    if is_whole(tree):
        return True, tree
    return False, jax.block_until_ready(make())
