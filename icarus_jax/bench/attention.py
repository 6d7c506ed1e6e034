"""`bench.py attention`: every implementation of attention that runs here, on one step's work of a model's layers.

The implementations take turns, so that a disturbance of the machine falls on all of them; medians count.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from icarus_jax import cli
from icarus_jax.config import ModelConfig
from icarus_jax.model_zoo import MODELS
from pallas_kernels.paged_attention import SequenceRows, WorkShape, build_work, paged_attention

PAGE = 16
NUM_PAGES = 1280
ROUNDS = 9
IMPLEMENTATIONS = ("xla", "cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences on `common` tokens, each with `own` more, of which the last `rows` are computed (by writers alone; or
    one by a writer and a reader row, if rows is 0)."""

    sequences: int
    common: int
    own: int
    rows: int = 0

    @property
    def name(self) -> str:
        what = f"prefill of {self.rows}" if self.rows else "a token each"
        return f"{self.sequences} x ({self.common} common + {self.own} own tokens), {what}"


CASES = (
    Case(1, 0, 512, 512),
    Case(1, 640, 512, 512),
    Case(1, 640, 128, 128),
    Case(1, 640, 100),
    Case(8, 640, 100),
    Case(24, 640, 100),
    Case(24, 640, 400),
)


def make_work(case: Case) -> Any:
    """The work list of a case, as the engine would build it."""
    pages_per_seq = -(-(case.common + case.own) // PAGE)
    num_rows = case.sequences * (case.rows or 2)
    shape = WorkShape(num_rows, 2, case.sequences * pages_per_seq, num_rows // 32 + 9, pages_per_seq)
    free = iter(range(case.common // PAGE, NUM_PAGES))
    sequences = []
    for i in range(case.sequences):
        own = [next(free) for _ in range(pages_per_seq - case.common // PAGE)]
        table = np.array([*range(case.common // PAGE), *own], np.int32)
        last = case.common + case.own
        if case.rows:
            rows, positions = np.arange(case.rows) + i * case.rows, np.arange(last - case.rows, last)
        else:
            rows, positions = np.array([i, case.sequences + i]), np.full(2, last - 1)
        sequences.append(SequenceRows(rows.astype(np.int32), positions.astype(np.int32), table))
    return build_work(sequences, shape, PAGE)


def layers(model: ModelConfig, implementation: str) -> Callable:
    """All layers' attention, one after the other, compiled when it is first called."""
    import jax
    import jax.numpy as jnp

    def run(q, kv_pages, work):
        def layer(x, index):
            out = paged_attention(x, kv_pages, index, work, scale=model.head_dim**-0.5, implementation=implementation)
            return x + 0.1 * out, None  # so that no layer can be left out, or run before the one below it

        return jax.lax.scan(layer, q, jnp.arange(model.num_layers))[0]

    return jax.jit(run)


def run(model_name: str) -> dict[str, Any]:
    """The command. Raises UsageError."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "cpu":
        raise cli.UsageError("bench.py attention compares what runs on CPUs; for TPUs see bench.py kernels")
    model, rng = MODELS[model_name], np.random.default_rng(0)
    shape = (model.num_layers, NUM_PAGES, model.num_kv_heads, PAGE, 2 * model.head_dim)
    kv_pages = jnp.asarray(rng.standard_normal(shape, np.float32))
    programs = {name: layers(model, name) for name in IMPLEMENTATIONS}
    print(f"{model_name}, {model.num_layers} layers, float32: ms, and times as fast as {IMPLEMENTATIONS[0]}")
    rows = []
    for case in CASES:
        work = jax.tree.map(jnp.asarray, make_work(case))
        q = jnp.asarray(rng.standard_normal((len(work.positions), model.num_heads, model.head_dim), np.float32))
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(ROUNDS + 1):  # the first compiles
            for name, program in programs.items():
                begin = time.perf_counter()
                program(q, kv_pages, work).block_until_ready()
                seconds[name] += [time.perf_counter() - begin] if turn else []
        ms = {name: float(np.median(some)) * 1e3 for name, some in seconds.items()}
        rows.append({"case": case.name, **ms})
        ratio = ms[IMPLEMENTATIONS[0]] / ms[IMPLEMENTATIONS[-1]]
        print(f"{case.name:62}" + "".join(f"{name} {value:7.1f}  " for name, value in ms.items()) + f"{ratio:.1f}x")
    return {"model": model_name, "rows": rows}
