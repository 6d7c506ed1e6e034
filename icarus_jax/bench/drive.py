"""Drives sessions against a server on schedule.

Each session is an asyncio task. It sends a turn only after it has the reply to the turn before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence

from icarus_jax.bench.client import Reply, Server, ServerError
from icarus_jax.bench.peers import Dialect
from icarus_jax.workloads.calls import Call, Counters
from icarus_jax.workloads.workload import Conversation, Session, Turn, common_prefix

SCRAPE_SECONDS = 1.0
LATE_SECONDS = 0.05  # a call sent later than this after it was due counts as a breach of the schedule
CPU_LIMIT = 0.1  # how much of a core the client may use


@dataclasses.dataclass
class Driven:
    """The results of one run.

    Attributes:
        calls: every call, in the order in which they ended.
        counters: what the server says that it did.
        pages: (seconds since the start, pages held by sequences, pages kept for reuse), once a second; empty if the
            server does not say.
        late_s: the longest time by which a call was sent later than due, in seconds.
        cpu: how much CPU time the client itself used, as a share of a core.
        digest: a SHA-256 of all replies' token ids, in the order of sessions and turns. It says nothing if the server
            sends no token ids.
    """

    calls: list[Call]
    counters: Counters
    pages: list[tuple[float, float, float]]
    late_s: float
    cpu: float
    digest: str

    @property
    def complaint(self) -> str:
        """Why the run's figures may not be trusted; '' if they may."""
        said = []
        if self.late_s > LATE_SECONDS:
            said.append(f"the client could not keep the schedule: a call went out {self.late_s * 1e3:.0f} ms late")
        if self.cpu > CPU_LIMIT:
            said.append(f"the client used {self.cpu:.0%} of a core")
        return "; ".join(said)


class Driver:
    """Drives one server for one run."""

    def __init__(self, server: Server, dialect: Dialect, vocab_size: int, seed: int, mark: int = 0):
        """Prepares a run; nothing is sent.

        Args:
            server: the server to drive.
            dialect: how this kind of server names adapters and metrics.
            vocab_size: random prompt tokens are below this number.
            seed: the seed of the random prompt tokens.
            mark: the first token of every prompt. Give each run another one, so that it does not find the prompts of an
                earlier run in the server's cache.
        """
        self._mark = mark
        self._server, self._dialect = server, dialect
        self._vocab, self._seed = vocab_size, seed
        self._needed, self._late, self._begin = 0, 0.0, 0.0
        self._calls: list[Call] = []
        self._pages: list[tuple[float, float, float]] = []
        self._first_prompt: list[int] = []
        self._said: dict[tuple[int, int], list[int]] = {}  # (session, turn) -> the reply

    async def run(self, sessions: Sequence[Session], arrivals: Sequence[float]) -> Driven:
        """Drives all sessions to their ends.

        Args:
            sessions: the sessions; every turn names its model.
            arrivals: when each session starts, in seconds after this call.

        Returns:
            The results.

        Raises:
            ServerError: a request failed, so the run cannot be used.
            OSError: a connection failed, so the run cannot be used.
        """
        before = await self._metrics()
        cpu = time.thread_time()
        self._begin = time.monotonic()
        watch = asyncio.create_task(self._watch()) if before else None
        try:
            async with asyncio.TaskGroup() as group:
                for session, due in zip(sessions, arrivals, strict=True):
                    group.create_task(self._session(session, float(due)))
        except ExceptionGroup as group_error:  # the first error is enough for the user
            raise group_error.exceptions[0] from None
        finally:
            if watch:
                watch.cancel()
        cpu = (time.thread_time() - cpu) / (time.monotonic() - self._begin)
        after = await self._metrics()
        gained = {word: after[word] - before[word] for word in after}
        told = {word: int(gained[word]) for word in ("prefill", "evictions", "preemptions", "steps") if word in gained}
        counters = Counters(self._needed, **told, busy_s=gained.get("busy"))
        digest = hashlib.sha256(json.dumps([ids for _, ids in sorted(self._said.items())]).encode()).hexdigest()
        return Driven(self._calls, counters, self._pages, self._late, cpu, digest)

    async def ask(self, prompt: list[int], model: str, output_len: int, session: str = "") -> Reply:
        """Asks for one greedy completion.

        Args:
            prompt: the prompt's token ids.
            model: the model's name.
            output_len: how many tokens to generate; EOS does not end the completion.
            session: the name of the conversation; '' if it has none.

        Returns:
            The completion.

        Raises:
            ServerError: the server refused, or generated another number of tokens.
            OSError: the connection failed.
        """
        body = self._dialect.body(model, session) | {
            "prompt": prompt,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        reply = Reply()
        await reply.read(self._server, body)
        if reply.output_len != output_len:  # a server that does less work must not count as faster
            raise ServerError(
                f"{model}: a reply has {reply.output_len} tokens; {output_len} were asked for, ignore_eos"
            )
        return reply

    async def _session(self, session: Session, due: float) -> None:
        talk = Conversation(session[0].session, self._seed, self._vocab)
        for turn in session:
            due += turn.wait_s if turn.turn else 0.0
            prompt = talk.prompt(turn)
            prompt[0] = self._mark
            self._count(turn, talk, prompt)
            await asyncio.sleep(self._begin + due - time.monotonic())
            start = time.monotonic() - self._begin
            self._late = max(self._late, start - due)
            name = f"{self._mark}-{turn.session}"
            reply = await self.ask(prompt, turn.model, turn.output_len, name)
            first, due = reply.first - self._begin, reply.end - self._begin
            call = Call(turn.session, turn.turn, turn.model, start, first, due, len(prompt), reply.output_len)
            self._calls.append(call)
            self._said[turn.session, turn.turn] = reply.token_ids
            talk.reply(reply.token_ids)

    def _count(self, turn: Turn, talk: Conversation, prompt: list[int]) -> None:
        """Counts the prompt tokens that are new; see `Counters.needed`."""
        self._needed += talk.new_tokens
        if turn.turn == 0:
            self._needed -= common_prefix(self._first_prompt, prompt)
            self._first_prompt = self._first_prompt or prompt

    async def _metrics(self) -> dict[str, float]:
        return self._dialect.read((await self._server.get("/metrics")).decode())

    async def _watch(self) -> None:
        """Records the pages in use every SCRAPE_SECONDS, until it is cancelled."""
        while True:
            found = await self._metrics()
            if "pages_used" in found:
                at = time.monotonic() - self._begin
                self._pages.append((at, found["pages_used"], found.get("pages_cached", 0.0)))
            await asyncio.sleep(SCRAPE_SECONDS)
