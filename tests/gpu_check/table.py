"""Part `table` of tests/gpu_check.sh: agents on `shared` heads and on `isolated` ones, measured and simulated.

The paper's table (arXiv 2603.13281): Llama-3.1-8B on one card, ReAct sessions that use N models in turn. Both engines
are in this process, have the same number of pages and the same trunk, and get the same sessions: first all at once,
then at a rate just past what `isolated` completes.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icarus_jax.bench import compare
from icarus_jax.config import EngineConfig
from icarus_jax.engine.engine import Engine
from icarus_jax.models.presets import LLAMA31_8B
from icarus_jax.scheduling.request import Request, SamplingParams, TokenOutput
from icarus_jax.simulator.chips import CHIPS
from icarus_jax.simulator.roofline import Assumptions, Roofline, load_of
from icarus_jax.simulator.run import Simulation, make_models
from icarus_jax.workloads import agents, workload
from icarus_jax.workloads.calls import Call, Counters, summarise
from tests.gpu_check.report import DTYPE, TINY, Report, results_folder
from tests.gpu_check.steps import HEADS, MODEL, RANK, draw_params, make_engine, without_device

NUMBERS = (2,) if TINY else (8, 4, 2)  # of models; the most telling first
SESSIONS = 2 if TINY else 96
PAST = 1.25  # the finite rate, over what `isolated` completes if all sessions start at once
SYSTEMS = ("isolated", "shared")
CONFIG = EngineConfig(
    page_size=16,
    num_pages=64 if TINY else 8192,  # 16 GiB of Llama-3.1-8B's K/V: fewer than all contexts of `isolated` need
    max_num_seqs=1 if TINY else 64,
    max_num_batched_tokens=64 if TINY else 1024,
    max_model_len=512 if TINY else 4096,
    dtype=DTYPE,
    kv_dtype=DTYPE,
)


def sessions_of() -> list[workload.Session]:
    """The sessions, without models; those of the tiny form are cut to two short calls."""
    made = agents.react(SESSIONS, 0, 32 if TINY else agents.INSTRUCTION)
    short = [[dataclasses.replace(turn, output_len=3) for turn in session[:2]] for session in made]
    return short if TINY else made


class Drive:
    """Drives an engine on this thread, as `Simulation` drives the scheduler: one step after the other."""

    def __init__(self, engine: Engine, sessions: Sequence[workload.Session], arrivals: Sequence[float]):
        self._engine, self._sessions = engine, sessions
        self._talks = [workload.Conversation(s[0].session, 0, engine.model_config.vocab_size) for s in sessions]
        self._due = [(at, i, 0) for i, at in enumerate(arrivals)]  # (time, session, turn)
        heapq.heapify(self._due)
        self._needed, self._first_prompt = 0, list[int]()
        self._calls: list[Call] = []
        self._begin = 0.0

    def run(self) -> tuple[list[Call], Counters]:
        """Runs until every session has ended."""
        engine, stats = self._engine, self._engine.stats
        engine.scheduler.pool.clear()
        before = dataclasses.replace(stats)
        self._begin = time.perf_counter()
        while self._due or engine.has_work:
            while self._due and self._due[0][0] <= self._now():
                self._ask(*heapq.heappop(self._due))
            engine.run_inbox()
            if engine.has_work:
                engine.step()
            else:
                time.sleep(max(0.0, self._due[0][0] - self._now()))
        assert len(self._calls) == sum(map(len, self._sessions)), "some calls were not answered"
        names = ("prefill_tokens", "evictions", "preemptions", "steps", "host_seconds", "device_seconds")
        *told, host, device = (getattr(stats, name) - getattr(before, name) for name in names)
        return self._calls, Counters(self._needed, *told, host + device)

    def _now(self) -> float:
        return time.perf_counter() - self._begin

    def _ask(self, at: float, session: int, number: int) -> None:
        turn, talk = self._sessions[session][number], self._talks[session]
        prompt = talk.prompt(turn)
        self._needed += talk.new_tokens
        if number == 0:
            self._needed -= workload.common_prefix(self._first_prompt, prompt)
            self._first_prompt = self._first_prompt or prompt
        reply, first = list[int](), list[float]()

        def take(_: int, output: TokenOutput) -> None:
            first[:] = first or [self._now()]
            reply.extend(output.token_ids)
            if output.finish_reason is None:
                return
            assert len(reply) == turn.output_len, output
            end = self._now()
            self._calls.append(Call(session, number, turn.model, at, first[0], end, len(prompt), len(reply)))
            talk.reply(reply)
            if number + 1 < len(self._sessions[session]):
                wait = self._sessions[session][number + 1].wait_s
                heapq.heappush(self._due, (end + wait, session, number + 1))

        params = SamplingParams(max_tokens=turn.output_len, temperature=0.0, ignore_eos=True)
        self._engine.submit(Request((turn.model,), tuple(prompt), params), take)


def constants(found: Mapping[str, Any]) -> Assumptions:
    """What part `steps` has measured, in the place of what the simulator assumes.

    A step of S sequences takes a + b * S * context seconds: b is reading a token's K/V, and a the weights and the
    overhead. Of the weights, the assumed share of the bandwidth is kept. The FLOPs are those of a prefill.
    """
    rows = {s: found.get(f"llama8b, base, S={s}, overlapped", {}) for s in (1, 8, 64, 128)}
    points = [(s * row["context"], row["ms"] / 1e3) for s, row in rows.items() if "ms" in row]
    per_token, rest = np.polyfit(*np.transpose(points), 1)
    chip, assumed, model = CHIPS["h100"], Assumptions(), LLAMA31_8B
    bare = Roofline(model, chip, 1, RANK, assumed)
    read = bare.weight_bytes - bare.precision.values * model.vocab_size * model.hidden_size  # not the embeddings
    return dataclasses.replace(
        assumed,
        kv_share=float(bare.kv_token_bytes / per_token / chip.bandwidth),
        overhead_s=max(0.0, float(rest) - read / assumed.bandwidth_share / chip.bandwidth),
        flops_share=found["llama8b, prefill"]["tokens_s"] * 2 * read / bare.precision.weights / chip.flops,
    )


def as_run(system: str, models: int, rate: float, arrivals: Sequence[float], calls: Any, counters: Any) -> compare.Run:
    """The figures of a run, without those of single models."""
    summary = summarise(calls, arrivals, counters)
    del summary["models"]
    return compare.Run(system, models, rate, arrivals[-1], summary)


def simulate(system: str, models: int, rate: float, assumed: Assumptions) -> compare.Run:
    """What the simulator says of a run."""
    roofline, heads = Roofline(MODEL, CHIPS["h100"], 1, RANK, assumed), make_models(models, system)
    sessions = workload.assign(sessions_of(), list(heads), "round_robin")
    arrivals = workload.arrivals(SESSIONS, rate, "poisson", 0)
    done = Simulation(sessions, arrivals, heads, CONFIG, lambda plan: roofline.seconds(load_of(plan))).run()
    return as_run(system, models, rate, arrivals, done.calls, done.counters)


def measure(engine: Engine, system: str, models: int, rate: float) -> compare.Run:
    """Runs the sessions on an engine."""
    sessions = workload.assign(sessions_of(), [f"h{i}" for i in range(models)], "round_robin")
    arrivals = workload.arrivals(SESSIONS, rate, "poisson", 0)
    return as_run(system, models, rate, arrivals, *Drive(engine, sessions, arrivals).run())


def warm_up(engine: Engine) -> None:
    """Compiles the programs of steps many at a time, then those samplers that the sessions need, by a rehearsal."""
    runner = engine.runner
    runner._ahead.start(runner.buckets)
    runner._ahead.wait(runner.buckets)
    with without_device(engine):
        measure(engine, "", HEADS, math.inf)


def main() -> int:
    """Fills the table, the largest number of models first."""
    report = Report("table")
    sources = {"simulated": Assumptions()}
    if not TINY:
        with report.item("constants") as row:
            sources["simulated with what steps measured"] = fitted = constants(
                json.loads((results_folder() / "steps.json").read_text())
            )
            row.update(dataclasses.asdict(fitted))
    params, engines = draw_params(MODEL), {}
    for system in SYSTEMS:
        with report.item(f"engine of {system}"):
            engines[system] = make_engine(MODEL, params, CONFIG, system)
            warm_up(engines[system])
    runs: dict[str, list[compare.Run]] = {source: [] for source in ("measured", *sources)}
    print(compare.HEAD)
    for models in NUMBERS:
        rate = math.inf
        for _ in range(2):
            for system in SYSTEMS:
                with report.item(f"N={models}, {system}, rate {rate:.3g}") as row:
                    runs["measured"].append(measure(engines[system], system, models, rate))
                    row.update(runs["measured"][-1].as_json())
                    print(compare.line(runs["measured"][-1]), flush=True)
                for source, assumed in sources.items():
                    runs[source].append(simulate(system, models, rate, assumed))
            with report.item("ratios") as row:
                row.update({source: compare.ratios(some) for source, some in runs.items()})
            rate = PAST * runs["measured"][-2].summary["sessions_per_s"]
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
