"""Low-rank adapters chosen row by row: the public op and the choice of implementation.

Letters, besides those of docs/design.md: B rows, din inputs and dout outputs of the adapted layer, U entries of the
list of slots in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Int

from pallas_kernels.arrays import Array
from pallas_kernels.choice import choose
from pallas_kernels.lora import cpu, gpu, reference, tpu, xla

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "reference": reference.lora,
    "xla": xla.lora,
    "cpu": cpu.lora,
    "tpu": tpu.lora,
    "gpu": gpu.lora,
}


def lora(
    x: Float[Array, "B din"],
    a: Float[Array, "L A r din"],
    b: Float[Array, "L A r dout"],
    layer: Int[Array, ""] | int,
    slots: Int[Array, " B"],
    active: Int[Array, " U"],
    *,
    implementation: str = "auto",
) -> Float[Array, "B dout"]:
    """Applies to each row the low-rank adapter in the row's slot.

    Row i of the result is `x[i] @ A.T @ B`, where A and B are the factors of layer `layer` in slot `slots[i]`. Rows of
    slot 0, which stands for "no adapter", are zeros. The caller adds the result to the layer's own output, and has
    folded LoRA's factor alpha / r into A or B.

    The method is LoRA (Hu et al., 2021, arXiv 2106.09685, section 4.1). To serve rows of several adapters in one call
    follows Punica (Chen et al., 2023, arXiv 2310.18547).

    Args:
        x: [B, din] in float32 or bfloat16. The inputs.
        a: [L, A, r, din] in x's dtype. The factors A of every layer and adapter; slot s is at index s - 1. The array is
            passed whole, so that no copy of one layer is made.
        b: [L, A, r, dout] in x's dtype. The factors B, stored like `a`.
        layer: i32[]. The index of the layer.
        slots: i32[B]. The adapter slot of each row, 0 to A.
        active: i32[U]. The distinct slots among the rows, in any order, padded with zeros. The cost follows the number
            of these slots and U, not A. A row whose slot is not listed gets zeros.
        implementation: 'auto' (the one for JAX's default backend) or one of IMPLEMENTATIONS. 'reference' runs on NumPy
            and cannot be traced. 'tpu', 'gpu' and 'cpu' have no gradients. 'cpu' runs 'xla' for arguments that its
            kernel does not support (see `cpu.supports`).

    Returns:
        [B, dout] in x's dtype: the adapters' outputs. Sums are computed in float32, and `x @ A.T` is rounded to x's
        dtype before it is multiplied by B; 'reference' computes in float64 and rounds only the result.

    Raises:
        ValueError: The shapes do not fit each other, or `implementation` is unknown.
    """
    check_shapes(x, a, b, slots, active)
    name = choose(implementation, IMPLEMENTATIONS)
    if name == "cpu" and not cpu.supports(x, a, b):
        name = "xla"
    return IMPLEMENTATIONS[name](x, a, b, layer, slots, active)


def check_shapes(x: Array, a: Array, b: Array, slots: Array, active: Array) -> None:
    """Raises ValueError unless the arguments of `lora` fit each other."""
    rank, din = a.shape[2:]
    if x.shape[1:] != (din,) or b.shape[:3] != (*a.shape[:2], rank) or slots.shape != x.shape[:1] or active.ndim != 1:
        raise ValueError(
            f"x {x.shape}, slots {slots.shape} and active {active.shape} do not fit a {a.shape}, b {b.shape}: "
            f"[B, din], [B], [U], [L, A, r, din] and [L, A, r, dout] are needed"
        )
