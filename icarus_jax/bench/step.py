"""`bench.py step`: ms of a decode step and tokens/s of prefill, for the trunk (`base`) and its heads (`shared`).

Against the floor measured in the same run: the bytes of weights and K/V that a step must read, over this machine's read
bandwidth, the best of before and after each size. The kinds take turns, and the best round's median counts: shared
machines are slowed down for seconds at a time. Also whether the KV pages are updated in place: the program's temporary
bytes, and a step's time with a pool four times the size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax import cli
from icarus_jax.scheduling.request import SamplingParams

if TYPE_CHECKING:
    from icarus_jax.engine.engine import Engine

ROUNDS = 2
WARM = 2  # untimed steps of each round


@dataclasses.dataclass
class StepResult:
    """Medians over the timed steps; *_ms in milliseconds, prefill in tokens/s, bandwidth in GB/s."""

    kind: str
    sequences: int
    step_ms: float
    floor_ms: float
    over_floor: float
    host_share: float
    prefill: float
    bandwidth: float


def read_bandwidth(size: int = 1 << 29, repeats: int = 7) -> float:
    """Bytes/s at which the memory that the engine computes from is read, past all caches; the best of several tries."""
    import jax

    read = _cores_read(size) if jax.default_backend() == "cpu" else _device_reads(size)
    best = 0.0
    for _ in range(repeats + 1):  # the first compiles, and is no faster
        begin = time.perf_counter()
        num_bytes = read()
        best = max(best, num_bytes / (time.perf_counter() - begin))
    return best


def _cores_read(size: int) -> Callable[[], int]:
    """All cores together read `size` bytes, once."""
    data = np.ones(size // 4, np.float32)
    parts = np.array_split(data, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(len(parts))  # its threads end with the function returned

    def read() -> int:
        list(pool.map(np.max, parts))
        return data.nbytes

    return read


def _device_reads(size: int, times: int = 16) -> Callable[[], int]:
    """The first device reads `size` bytes, so often that the calls themselves do not count."""
    import jax
    import jax.numpy as jnp

    data = jnp.ones(size // 4, jnp.float32)
    largest = jax.jit(jnp.max)

    def read() -> int:
        jax.block_until_ready([largest(data) for _ in range(times)])
        return data.nbytes * times

    return read


def floor_bytes(engine: Engine, names: Sequence[str], context: int) -> int:
    """Bytes that one decode step must read: the trunk once, each sequence's K/V once, its models' adapters once."""
    import jax

    model = engine.model_config
    trunk, bank = (sum(x.nbytes for x in jax.tree.leaves(part)) for part in engine.runner.weights)
    adapters = len({name for name in names if engine.models[name].kind != "base"})
    weights = trunk + bank * adapters // max(1, engine.runner.num_slots)
    kv = 2 * model.num_layers * model.num_kv_heads * model.head_dim * engine.runner.kv_pages.dtype.itemsize
    return weights + len(names) * context * kv


class Decoding:
    """A batch of sequences, one a name, past its prefill: `time_steps` runs decode steps of it.

    prefill: tokens/s at which the random prompts of `context` tokens were computed.
    """

    def __init__(self, engine: Engine, names: list[str], context: int, steps: int):
        from icarus_jax.scheduling.request import Request

        rng = np.random.default_rng(0)
        # those that are prefilled first decode while the others are prefilled
        room = steps + 2 * len(names)
        params = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True)
        self.engine, self.ids = engine, list[int]()
        engine.scheduler.pool.clear()
        for name in names:
            prompt = tuple(rng.integers(0, engine.model_config.vocab_size, context).tolist())
            self.ids += engine.submit(Request((name,), prompt, params), lambda *_: None)
        engine.run_inbox()
        begin = time.perf_counter()
        scheduler = engine.scheduler
        while scheduler.waiting or any(not seq.num_output for seq in scheduler.running):
            engine.step()
        self.prefill = context * len(names) / (time.perf_counter() - begin)

    def time_steps(self, steps: int) -> np.ndarray:
        """Seconds of each of `steps` decode steps."""
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - begin)
        return np.array(times)

    def close(self) -> None:
        self.engine.abort(self.ids)
        self.engine.run_inbox()


def measure(engine: Engine, kinds: dict[str, list[str]], context: int, steps: int) -> dict[str, tuple]:
    """Times each kind in turn, ROUNDS times over, so that a disturbance of the machine falls on all of them.

    Returns kind -> (ms of a step: the best round's median; share of host work; prefill tokens/s, the best).
    """
    found: dict[str, list] = {kind: [] for kind in kinds}
    for turn in range(ROUNDS + 1):  # the first compiles and does not count
        for kind, names in kinds.items():
            batch = Decoding(engine, names, context - steps // 2, steps + WARM)
            batch.time_steps(WARM)
            host = engine.stats.host_seconds
            times = batch.time_steps(steps)
            share = (engine.stats.host_seconds - host) / times.sum()
            batch.close()
            if turn:
                found[kind].append((float(np.median(times)) * 1e3, share, batch.prefill))
    return {
        kind: (min(r[0] for r in rounds), float(np.median([r[1] for r in rounds])), max(r[2] for r in rounds))
        for kind, rounds in found.items()
    }


def step_table(engine: Engine, sizes: Sequence[int], context: int, steps: int) -> Iterator[StepResult]:
    trunk, *heads = engine.models
    for size in sizes:
        kinds = {"base": [trunk] * size}
        if heads:
            kinds[engine.models[heads[0]].kind] = [heads[i % len(heads)] for i in range(size)]
        before = read_bandwidth()
        found = measure(engine, kinds, context, steps)
        bandwidth = max(before, read_bandwidth())
        for kind, (step, host, prefill) in found.items():
            floor = floor_bytes(engine, kinds[kind], context) / bandwidth * 1e3
            yield StepResult(kind, size, step, floor, step / floor, host, prefill, bandwidth / 1e9)


def in_place(build: Callable[[int], contextlib.AbstractContextManager[Engine]], pages: int) -> dict[str, float]:
    """Temporary bytes of a decode program against the pool's, and the step's time for a pool and one of four times."""
    result = {}
    for factor in (1, 4):
        with build(pages * factor) as engine:
            trunk = next(iter(engine.models))
            result[f"step_ms_pool_x{factor}"] = measure(engine, {"base": [trunk]}, 128, 10)["base"][0]
            if factor == 1:
                result["temp_bytes"], result["pool_bytes"] = engine.runner.temporary_bytes()
    return result


def run(config: ConfigDict, sizes: Sequence[int], context: int, steps: int) -> dict:
    """The command. sizes: sequences of a batch; context: tokens of each; steps: those timed in each round."""
    with config.unlocked():
        config.engine.max_num_seqs = max(sizes)
        config.engine.max_model_len = max(config.engine.max_model_len, context + 128)
        need = max(sizes) * -(-(context + 128) // config.engine.page_size)
        config.engine.num_pages = max(config.engine.num_pages, need)
    print(f"context {context}")
    print(
        f"{'kind':10}{'S':>4}{'step ms':>10}{'floor ms':>10}{'x floor':>9}{'host %':>8}{'prefill tok/s':>15}"
        f"{'read GB/s':>11}"
    )
    engine = cli.build(config).engine
    results = []
    bar = tqdm(step_table(engine, sizes, context, steps), total=2 * len(sizes), disable=None, leave=False)
    for r in bar:
        results.append(r)
        tqdm.write(
            f"{r.kind:10}{r.sequences:>4}{r.step_ms:>10.1f}{r.floor_ms:>10.1f}{r.over_floor:>9.2f}"
            f"{100 * r.host_share:>8.1f}{r.prefill:>15.0f}{r.bandwidth:>11.1f}"
        )
    del engine

    @contextlib.contextmanager
    def build(pages: int) -> Iterator[Engine]:
        with config.unlocked():
            config.engine.num_pages = pages
        yield cli.build(config).engine

    place = in_place(build, need)
    print(
        f"in place: {place['temp_bytes'] / 2**20:.1f} MiB of temporaries beside a pool of "
        f"{place['pool_bytes'] / 2**20:.0f} MiB; step {place['step_ms_pool_x1']:.1f} ms, with four times the pool "
        f"{place['step_ms_pool_x4']:.1f} ms"
    )
    rows = [dataclasses.asdict(r) for r in results]
    return {"context": context, "rows": rows, "in_place": place}
