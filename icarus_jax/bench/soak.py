"""`bench.py soak`: a server at twice the load that it can carry, while heads are reloaded and clients leave.

First every (prompt, head) pair is answered alone: these are the right answers. Then the rate of answers at saturation
is measured, and requests arrive at twice that rate. Each answer is compared with the one for the same prompt alone;
both are greedy. At the end no page may be held.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from ml_collections import ConfigDict

from icarus_jax.bench import ours
from icarus_jax.workloads.calls import percentiles

MODELS = 8
PROMPTS = 12
WORDS = "river city state border people area capital mountain lake road north south long high"
LEAVING = 0.1  # the share of clients that close the connection after some chunks
RELOAD_SECONDS = 5.0
SATURATION_SECONDS = 30.0


class Soak:
    """One run against a server.

    Attributes:
        right: (model, prompt) -> the text that the model answers alone.
        counts: answers by outcome: right, wrong, left, refused (429), error.
        latencies: seconds of the admitted requests, from sending to the end.
    """

    def __init__(self, url: str, heads: dict[str, str], max_tokens: int, seed: int = 0):
        """Prepares the requests.

        Args:
            url: the server's address.
            heads: name -> the adapter's folder, from which it is reloaded.
            max_tokens: tokens of an answer.
            seed: of the random choices.
        """
        self.url, self.heads, self.max_tokens = url, heads, max_tokens
        self.rng = random.Random(seed)
        words = WORDS.split()
        texts = [" ".join(self.rng.choices(words, k=self.rng.randint(20, 120))) for _ in range(PROMPTS)]
        self.pairs = [(model, text) for text in texts for model in heads]
        self.right: dict[tuple[str, str], str] = {}
        self.counts: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.client = httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None))

    def _body(self, pair: tuple[str, str]) -> dict[str, Any]:
        model, prompt = pair
        return {"model": model, "prompt": prompt, "max_tokens": self.max_tokens, "temperature": 0, "stream": True}

    async def ask(self, pair: tuple[str, str], leave_after: int = 0) -> str | None:
        """Sends one request and reads its stream.

        Args:
            pair: the model and the prompt.
            leave_after: close the connection after this many events; 0: read to the end.

        Returns:
            The text; None if it was refused or has left.
        """
        begin, text, events = time.monotonic(), "", 0
        async with self.client.stream("POST", "/v1/completions", json=self._body(pair)) as answer:
            if answer.status_code == 429:
                self.counts["refused"] += 1
                return None
            if answer.status_code != 200:
                raise RuntimeError(f"status {answer.status_code}: {(await answer.aread())[:300]!r}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                text += event["choices"][0]["text"]
                events += 1
                if leave_after and events >= leave_after:
                    self.counts["left"] += 1
                    return None
        self.latencies.append(time.monotonic() - begin)
        return text

    async def _check(self, pair: tuple[str, str]) -> None:
        leave = self.rng.randint(1, self.max_tokens) if self.rng.random() < LEAVING else 0
        try:
            text = await self.ask(pair, leave)
        except (RuntimeError, httpx.HTTPError) as error:
            self.counts["error"] += 1
            print(f"error: {error!r}", flush=True)
            return
        if text is not None:
            self.counts["right" if text == self.right[pair] else "wrong"] += 1

    async def answer_alone(self) -> None:
        """Asks every pair by itself."""
        for pair in self.pairs:
            text = await self.ask(pair)
            assert text is not None, "a single request was refused"
            self.right[pair] = text
        self.latencies.clear()

    async def saturation(self, seconds: float, clients: int) -> float:
        """Returns the answers a second of `clients` that each ask again as soon as they are answered."""
        end, count = time.monotonic() + seconds, 0

        async def loop() -> None:
            nonlocal count
            while time.monotonic() < end:
                await self.ask(self.rng.choice(self.pairs))
                count += 1

        await asyncio.gather(*(loop() for _ in range(clients)))
        self.latencies.clear()
        self.counts.clear()
        return count / seconds

    async def _reload(self) -> None:
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            name = self.rng.choice(list(self.heads))
            body = {"name": name, "path": self.heads[name], "kv": "shared"}
            answer = await self.client.post("/v1/load_head", json=body)
            self.counts["reloads" if answer.status_code == 200 else "failed reloads"] += 1

    async def load(self, seconds: float, rate: float) -> None:
        """Sends requests at `rate` a second, at random times, while heads are reloaded, and waits for all answers."""
        reloads = asyncio.create_task(self._reload())
        tasks: set[asyncio.Task] = set()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await asyncio.sleep(self.rng.expovariate(rate))
            task = asyncio.create_task(self._check(self.rng.choice(self.pairs)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        reloads.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reloads

    async def metric(self, line: str) -> float:
        """Returns a value of /metrics."""
        found = re.search(f"^{re.escape(line)} (.*)$", (await self.client.get("/metrics")).text, re.M)
        return float(found[1]) if found else 0.0


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


async def _watch(soak: Soak, pid: int, memory: list[int]) -> None:
    """Writes down the server's memory, and prints what was answered, every minute."""
    begin = time.monotonic()
    while True:
        memory.append(_resident_bytes(pid))
        print(f"{time.monotonic() - begin:.0f} s: {dict(soak.counts)}, {memory[-1] >> 20} MiB", flush=True)
        if soak.latencies:
            print(f"the last 200 answers: {percentiles(soak.latencies[-200:])}", flush=True)
        await asyncio.sleep(60.0)


async def _run(soak: Soak, config: ConfigDict, pid: int) -> dict[str, Any]:
    await soak.answer_alone()
    rate = await soak.saturation(SATURATION_SECONDS, config.clients)
    memory: list[int] = []
    watch = asyncio.create_task(_watch(soak, pid, memory))
    await soak.load(config.seconds, 2 * rate)
    watch.cancel()
    used = await soak.metric('icarus_kv_pages{state="used"}')
    asked = sum(soak.counts[kind] for kind in ("right", "wrong", "left", "refused", "error"))
    return {
        "seconds": config.seconds,
        "saturation_per_s": rate,
        "offered_per_s": 2 * rate,
        "answered_per_s": (soak.counts["right"] + soak.counts["wrong"]) / config.seconds,
        "asked": asked,
        **soak.counts,
        "refused_share": soak.counts["refused"] / max(1, asked),
        "latency_s": percentiles(soak.latencies),
        "memory_mib": [size >> 20 for size in memory],
        "pages_used_at_the_end": used,
    }


def run(config: ConfigDict) -> dict[str, Any]:
    """Starts a server with eight heads, runs the soak, and returns the figures.

    Args:
        config: a config of configs/soak.py.

    Raises:
        UsageError: the server does not start.
    """
    from icarus_jax.weights import checkpoint, peft

    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint.open_trunk(config.trunk.source).config
        heads = {f"h{i}": f"{folder}/h{i}" for i in range(MODELS)}
        for i, path in enumerate(heads.values()):
            adapter = peft.random_adapter(i, 8, model)
            peft.save_adapter(path, adapter, base_model_name=config.trunk.source, alpha=adapter.rank)
        overrides = {
            "server.head_folders": folder,
            "engine.max_loras": MODELS,
            "engine.max_lora_rank": 16,
            **{f"engine.{key}": value for key, value in config.engine.items()},
            **{f"server.{key}": value for key, value in config.server.items()},
        }
        flags = [f"--heads={','.join(f'{name}={path}' for name, path in heads.items())}"]
        with ours.serving("single.py", overrides, Path(config.log), flags) as server:
            return asyncio.run(_run(Soak(server.url, heads, config.max_tokens), config, server.pid))
