"""`bench.py serve`: agent sessions against servers, over a sweep of rates and numbers of models."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from icarus_jax.bench import compare, ours
from icarus_jax.bench.client import Server, ServerError
from icarus_jax.bench.drive import Driver
from icarus_jax.bench.peers import DIALECTS
from icarus_jax.errors import UsageError, usage_errors
from icarus_jax.workloads import agents, workload
from icarus_jax.workloads.calls import summarise

OURS = {"shared": "multi.py:{n}", "isolated": "multi.py:{n},isolated"}  # the configs that launch/serve.py is given


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked, once for every system: sessions[i] has the number i.

    vocab_size: of the tokens that prompts are made of.
    """

    sessions: list[workload.Session]
    vocab_size: int
    seed: int
    assign: str
    arrivals: str


def make_plan(config: ConfigDict) -> Plan:
    """The sessions of config.workload, without their models. Raises UsageError."""
    w = config.workload
    if w.name in ("file", "replay") and not Path(w.path).is_file():
        hint = "; config.workload.name=react makes sessions of the same lengths" if w.name == "replay" else ""
        raise UsageError(f"config.workload.path={w.path}: no such file{hint}")
    if w.name == "file":
        with usage_errors("config.workload.path"):
            sessions = workload.load(w.path)
    elif w.name != "replay" and w.name not in agents.GENERATORS:
        raise UsageError(f"config.workload.name: no {w.name!r}; there is replay, file, {', '.join(agents.GENERATORS)}")
    with usage_errors("config.trunk.source"):
        from icarus_jax.weights import sources, tokenizer

        text = tokenizer.load_tokenizer(sources.resolve(config.trunk.source))
    if w.name == "replay":
        with usage_errors("config.workload.path"):
            sessions = agents.replay(w.path, lambda s: text.encode(s, add_special_tokens=False), w.common_len)
    elif w.name in agents.GENERATORS:
        sessions = agents.GENERATORS[w.name](w.sessions, w.seed, w.common_len, w.tool_s)
    fits = lambda turn: turn.prompt_len + turn.output_len <= config.engine.max_model_len  # noqa: E731
    chosen = [session for session in sessions if all(map(fits, session))]
    if not chosen:
        raise UsageError(f"no session of {w.name!r} fits engine.max_model_len={config.engine.max_model_len}")
    if len(chosen) < len(sessions):
        print(f"left out: {len(sessions) - len(chosen)} sessions longer than {config.engine.max_model_len} tokens")
    numbered = [[dataclasses.replace(turn, session=i) for turn in s] for i, s in enumerate(chosen[: w.sessions])]
    return Plan(numbered, len(text), w.seed, w.assign, w.arrivals)


def numbers(text: str, what: str, kind: type) -> list[Any]:
    """Comma-separated numbers of a config. Raises UsageError."""
    with usage_errors(f"config.{what}"):
        return [kind(part) for part in text.split(",")]


async def measure(
    server: Server, peer: str, system: str, names: list[str], plan: Plan, rate: float, mark: int = 0
) -> compare.Run:
    """One run against a server that is up. mark: as Driver's. Raises ServerError, OSError, UsageError."""
    with usage_errors("config.workload"):
        sessions = workload.assign(plan.sessions, names, plan.assign, plan.seed)
        arrivals = workload.arrivals(len(sessions), rate, plan.arrivals, plan.seed)
    driver = Driver(server, DIALECTS[peer], plan.vocab_size, plan.seed, mark)
    await driver.ask([1, 2, 3], names[0], 2)  # the first request may be slow
    driven = await driver.run(sessions, arrivals)
    summary = summarise(driven.calls, arrivals, driven.counters)
    summary |= {"late_s": driven.late_s, "client_cpu": driven.cpu, "output_sha256": driven.digest}
    pages = [list(row) for row in driven.pages]
    return compare.Run(system, len(names), rate, float(arrivals[-1]), summary, pages, driven.complaint)


async def model_names(server: Server, peer: str, count: int) -> list[str]:
    """The first `count` adapters that a server lists after its base model; 0: the base model alone."""
    listed = [model["id"] for model in json.loads(await server.get("/v1/models"))["data"]]
    if DIALECTS[peer].numbered:
        loaded = json.loads(await server.get("/lora-adapters"))
        listed = [listed[0], *(f"adapter{adapter['id']}" for adapter in loaded)]
    if count >= len(listed):
        raise UsageError(f"{count} adapters are wanted; the server lists {', '.join(listed)}")
    return listed[1 : 1 + count] if count else listed[:1]


@contextlib.contextmanager
def _server(config: ConfigDict, system: str, count: int, out: Path) -> Iterator[str]:
    """The URL of a system with `count` models: the one that the config names, or ours, started anew."""
    if config.url:
        yield config.url
        return
    spec = OURS[system].format(n=count) if count else "single.py"
    overrides = {f"engine.{key}": value for key, value in config.engine.items()} | {"trunk.source": config.trunk.source}
    with ours.serving(spec, overrides, out / f"server-{system}-{count}.log") as url:
        yield url


def sweep(config: ConfigDict, plan: Plan, out: Path) -> Iterator[compare.Run]:
    """Every system, number of models and rate. Our own server starts anew for each run, with an empty cache.

    A rate '1.25x' is 1.25 times the sessions/s that the last of the systems ended at the rate before, 'inf'.
    """
    marks = itertools.count()
    peer = config.peer if config.url else "icarus"
    systems = [config.system] if config.url else config.systems.split(",")
    for count in numbers(config.models, "models", int):
        capacity = None
        for text in config.rates.split(","):
            mark = next(marks)
            if text.endswith("x") and capacity is None:
                raise UsageError(f"config.rates={config.rates}: before {text!r} there has to be 'inf'")
            (rate,) = numbers(text.removesuffix("x"), "rates", float)
            if text.endswith("x"):
                rate = float(f"{rate * capacity:.3g}")
            for system in systems[: None if count else 1]:  # without adapters there is nothing to tell them apart
                with _server(config, system, count, out) as url:
                    server = Server(url)
                    try:
                        names = asyncio.run(model_names(server, peer, count))
                        done = asyncio.run(measure(server, peer, system, names, plan, rate, mark))
                    except (ServerError, OSError) as error:
                        raise UsageError(f"{url}: {error}") from error
                yield dataclasses.replace(done, models=count)
            if rate == float("inf"):
                capacity = done.summary["sessions_per_s"]


def write(out: Path, title: str, runs: Sequence[compare.Run]) -> dict[str, Any]:
    """report.json and report.png of the runs so far; returns what the former holds."""
    report: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "ratios": compare.ratios(runs),
        "runs": [run.as_json() for run in runs],
    }
    (out / "report.json").write_text(json.dumps(report, indent=1))
    compare.plot(runs, out / "report.png", title)
    return report


def run(config: ConfigDict) -> dict[str, Any]:
    """The command. Raises UsageError."""
    if config.peer not in DIALECTS:
        raise UsageError(f"config.peer: no {config.peer!r}; there is {', '.join(DIALECTS)}")
    unknown = set(config.systems.split(",")) - set(OURS)
    if unknown and not config.url:
        raise UsageError(f"config.systems: no {', '.join(sorted(unknown))}; there is {', '.join(OURS)}")
    plan = make_plan(config)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    calls = [turn for session in plan.sessions for turn in session]
    print(
        f"{len(plan.sessions)} sessions, {len(calls)} calls, {sum(t.output_len for t in calls)} output tokens, "
        f"{sum(t.prompt_len for t in calls)} prompt tokens\n{compare.HEAD}"
    )
    runs: list[compare.Run] = []
    for done in sweep(config, plan, out):
        runs.append(done)
        print(compare.line(done), flush=True)
        report = write(out, f"{config.workload.name}, {config.workload.assign}", runs)
    print("\n".join(compare.ratio_lines(report["ratios"])))
    print(f"written: {out}/report.json, {out}/report.png")
    return {"ratios": report["ratios"], "report": str(out / "report.json")}
