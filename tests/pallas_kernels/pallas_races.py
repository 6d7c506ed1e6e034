"""The TPU interpreter that simulates DMAs and looks for races; the one place that reaches into a private module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.interpret import interpret_mode

DMA_MODES = ("on_wait", "eager")


@contextlib.contextmanager
def simulated_dma(dma_mode: str) -> Iterator[None]:
    """Kernels traced inside run with simulated DMAs, on NaN-filled memory. A wait that no copy answers hangs.

    'on_wait' moves the bytes as late as possible (a missing wait gives wrong values), 'eager' as early as possible.
    Raises AssertionError if any two accesses raced.
    """
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode=dma_mode, uninitialized_memory="nan")
    interpret_pallas_call.races = None
    try:
        with interpret_mode(params):
            yield
        assert interpret_pallas_call.races is not None, "no kernel ran in the simulator"
        assert not interpret_pallas_call.races.races_found, f"races under dma_execution_mode={dma_mode!r}"
    finally:
        pltpu.reset_tpu_interpret_mode_state()
