"""Which of JAX's platforms a program uses. To be called before JAX is imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def leave_libtpu_alone() -> None:
    """Keeps JAX from loading libtpu on a machine without a TPU.

    JAX would take libtpu's lock and search for a chip for a long time. An environment variable JAX_PLATFORMS that is
    set already is left as it is.
    """
    chips = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    if importlib.util.find_spec("libtpu") and not chips:
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if Path("/dev/nvidiactl").exists() else "cpu")
