"""`bench.py cpu`: times the CPU kernels against XLA's programs, on the work that all layers of a model do in a step.

The implementations take turns, so that a disturbance of the machine affects all of them. The medians are compared.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from icarus_jax.config import LORA_TARGETS, ModelConfig
from icarus_jax.errors import UsageError
from icarus_jax.models.presets import MODELS
from pallas_kernels.linear import linear, pack
from pallas_kernels.lora import lora
from pallas_kernels.paged_attention import SequenceRows, WorkShape, build_work, paged_attention

PAGE = 16
NUM_PAGES = 1280
ROUNDS = 9
IMPLEMENTATIONS = ("xla", "cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """The attention of one step: sequences that share their first tokens.

    Attributes:
        sequences: how many sequences there are.
        common: how many tokens they share.
        own: how many tokens each sequence has after those.
        rows: how many of each sequence's last tokens are computed, by writer rows alone. 0: one token, by a writer row
            and a reader row.
    """

    sequences: int
    common: int
    own: int
    rows: int = 0

    @property
    def name(self) -> str:
        """The case in words."""
        what = f"prefill of {self.rows}" if self.rows else "a token each"
        return f"{self.sequences} x ({self.common} common + {self.own} own tokens), {what}"


PRODUCTS = (1, 2, 8, 16, 32, 64, 128, 256, 512)  # numbers of rows
ADAPTED = ((1, 1), (8, 8), (24, 8), (128, 1))  # (rows, adapters that they use)
RANK = 16
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
    """Builds the work list of a case, as the engine would."""
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


def over_layers(model: ModelConfig, op: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a program that runs an operation in all layers, one after the other.

    Args:
        model: says how many layers there are.
        op: op(x, layer, *args) returns an array of x's shape.

    Returns:
        A function of (x, *args). It is compiled when it is first called.
    """
    import jax
    import jax.numpy as jnp

    def run(x, *args):
        def layer(x, index):  # each layer uses the result of the one below, so the compiler cannot omit or reorder any
            return x + 0.1 * op(x, index, *args), None

        return jax.lax.scan(layer, x, jnp.arange(model.num_layers))[0]

    return jax.jit(run)


@dataclasses.dataclass(frozen=True)
class Contest:
    """An operation that is timed with every implementation.

    Attributes:
        name: the operation in words.
        op: op(x, layer, *args, implementation=..) does the work of one layer.
        args: x and the other arguments.
    """

    name: str
    op: Callable[..., Any]
    args: tuple[Any, ...]

    def programs(self, model: ModelConfig) -> dict[str, Callable[..., Any]]:
        """Returns implementation -> the program that does the work of all layers with it."""
        return {name: over_layers(model, functools.partial(self.op, implementation=name)) for name in IMPLEMENTATIONS}


def attention_contests(model: ModelConfig, cases: Sequence[Case] = CASES) -> Iterator[Contest]:
    """Yields the attention of each case, with random queries and pages in float32."""
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    shape = (model.num_layers, NUM_PAGES, model.num_kv_heads, PAGE, 2 * model.head_dim)
    kv_pages = jnp.asarray(rng.standard_normal(shape, np.float32))

    def attend(x, layer, kv_pages, work, implementation):
        return paged_attention(x, kv_pages, layer, work, scale=model.head_dim**-0.5, implementation=implementation)

    for case in cases:
        work = jax.tree.map(jnp.asarray, make_work(case))
        q = jnp.asarray(rng.standard_normal((len(work.positions), model.num_heads, model.head_dim), np.float32))
        yield Contest(f"attention: {case.name}", attend, (q, kv_pages, work))


def projection_contests(model: ModelConfig, rows: Sequence[int] = PRODUCTS) -> Iterator[Contest]:
    """Yields a layer's matrix products for each number of rows, with random weights in float32."""
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    d, f, h = model.hidden_size, model.intermediate_size, model.head_dim
    shapes = ((d, (model.num_heads + 2 * model.num_kv_heads) * h), (model.num_heads * h, d), (d, 2 * f), (f, d))
    plain = [jnp.asarray(rng.standard_normal((model.num_layers, *s), np.float32) * s[0] ** -0.5) for s in shapes]
    weights = {"xla": plain, "cpu": [pack(w) for w in plain]}

    def project(x, layer, weights, implementation):
        qkv, o, gate_up, down = (
            functools.partial(linear, w=w, layer=layer, implementation=implementation) for w in weights[implementation]
        )
        x = o(qkv(x)[:, : model.num_heads * h])
        gate, up = jnp.split(gate_up(x), 2, axis=1)
        return down(jax.nn.silu(gate) * up)

    for count in rows:
        x = jnp.asarray(rng.standard_normal((count, d), np.float32))
        yield Contest(f"projections: {count} rows", project, (x, weights))


def adapter_contests(model: ModelConfig, cases: Sequence[tuple[int, int]] = ADAPTED) -> Iterator[Contest]:
    """Yields a layer's LoRA products for each (rows, adapters), with random adapters in float32.

    Every target is taken to be as wide as the model's hidden size.
    """
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    width = model.hidden_size
    a, b = (jnp.asarray(rng.standard_normal((model.num_layers, 8, RANK, width), np.float32)) * 0.1 for _ in "ab")

    def adapt(x, layer, a, b, slots, active, implementation):
        for _ in LORA_TARGETS:
            x = lora(x, a, b, layer, slots, active, implementation=implementation)
        return x

    for rows, adapters in cases:
        slots, active = jnp.arange(rows, dtype=jnp.int32) % adapters + 1, jnp.arange(1, adapters + 1, dtype=jnp.int32)
        x = jnp.asarray(rng.standard_normal((rows, width), np.float32))
        yield Contest(f"adapters: {rows} rows of {adapters} heads, rank {RANK}", adapt, (x, a, b, slots, active))


def run(model_name: str) -> dict[str, Any]:
    """Runs the command: prints the times of every operation.

    Args:
        model_name: a name of MODELS.

    Returns:
        The model's name, and for each operation the milliseconds of every implementation.

    Raises:
        UsageError: jax does not run on a CPU here.
    """
    import jax

    if jax.default_backend() != "cpu":
        raise UsageError("bench.py cpu compares what runs on CPUs; for TPUs see bench.py kernels")
    model = MODELS[model_name]
    print(f"{model_name}, {model.num_layers} layers, float32: ms, and times as fast as {IMPLEMENTATIONS[0]}")
    rows = []
    for contest in (*projection_contests(model), *adapter_contests(model), *attention_contests(model)):
        programs = contest.programs(model)
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for turn in range(ROUNDS + 1):
            for name, program in programs.items():
                begin = time.perf_counter()
                program(*contest.args).block_until_ready()
                if turn > 0:  # the first turn compiles, so it is not counted
                    seconds[name].append(time.perf_counter() - begin)
        ms = {name: float(np.median(some)) * 1e3 for name, some in seconds.items()}
        rows.append({"case": contest.name, **ms})
        ratio = ms[IMPLEMENTATIONS[0]] / ms[IMPLEMENTATIONS[-1]]
        print(f"{contest.name:73}" + "".join(f"{name} {value:7.1f}  " for name, value in ms.items()) + f"{ratio:.1f}x")
    return {"model": model_name, "rows": rows}
