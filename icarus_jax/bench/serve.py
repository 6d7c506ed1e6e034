"""`bench.py serve`: runs agent sessions against servers, at several rates and with several numbers of models."""

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

OURS = {"shared": "multi.py:{n}", "isolated": "multi.py:{n},isolated"}  # system -> the config for launch/serve.py


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every system is asked.

    Attributes:
        sessions: the sessions, without models; sessions[i] has the number i.
        vocab_size: the token ids of prompts are below this number.
        seed: the seed of everything that is random.
        assign: how models are assigned to turns; see `workload.assign`.
        arrivals: how the starts of sessions are distributed; see `workload.arrivals`.
    """

    sessions: list[workload.Session]
    vocab_size: int
    seed: int
    assign: str
    arrivals: str


def make_plan(config: ConfigDict) -> Plan:
    """Makes the plan of config.workload. Sessions that do not fit the engine's context are left out.

    Args:
        config: a config of configs/bench.py.

    Returns:
        The plan, with at most config.workload.sessions sessions.

    Raises:
        UsageError: the workload or the tokenizer cannot be read, or no session fits.
    """
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
    limit = config.engine.max_model_len
    chosen = [session for session in sessions if all(turn.prompt_len + turn.output_len <= limit for turn in session)]
    if not chosen:
        raise UsageError(f"no session of {w.name!r} fits engine.max_model_len={config.engine.max_model_len}")
    if len(chosen) < len(sessions):
        print(f"left out: {len(sessions) - len(chosen)} sessions longer than {config.engine.max_model_len} tokens")
    numbered = [[dataclasses.replace(turn, session=i) for turn in s] for i, s in enumerate(chosen[: w.sessions])]
    return Plan(numbered, len(text), w.seed, w.assign, w.arrivals)


def numbers(text: str, what: str, kind: type) -> list[Any]:
    """Reads comma-separated numbers of a config.

    Args:
        text: the numbers.
        what: the config's key, for error messages.
        kind: int or float.

    Returns:
        The numbers.

    Raises:
        UsageError: a part of the text is no number.
    """
    with usage_errors(f"config.{what}"):
        return [kind(part) for part in text.split(",")]


async def measure(
    server: Server, peer: str, system: str, names: list[str], plan: Plan, rate: float, mark: int = 0
) -> compare.Run:
    """Runs a plan against a server that is running.

    Args:
        server: the server.
        peer: the kind of server: a name of DIALECTS.
        system: the system's name in the report.
        names: the names of the models that the turns are assigned to.
        plan: the sessions.
        rate: sessions per second; may be infinite.
        mark: the first token of every prompt; see `Driver`.

    Returns:
        The results.

    Raises:
        UsageError: the plan's options are wrong.
        ServerError: a request failed.
        OSError: a connection failed.
    """
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
    """Asks a server for the names of its models.

    Args:
        server: the server.
        peer: the kind of server: a name of DIALECTS.
        count: how many adapters are wanted.

    Returns:
        The names of the first `count` adapters that the server lists; if `count` is 0, the name of its base model.

    Raises:
        UsageError: the server lists fewer adapters.
        ServerError: a request failed.
        OSError: the connection failed.
    """
    listed = [model["id"] for model in json.loads(await server.get("/v1/models"))["data"]]
    if DIALECTS[peer].numbered:
        loaded = json.loads(await server.get("/lora-adapters"))
        listed = [listed[0], *(f"adapter{adapter['id']}" for adapter in loaded)]
    if count >= len(listed):
        raise UsageError(f"{count} adapters are wanted; the server lists {', '.join(listed)}")
    return listed[1 : 1 + count] if count else listed[:1]


@contextlib.contextmanager
def _server(config: ConfigDict, system: str, count: int, out: Path) -> Iterator[str]:
    """Yields the URL of the server that the config names, or of our own, started with `count` models."""
    if config.url:
        yield config.url
        return
    spec = OURS[system].format(n=count) if count else "single.py"
    overrides = {f"engine.{key}": value for key, value in config.engine.items()} | {"trunk.source": config.trunk.source}
    with ours.serving(spec, overrides, out / f"server-{system}-{count}.log") as server:
        yield server.url


def sweep(config: ConfigDict, plan: Plan, out: Path) -> Iterator[compare.Run]:
    """Runs a plan with every number of models, at every rate, on every system.

    Our own server is started anew for each run, with an empty cache. A rate '1.25x' is 1.25 times the sessions per
    second that the last of the systems completed at the rate 'inf', which has to be listed before it.

    Args:
        config: a config of configs/bench.py.
        plan: the sessions.
        out: the folder for the servers' logs.

    Yields:
        The results of each run.

    Raises:
        UsageError: the config is wrong, or a server failed.
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
            for system in systems[: None if count else 1]:  # without adapters the systems do not differ
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
    """Writes report.json and report.png.

    Args:
        out: the folder to write to.
        title: the title of the plot.
        runs: the runs so far.

    Returns:
        The content of report.json.
    """
    report: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "ratios": compare.ratios(runs),
        "runs": [run.as_json() for run in runs],
    }
    (out / "report.json").write_text(json.dumps(report, indent=1))
    compare.plot(runs, out / "report.png", title)
    return report


def run(config: ConfigDict) -> dict[str, Any]:
    """Runs the command: prints a row for each run and the ratios, and writes the report after each run.

    Args:
        config: a config of configs/bench.py.

    Returns:
        The ratios, and the path of the report.

    Raises:
        UsageError: the config is wrong, or a server failed.
    """
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
