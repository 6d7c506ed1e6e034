"""The soak benchmark against the double: it counts what it should, and notices a wrong answer."""

from __future__ import annotations

import asyncio

from icarus_jax.bench.soak import Soak
from tests.server.served import serving


def soaked(wrong: bool) -> Soak:
    async def go(url: str) -> Soak:
        soak = Soak(url, {"trunk": "", "parrot": ""}, max_tokens=4)
        soak.pairs = [(model, "hello there") for model in ("trunk", "parrot")]
        await soak.answer_alone()
        if wrong:
            soak.right[soak.pairs[0]] += "!"
        assert await soak.saturation(0.3, clients=2) > 0
        await soak.load(1.0, rate=20.0)
        assert await soak.metric('icarus_kv_pages{state="used"}') == 0
        return soak

    with serving() as served:
        return asyncio.run(go(served.url))


def test_answers_are_compared():
    good, bad = soaked(wrong=False), soaked(wrong=True)
    assert good.counts["right"] and not good.counts["wrong"] and not good.counts["error"]
    assert bad.counts["wrong"]
    assert len(good.latencies) == good.counts["right"]
