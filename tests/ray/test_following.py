"""How replicas follow changes of heads, and what the front makes of their answers. Neither needs a cluster."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from icarus_jax.on_ray import front
from icarus_jax.on_ray.asked import Asked
from icarus_jax.on_ray.engine_replica import Whole
from icarus_jax.on_ray.head_log import LOAD, HeadChange, HeadLog
from icarus_jax.on_ray.replica import Replica


class Following(Replica):
    """A replica without an engine; loading a head takes until it may."""

    def __init__(self, log: HeadLog):
        call = lambda name: SimpleNamespace(remote=lambda *args: asyncio.sleep(0, getattr(log, name)(*args)))  # noqa: E731
        self._head_log = SimpleNamespace(since=call("since"), add=call("add"))
        self._heads, self._changing = 0, asyncio.Lock()
        self.loaded, self.may = [], asyncio.Event()

    async def _carry_out(self, change: HeadChange) -> str:
        await self.may.wait()
        self.loaded.append(change.name)
        return ""


def test_a_replica_has_followed_once_the_heads_are_loaded():
    """The second request found the version reached, and the head not there; if the first client went, it never came."""

    async def run() -> None:
        log = HeadLog()
        for name in "cd":
            version = log.add(HeadChange(name, LOAD, b"{}"))
        following = Following(log)
        first, second = (asyncio.create_task(following.follow_heads(version)) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.sleep(0.05)
        assert first.cancelled() and not second.done() and not following.loaded
        following.may.set()
        assert await second == [] and following.loaded == ["c", "d"]
        assert await following.follow_heads(version) == [] and len(following.loaded) == 2

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/v1/park_session", "/v1/release_session"])
def test_a_session_is_parked_once_no_replica_has_failed_to(path, monkeypatch):
    """The one that it moved to holds its pages still, while the one before has parked them."""
    said = {"/v1/park_session": {"parked": True}, "/v1/release_session": {"released": True}}[path]
    answers = [Whole(name, 200, [], json.dumps(body).encode()) for name, body in (("a", {}), ("b", said))]
    answers.append(Whole("c", 503, [], b'{"error": {}}'))

    async def results(deployment, asked):
        return answers if deployment == "replicas" else []

    monkeypatch.setattr(front, "_results_of", results)
    ours = front.Front.__new__(front.Front)
    ours._replicas, ours._prefill = "replicas", None
    found = asyncio.run(ours._from_all(Asked({"path": path}, b"")))
    assert found.replica == ("c" if "park" in path else "b")
