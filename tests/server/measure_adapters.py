"""Thousands of adapters behind a few slots: python -m tests.server.measure_adapters [--adapters=2000 --slots=16 ..].

Ordinary LoRA adapters of rank 8 on a tiny trunk lie in a folder, and launch/serve.py resolves names in it. Clients ask
for them by a Zipf law. Printed as one line of JSON: failures, answers of one model to one prompt that were not alike,
latencies, and how often a request found its adapter in a slot or in the host's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import re
import tempfile
import time

import httpx
import numpy as np

from icarus_jax.bench.ours import serving
from icarus_jax.weights.checkpoint import open_trunk
from icarus_jax.weights.peft import random_adapter, save_adapter
from tests.tiny import tiny_model

ZIPF = 1.0  # the n-th most popular adapter is asked for n ** -ZIPF times as often as the first


def write_adapters(trunk: str, folder: pathlib.Path, count: int) -> list[str]:
    """Writes random adapters; returns their names."""
    config = open_trunk(trunk, "float32").config
    names = [f"team{i % 20}/head{i}" for i in range(count)]
    for i, name in enumerate(names):
        save_adapter(str(folder / name), random_adapter(i, 8, config), base_model_name="tiny", alpha=8)
        file = folder / name / "adapter_config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "icarus"}))
    return names


class Clients:
    """Several clients that each ask again as soon as they are answered."""

    def __init__(self, url: str, names: list[str]):
        self._http = httpx.AsyncClient(base_url=url, timeout=600)
        self._names = names
        self._said: dict[str, str] = {}
        self.first: list[float] = []  # seconds of the first request for a name
        self.later: list[float] = []
        self.failures: list[str] = []
        self.unlike = 0

    async def ask(self, name: str) -> None:
        begin, first = time.monotonic(), name not in self._said
        said = self._said.setdefault(name, "")
        body = {"model": name, "prompt": "Say something.", "max_tokens": 8, "temperature": 0}
        answer = await self._http.post("/v1/completions", json=body)
        (self.first if first else self.later).append(time.monotonic() - begin)
        if answer.status_code != 200:
            self.failures.append(answer.text[:200])
            return
        text = answer.json()["choices"][0]["text"]
        self.unlike += bool(said) and said != text
        self._said[name] = text

    async def run(self, asked: list[int], clients: int) -> float:
        """Asks for adapters by number; returns the seconds it took."""
        waiting = iter(asked)

        async def client() -> None:
            for i in waiting:
                await self.ask(self._names[i])

        begin = time.monotonic()
        await asyncio.gather(*(client() for _ in range(clients)))
        return time.monotonic() - begin

    async def metrics(self) -> dict[str, float]:
        text = (await self._http.get("/metrics")).text
        return {name: float(value) for name, value in re.findall(r"^(icarus_\w+) (\S+)$", text, re.M)}


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}_ms": round(1000 * float(np.percentile(seconds, q)), 1) for q in (50, 99)} | {"n": len(seconds)}


async def _measure(url: str, names: list[str], requests: int, clients: int) -> dict:
    popularity = np.arange(1, len(names) + 1) ** -ZIPF
    asked = np.random.default_rng(0).choice(len(names), requests, p=popularity / popularity.sum())
    people = Clients(url, names)
    for _ in range(20):  # the server's first requests are slow
        await people.ask("tiny")
    people.later.clear(), people.first.clear()
    before = await people.metrics()
    seconds = await people.run(asked.tolist(), clients)
    after = await people.metrics()
    counted = {name: after[f"icarus_{name}_total"] - before[f"icarus_{name}_total"] for name in COUNTERS}
    return {
        "failures": len(people.failures),
        "failed_with": people.failures[:1],
        "unlike": people.unlike,
        "requests_per_s": round(requests / seconds, 1),
        "first_use": _milliseconds(people.first),
        "later": _milliseconds(people.later),
        "slot_hit_rate": round(1 - counted["slot_loads"] / requests, 4),
        "host_hit_rate": round(1 - counted["head_loads"] / requests, 4),
        **counted,
    }


COUNTERS = ("head_loads", "head_unloads", "slot_loads", "slot_evictions")


def measure(folder: pathlib.Path, adapters: int, requests: int, slots: int, hosted: int, clients: int) -> dict:
    """Writes the adapters, starts a server, and asks."""
    trunk = tiny_model("llama", folder)
    begin = time.monotonic()
    names = write_adapters(trunk, folder / "adapters", adapters)
    print(f"{adapters} adapters written in {time.monotonic() - begin:.0f} s", flush=True)
    overrides = {
        "trunk.source": trunk,
        "trunk.name": "tiny",
        "engine.max_loras": slots,
        "engine.max_lora_rank": 8,
        "engine.writer_adapters": True,
        "engine.max_model_len": 128,
        "engine.max_num_seqs": 16,
        "engine.num_pages": 512,
        "server.adapter_resolver": folder / "adapters",
        "server.max_cpu_loras": hosted,
        "server.access_log": False,
    }
    with serving("single.py", overrides, folder / "server.log") as server:
        return asyncio.run(_measure(server.url, names, requests, clients))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    options = {"adapters": 2000, "requests": 10_000, "slots": 16, "hosted": 256, "clients": 8}
    for option, default in options.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    with tempfile.TemporaryDirectory() as temp:
        print(json.dumps(measure(pathlib.Path(temp), **vars(parser.parse_args()))))
