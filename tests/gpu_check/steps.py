"""Part `steps` of tests/gpu_check.sh: decode steps of the engine, beside the bytes that they have to read.

Weights are random and drawn on the device, and so is the K/V of the prompts: the engine is made to believe that it has
computed them. Everything else is the engine as it serves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from icarus_jax.bench.floor import floor_bytes, read_bandwidth
from icarus_jax.bench.step import Decoding
from icarus_jax.config import EngineConfig, HeadConfig, ModelConfig
from icarus_jax.engine.buckets import Bucket
from icarus_jax.engine.engine import Engine
from icarus_jax.models.presets import LLAMA31_8B, SMOLLM2_135M
from icarus_jax.weights import peft
from icarus_jax.weights.params import param_shapes
from tests.gpu_check.report import DTYPE, TINY, Report, results_folder

HEADS, RANK = 8, 16
MODEL = ModelConfig("llama", 256, 64, 128, 2, 4, 2, 16) if TINY else LLAMA31_8B
CONTEXT, STEPS, WARM = (32, 3, 2) if TINY else (2048, 24, 4)
ROUNDS = 2
# model -> its sizes, and the batch sizes, the most telling first
MODELS = {"tiny": (MODEL, (1,))} if TINY else {"llama8b": (MODEL, (64, 128, 8, 1)), "smollm2": (SMOLLM2_135M, (32, 1))}


class Drawn:
    """A random weight, drawn on the device when it is first placed, and kept for other engines. Norms are ones."""

    def __init__(self, name: str, shape: tuple[int, ...]):
        self.name, self.shape = name, shape
        self._array: jax.Array | None = None

    def restore(self, sharding: Any, dtype: Any) -> jax.Array:
        """Places the weight; see `models.sharding.Restorable`."""
        if self._array is None:
            self._array = jax.jit(self._draw, static_argnums=0, out_shardings=sharding)(dtype)
        return self._array

    def _draw(self, dtype: Any) -> jax.Array:
        if self.name.endswith("norm"):
            return jnp.ones(self.shape, dtype)
        key = jax.random.key(sum(self.name.encode()))
        if len(self.shape) == 2:  # a table of embeddings
            return jax.random.normal(key, self.shape, dtype) * 0.02
        draw = functools.partial(jax.random.normal, shape=self.shape[1:], dtype=dtype)
        layers = jax.random.split(key, self.shape[0])  # one by one, because random bits take more room than weights
        return lax.map(lambda key: draw(key) * self.shape[1] ** -0.5, layers)


def draw_params(model: ModelConfig) -> Mapping[str, Any]:
    """The parameters of a model, none of them drawn yet."""
    return {name: Drawn(name, shape) for name, shape in param_shapes(model).items()}


def make_engine(model: ModelConfig, params: Mapping[str, Any], config: EngineConfig, kind: str) -> Engine:
    """An engine with a trunk and HEADS heads of a kind, h0, h1, ... They differ in name alone."""
    weights = peft.random_adapter(0, RANK, model).weights
    heads = {f"h{i}": (HeadConfig(f"h{i}", "random:0", kind), weights) for i in range(HEADS)}
    return Engine.create(config, model, params, heads)


def step_by_step(engine: Engine) -> Engine:
    """An engine on the same runner that does not overlap steps."""
    single = Engine(engine.runner, "trunk", dataclasses.replace(engine.config, async_scheduling=False), ())
    weights = peft.random_adapter(0, RANK, engine.model_config).weights
    for head in list(engine.models)[1:]:
        single.load_head(HeadConfig(head, "random:0"), weights)
    return single


@functools.partial(jax.jit, donate_argnums=0)
def fill(kv_pages: jax.Array) -> jax.Array:
    """Random numbers in all pages, in place."""

    def layer(i: jax.Array, kv: jax.Array) -> jax.Array:
        return kv.at[i].set(jax.random.normal(jax.random.fold_in(jax.random.key(0), i), kv.shape[1:], kv.dtype))

    return lax.fori_loop(0, len(kv_pages), layer, kv_pages)


@contextlib.contextmanager
def without_device(engine: Engine) -> Iterator[None]:
    """While it is entered, the forward programs are skipped: logits are zeros, and K/V is what lies in the pages."""

    def forward(bucket: Bucket, _weights: Any, kv_pages: jax.Array, *_: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((bucket.logits, engine.model_config.vocab_size)), kv_pages

    runner = engine.runner
    with (
        mock.patch.object(runner._ahead, "get", lambda key: None),
        mock.patch.object(runner._programs, "forward", forward),
    ):
        yield


def start(engine: Engine, names: list[str]) -> Decoding:
    """A batch that decodes, one sequence for each name of a model. Its prompts are not computed."""
    with without_device(engine):
        return Decoding(engine, names, CONTEXT - ROUNDS * STEPS // 2, ROUNDS * STEPS + WARM + STEPS)


def decode(engine: Engine, names: list[str]) -> dict[str, float]:
    """The figures of a decode step: the better of two rounds' medians."""
    batch, bandwidth = start(engine, names), read_bandwidth()
    batch.time_steps(WARM)  # compiles
    rounds = []
    for _ in range(ROUNDS):
        waited = engine.stats.host_seconds
        times = batch.time_steps(STEPS)
        # The waiting is an upper bound, and begins before the first of these steps.
        share = min(1.0, float((engine.stats.host_seconds - waited) / times.sum()))
        rounds.append((float(np.median(times)) * 1e3, share))
    context = round(np.mean([len(seq.tokens) for seq in engine.scheduler.running]) - STEPS)
    batch.close()
    bandwidth = max(bandwidth, read_bandwidth())
    (ms, waiting), floor = min(rounds), floor_bytes(engine, names, context) / bandwidth * 1e3
    return {
        "ms": round(ms, 3),
        "floor_ms": round(floor, 3),
        "over_floor": round(ms / floor, 3),
        "waiting_share": round(waiting, 3),
        "read_gb_s": round(bandwidth / 1e9),
        "context": context,
    }


def profile(engine: Engine, names: list[str]) -> dict[str, int]:
    """Writes a profile of four steps beside the report, and returns the sizes of its files."""
    batch = start(engine, names)
    batch.time_steps(WARM)
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            batch.time_steps(4)
        for suffix in ("xplane.pb", "trace.json.gz"):
            for file in Path(folder).rglob(f"*.{suffix}"):
                shutil.copy(file, results_folder() / f"profile.{suffix}")
                sizes[suffix] = file.stat().st_size
    batch.close()
    return sizes


def prefill(engine: Engine) -> float:
    """Prompt tokens computed per second: one prompt, in one step. The first run compiles."""
    best = 0.0
    for _ in range(3):
        batch = Decoding(engine, ["trunk"], CONTEXT, STEPS)
        best = max(best, batch.prefill)
        batch.close()
    return round(best)


def measure_model(report: Report, name: str, model: ModelConfig, sizes: tuple[int, ...]) -> None:
    """Adds the figures of a model: overlapped and step by step, the trunk and its heads."""
    page, length = (16, 128) if TINY else (64, CONTEXT + 384)
    config = EngineConfig(
        page_size=page,
        num_pages=max(sizes) * -(-length // page),
        max_num_seqs=max(sizes),
        max_num_batched_tokens=128 if TINY else 16384,  # prompts that nobody computes
        max_model_len=length,
        dtype=DTYPE,
        kv_dtype=DTYPE,
    )
    engine = make_engine(model, draw_params(model), config, "shared")
    engine.runner.kv_pages = fill(engine.runner.kv_pages)
    engines = {"overlapped": engine, "step by step": step_by_step(engine)}
    heads = list(engine.models)[1:]
    for i, size in enumerate(sizes):
        kinds = {"base": ["trunk"] * size, "shared": [heads[i % HEADS] for i in range(size)]}
        for how, one in engines.items():
            for kind, names in kinds.items():
                with report.item(f"{name}, {kind}, S={size}, {how}") as row:
                    row.update(decode(one, names))
            if i == 0 and one is engine and model is MODEL:
                with report.item(f"profile of {name}, shared, S={size}") as row:
                    row.update(profile(one, kinds["shared"]))
    with report.item(f"{name}, prefill") as row:
        row["tokens_s"] = prefill(engine)


def main() -> int:
    """Measures every model."""
    report = Report("steps")
    for name, (model, sizes) in MODELS.items():
        with report.item(f"{name}, all"):
            measure_model(report, name, model, sizes)
        gc.collect()  # the weights of the one before
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
