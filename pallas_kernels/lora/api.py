"""Each row through the adapter of its slot: the public op and the choice of implementation.

Letters: R rows, L layers, A adapter slots, r rank, U slots in use in one step (at most).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels.choice import choose
from pallas_kernels.lora import cpu, reference, tpu, xla

# On GPUs XLA's own program serves: two matrix products, and a gather of the adapters in use.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.lora,
    "xla": xla.lora,
    "cpu": cpu.lora,
    "tpu": tpu.lora,
    "gpu": xla.lora,
}


def lora(x: Any, a: Any, b: Any, layer: Any, slots: Any, active: Any, *, implementation: str = "auto") -> Any:
    """x [R, din] -> [R, dout] of x's dtype: row i is x[i] @ A.T @ B of the adapter in slot slots[i]; slot 0: zeros.

    a [L, A, r, din] and b [L, A, r, dout] of x's dtype hold every adapter (slot s at index s - 1) and are passed whole
    with the layer i32[]. slots i32[R]. active i32[U]: the distinct slots among the rows, in any order, padded with 0:
    the cost follows U and these, not A. A row whose slot is not among them gets zeros. Sums are float32; what comes out
    of A is rounded to x's dtype.

    implementation: 'auto' (by backend) or one of IMPLEMENTATIONS ('reference': NumPy, not traceable; 'tpu', 'cpu': no
    gradients; 'cpu': 'xla' for what it does not take). Raises ValueError on mismatched shapes or an unknown name.
    """
    rank, din = a.shape[2:]
    if x.shape[1:] != (din,) or b.shape[:3] != (*a.shape[:2], rank) or slots.shape != x.shape[:1] or active.ndim != 1:
        raise ValueError(
            f"x {x.shape}, slots {slots.shape} and active {active.shape} do not fit a {a.shape}, b {b.shape}: "
            f"[R, din], [R], [U], [L, A, r, din] and [L, A, r, dout] are needed"
        )
    name = choose(implementation, IMPLEMENTATIONS)
    if name == "cpu" and not cpu.supports(x, a, b):
        name = "xla"
    return IMPLEMENTATIONS[name](x, a, b, layer, slots, active)
