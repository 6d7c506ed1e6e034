"""What the parts of tests/gpu_check.sh share: a report that is on disk as soon as a figure is there, and timing."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

TINY = os.environ.get("GPU_CHECK_TINY") == "1"  # the smallest sizes, on a CPU: tests/pallas_kernels/test_gpu_check.py
DTYPE = "float32" if TINY else "bfloat16"  # of the engine; the kernels for CPUs take float32


class Report:
    """The results of one part, in NAME.json, which is written anew at each addition.

    Attributes:
        failed: The names of the items that failed.
    """

    def __init__(self, name: str):
        """Starts a report with the device and the version of JAX."""
        self.path = results_folder() / f"{name}.json"
        self.failed: list[str] = []
        device = jax.devices()[0]
        self._found: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "tiny": TINY}
        if not TINY and device.platform != "gpu":
            raise SystemExit(f"no GPU: JAX sees {jax.devices()}")

    @contextlib.contextmanager
    def item(self, name: str) -> Iterator[dict[str, Any]]:
        """Gives a dict to fill with figures. An error is written down in their place, and costs this item alone."""
        row: dict[str, Any] = {}
        begin = time.perf_counter()
        try:
            yield row
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"[:500]
            self.failed.append(name)
        row["seconds"] = round(time.perf_counter() - begin, 2)
        self._found[name] = row
        # Written aside first: the part may be killed at any time.
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self._found, indent=1))
        aside.replace(self.path)
        print(f"{self.path.stem}: {name}: {json.dumps(row)[:300]}", flush=True)

    def end(self) -> int:
        """Prints what failed, and returns the part's exit status."""
        if self.failed:
            print(f"{self.path.stem}: FAILED: {', '.join(self.failed)}", flush=True)
        return int(bool(self.failed))


def results_folder() -> Path:
    """Returns $OUT, or results/gpu_check; the folder exists."""
    folder = Path(os.environ.get("OUT") or "results/gpu_check")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def seconds_of(call: Callable[[], Any], at_least: float = 0.05) -> float:
    """Times a call that is compiled already or compiles at first.

    Args:
        call: Launches work and returns its arrays.
        at_least: Calls are launched together until they take about so many seconds, so that dispatch does not count.

    Returns:
        Seconds of one call: the median of three batches.
    """
    jax.block_until_ready(call())
    begin = time.perf_counter()
    jax.block_until_ready(call())
    calls = 1 if TINY else max(1, min(200, round(at_least / (time.perf_counter() - begin))))
    batches = []
    for _ in range(1 if TINY else 3):
        begin = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        batches.append((time.perf_counter() - begin) / calls)
    return statistics.median(batches)
