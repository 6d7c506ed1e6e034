"""On which of JAX's platforms a program runs. For before JAX is imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def leave_libtpu_alone() -> None:
    """Keeps JAX from loading libtpu where there is no TPU: it would take libtpu's lock, and look for a chip at length.

    What JAX_PLATFORMS says already stays.
    """
    chips = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    if importlib.util.find_spec("libtpu") and not chips:
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if Path("/dev/nvidiactl").exists() else "cpu")
