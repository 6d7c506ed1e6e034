"""The queue of grammars: equal ones are compiled once, too many are refused, and who gives up disturbs nobody."""

from __future__ import annotations

import asyncio
import threading

import pytest

from icarus_jax.errors import RequestError
from icarus_jax.grammar import compile_queue
from icarus_jax.grammar.compile_queue import CompileQueue, TooManyGrammars
from icarus_jax.grammar.compiler import TRIALS, Compiler
from icarus_jax.grammar.spec import GrammarSpec
from tests.grammar.following import accepts, make_compiler


def choice(text: str, field: str = "f") -> GrammarSpec:
    return GrammarSpec.choice([text], field)


class Held(Compiler):
    """A compiler that notes what it compiles, and waits for `go`."""

    def __init__(self):
        made = make_compiler()
        super().__init__(made._json, made._vocab_size, made._eos_ids)
        self.compiled: list[str] = []
        self.go = threading.Event()

    def _compiled(self, spec):
        self.compiled.append(spec.text)
        assert self.go.wait(60)
        return super()._compiled(spec)


def test_equal_grammars_are_compiled_once():
    compiler = Held()

    async def ask() -> None:
        queue = CompileQueue(compiler)
        waiting = [asyncio.ensure_future(queue.compile(choice("a"))) for _ in range(5)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # its client has gone
        compiler.go.set()
        first, *grammars = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(first, asyncio.CancelledError) and len(set(map(id, grammars))) == 1
        assert accepts(grammars[0], "a") and await queue.compile(choice("a", "g")) is grammars[0]
        assert compiler.compiled == ["a"]

    asyncio.run(ask())


def test_there_is_room_for_a_few_only(monkeypatch):
    monkeypatch.setattr(compile_queue, "MOST", 3)
    compiler = Held()

    async def ask() -> None:
        queue = CompileQueue(compiler)
        waiting = [asyncio.ensure_future(queue.compile(choice(text))) for text in "abc"]
        await asyncio.sleep(0)
        with pytest.raises(TooManyGrammars, match=r"too many grammars wait .* try again in 2 s"):
            await queue.compile(choice("d"))
        waiting.append(asyncio.ensure_future(queue.compile(choice("a"))))  # that one waits already
        compiler.go.set()
        assert len(await asyncio.gather(*waiting)) == 4
        assert accepts(await queue.compile(choice("d")), "d")  # there is room again

    asyncio.run(ask())


def test_a_tenant_has_a_share_of_the_room(monkeypatch):
    monkeypatch.setattr(compile_queue, "MOST_OF_TENANT", 2)
    compiler = Held()

    async def ask() -> None:
        queue = CompileQueue(compiler)
        waiting = [asyncio.ensure_future(queue.compile(choice(text), "greedy")) for text in "ab"]
        await asyncio.sleep(0)
        with pytest.raises(TooManyGrammars):
            await queue.compile(choice("c"), "greedy")
        waiting.append(asyncio.ensure_future(queue.compile(choice("c"), "other")))
        compiler.go.set()
        assert len(await asyncio.gather(*waiting)) == 3
        assert accepts(await queue.compile(choice("d"), "greedy"), "d")

    asyncio.run(ask())


def test_what_waits_ends_with_the_loop():
    """The end of the server waits for those only that are being compiled."""
    compiler = Held()

    async def ask() -> CompileQueue:
        queue = CompileQueue(compiler)
        waiting = [asyncio.ensure_future(queue.compile(choice(text))) for text in "abcde"]
        while len(compiler.compiled) < TRIALS:
            await asyncio.sleep(0.01)
        assert not any(asked.done() for asked in waiting)
        return queue

    queue = asyncio.run(ask())
    compiler.go.set()
    queue._executor.shutdown()
    assert sorted(compiler.compiled) == ["a", "b"]


def test_what_nobody_waits_for_is_not_compiled():
    compiler = Held()

    async def ask() -> None:
        queue = CompileQueue(compiler)
        waiting = {text: asyncio.ensure_future(queue.compile(choice(text))) for text in "abcd"}
        twice = asyncio.ensure_future(queue.compile(choice("d")))
        while len(compiler.compiled) < TRIALS:
            await asyncio.sleep(0.01)
        for asked in (waiting["c"], waiting["d"]):  # their clients have gone
            asked.cancel()
        await asyncio.wait([waiting["c"], waiting["d"]])
        assert len(queue._pending) == queue._counts[""] == 3
        again = asyncio.ensure_future(queue.compile(choice("c")))  # another client, at once
        compiler.go.set()
        for grammar, text in (
            (await again, "c"),
            (await twice, "d"),
            (await waiting["a"], "a"),
            (await waiting["b"], "b"),
        ):
            assert accepts(grammar, text)
        assert sorted(compiler.compiled) == ["a", "b", "c", "d"]
        assert not queue._pending and queue._counts[""] == 0

    asyncio.run(ask())


def test_an_error_names_the_field_of_each():
    async def ask() -> None:
        queue = CompileQueue(make_compiler())
        specs = [GrammarSpec("regex", "(", field) for field in ("guided_regex", "structured_outputs")]
        for _ in range(2):  # at the same time, and from the cache
            answers = await asyncio.gather(*map(queue.compile, specs), return_exceptions=True)
            assert [isinstance(answer, RequestError) and answer.field for answer in answers] == [s.field for s in specs]

    asyncio.run(ask())
