"""On a machine with an NVIDIA GPU: the kernels compiled, against NumPy; then timed.

    python tests/pallas_kernels/gpu_smoke.py

Exits 1 if a case is wrong. Not collected by pytest; the same cases run interpreted in test_gpu_attention.py and
test_paged_attention.py.
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import SequenceRows, WorkShape, build_work, gpu, paged_attention, reference
from tests.pallas_kernels import gpu_cases
from tests.pallas_kernels.attention_cases import CASES, LAYER, LAYOUTS, SOME_CASES, TOLERANCE, problem

K, G, H, PAGE, LAYERS, CALLS = 8, 4, 128, 16, 4, 20


def check_cases() -> bool:
    """Few runs of many kinds."""
    right = True
    for name, case in gpu_cases.CASES.items():
        arguments, want = gpu_cases.build(case)
        got = jax.jit(lambda *a, spec=case.spec: gpu.paged_attention(*a, spec))(*arguments)
        found, most = gpu_cases.errors(got, want), gpu_cases.tolerance(case)
        ok = all(e < t for e, t in zip(found, most, strict=True))
        right &= ok
        print(f"{'ok' if ok else 'WRONG':6}{name:32} out {found[0]:.1e} (< {most[0]:.0e})  lse {found[1]:.1e}")
    return right


def check_work_lists() -> bool:
    """Items, tiles and rows of both, as `build_work` makes them."""
    right = True
    for layout_name, layout in LAYOUTS.items():
        attend = jax.jit(functools.partial(paged_attention, implementation="gpu", return_lse=True, **layout.spec))
        for name in SOME_CASES:
            p = problem(layout, CASES[name])
            got = attend(p.q, p.kv_pages, LAYER, p.work, kv_scales=p.kv_scales)
            want = reference.paged_attention(p.q, p.kv_pages, LAYER, p.work, kv_scales=p.kv_scales, **layout.spec)
            error = max(gpu_cases.errors(got, want))
            ok = error < TOLERANCE[layout.dtype]
            right &= ok
            print(f"{'ok' if ok else 'WRONG':6}{layout_name}, {name}: {error:.1e} (< {TOLERANCE[layout.dtype]:.0e})")
    return right


def time_layers(name: str, sequences: int, rows: int, tokens: int, implementations: tuple[str, ...]) -> bool:
    """Seconds a layer of the whole op; each sequence has `rows` rows, the last one at position tokens - 1."""
    rng = np.random.default_rng(0)
    pages = tokens // PAGE
    tables = rng.permutation(sequences * pages).reshape(sequences, pages)
    few = rows <= 2  # a writer and a reader, at the same position
    positions = np.arange(tokens - rows, tokens, dtype=np.int32) if not few else np.full(rows, tokens - 1, np.int32)
    batch = [
        SequenceRows(np.arange(i * rows, (i + 1) * rows, dtype=np.int32), positions, table)
        for i, table in enumerate(tables)
    ]
    total = sequences * rows
    shape = WorkShape(total, min(rows, 2), sequences * -(-pages // 16), 0 if few else -(-total // 32), pages)
    work = jax.device_put(build_work(batch, shape, PAGE))
    kv = jax.random.normal(jax.random.key(0), (LAYERS, sequences * pages, K, PAGE, 2 * H), jnp.bfloat16)
    q = jax.random.normal(jax.random.key(1), (total, K * G, H), jnp.bfloat16)
    layer_bytes = kv.nbytes / LAYERS
    flops = 4 * H * K * G * sequences * sum(int(p) + 1 for p in positions)

    results = {}
    for implementation in implementations:

        @jax.jit
        def all_layers(q, kv, work, implementation=implementation):
            def layer(_, i):
                return None, paged_attention(q, kv, i, work, scale=H**-0.5, implementation=implementation)

            return jax.lax.scan(layer, None, jnp.arange(LAYERS))[1]

        results[implementation] = np.asarray(all_layers(q, kv, work), np.float32)
        start = time.perf_counter()
        for _ in range(CALLS):
            out = all_layers(q, kv, work)
        out.block_until_ready()
        seconds = (time.perf_counter() - start) / (CALLS * LAYERS)
        print(
            f"{name}, {implementation}: {seconds * 1e6:.0f} us a layer, "
            f"K/V once at {layer_bytes / seconds / 1e9:.0f} GB/s, {flops / seconds / 1e12:.1f} TFLOP/s"
        )
    first, *others = results.values()
    apart = max((float(np.abs(first - other).max() / np.abs(first).max()) for other in others), default=0.0)
    print(f"{name}: largest difference {apart:.1e} of the largest value")
    return apart < 2e-2 and bool(np.isfinite(first).all())


def main() -> int:
    if jax.default_backend() != "gpu":
        print(f"no GPU: JAX sees {jax.devices()}", file=sys.stderr)
        return 2
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    right = check_cases() & check_work_lists()
    right &= time_layers("decode, 64 sequences of 2048 tokens, 2 rows each", 64, 2, 2048, ("gpu", "xla"))
    right &= time_layers("prefill, 8 chunks of 512 up to 2048 tokens", 8, 512, 2048, ("gpu", "xla"))
    return not right


if __name__ == "__main__":
    sys.exit(main())
