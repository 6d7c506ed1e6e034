"""A sequence: one stream of tokens of one model, from its admission to its end."""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping

from icarus_jax.grammar.compiler import GrammarError, Matcher
from icarus_jax.scheduling.page_keys import Chain
from icarus_jax.scheduling.registry import NEVER, Model
from icarus_jax.scheduling.request import Request, SamplingParams, SessionHint, TokenLogprob

log = logging.getLogger(__name__)


class Status(enum.Enum):
    """Where a sequence is in its life. A preempted sequence goes back from RUNNING to WAITING."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, slots=True)
class Sequence:
    """One stream of tokens of one model.

    Attributes:
        seq_id: The id that the engine gave it.
        model: The model that writes the next token. A handoff changes it.
        tokens: The token ids of the prompt, then of the output.
        params: How to pick tokens.
        seed: The seed of its random draws.
        prompt_len: Tokens of the prompt; by default all of `tokens`.
        eos_ids: The model's own end tokens.
        reference: Whether the trunk's log-probability of each output token is wanted too.
        grammar: Follows the grammar of its answer; None if it has none. A handoff does not change it.
        handoff: Is told each new token, and returns the model that writes the next one, or None for no change.
        session: What the client said of the conversation that the request belongs to.
        cache_salt: The sequence shares pages only with those of the same salt.
        tenant: Whose request it belongs to.
        weight: The tenant's share of the engine.
        private: Whether the sequence stays out of the prefix cache: it takes no pages from it and leaves none.
        status: Whether it waits, runs or has ended.
        pending: How many tokens after `tokens` the steps in flight will have sampled: 0 or 1; 2 while a step is planned
            and the one before it is not committed yet.
        num_computed: How many tokens, from the first on, have their K/V in the pages once all planned steps have run.
        num_stored: How many of `tokens` have their K/V in the pages, as far as steps have been committed.
        num_scored: For how many prompt positions the log-probabilities are known once all planned steps have run.
        most: The most tokens that it can have; the scheduler sets it.
        stops: The tokens that end it.
        flight: Counts how often results of steps in flight were given up, as the sequence was preempted or handed over.
        cached_tokens: How many prompt tokens were cached when it was first admitted; None before that.
        admitted_at: When that was, in seconds of the scheduler's clock; None before that.
        overtaken: How many later arrivals were admitted while it was the first in line.
        page_table: Its pages, in order of position.
        num_freed: How many of them, from the first on, it has given back: no row of it sees them any more.
        adapted_from: The first position whose K/V the model's own adapter makes; NEVER if the trunk makes all.
        chain: How its pages are named.
        page_keys: The keys of its full pages, as far as they have been needed.
        pages_before_load: How many of its pages were cached when more were last loaded for it; -1 before that.
        prompt_logprobs: The log-probabilities of the prompt's tokens from the second on, as far as they are known.
    """

    seq_id: int
    model: Model
    tokens: list[int]
    params: SamplingParams
    seed: int
    prompt_len: int = 0
    eos_ids: frozenset[int] = frozenset()
    reference: bool = False
    grammar: Matcher | None = None
    handoff: Callable[[int], Model | None] | None = None
    session: SessionHint | None = None
    cache_salt: str = ""
    tenant: str = ""
    weight: float = 1.0
    private: bool = False
    status: Status = Status.WAITING
    pending: int = 0
    num_computed: int = 0
    num_stored: int = 0
    num_scored: int = 0
    most: int = NEVER
    stops: frozenset[int] = frozenset()
    flight: int = 0
    cached_tokens: int | None = None
    admitted_at: float | None = None
    overtaken: int = 0
    page_table: list[int] = dataclasses.field(default_factory=list)
    num_freed: int = 0
    adapted_from: int = NEVER
    chain: Chain = dataclasses.field(default_factory=Chain)
    page_keys: list[bytes] = dataclasses.field(default_factory=list)
    pages_before_load: int = -1
    prompt_logprobs: list[TokenLogprob | None] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.prompt_len = self.prompt_len or len(self.tokens)
        self.stops = frozenset(self.params.stop_token_ids) | (frozenset() if self.params.ignore_eos else self.eos_ids)

    def writer_slots(self, start: int, num: int) -> list[int]:
        """Returns the adapter slots of the writer rows of the positions [start, start + num)."""
        return [self.model.slot if i >= self.adapted_from else 0 for i in range(start, start + num)]

    def reader_slots(self, start: int, num: int) -> list[int]:
        """Returns the adapter slots of the reader rows of the positions [start, start + num).

        Readers of a `shared` head always use its adapter. Those of other models use what the writer of the same
        position uses.
        """
        return [self.model.slot] * num if self.model.kind == "shared" else self.writer_slots(start, num)

    @property
    def held_pages(self) -> list[int]:
        """The pages that it holds."""
        return self.page_table[self.num_freed :]

    def give_up_flight(self) -> None:
        """Gives up the results of the steps in flight. What they would have sampled is sampled again."""
        self.flight += 1
        self.pending, self.num_scored = 0, len(self.prompt_logprobs)

    @property
    def ends_in_flight(self) -> bool:
        """Whether the pending token is its last one, whatever it is."""
        return self.pending > 0 and len(self.tokens) + self.pending >= self.most

    @property
    def num_output(self) -> int:
        """How many tokens have been generated."""
        return len(self.tokens) - self.prompt_len

    @property
    def wants_score(self) -> bool:
        """Whether log-probabilities of prompt tokens are still missing. The row of token i - 1 scores token i."""
        return self.params.prompt_logprobs is not None and self.num_scored < self.prompt_len - 1

    def finish_reason(self) -> str | None:
        """Tells its grammar the last token. Returns why the sequence ends with it; None: it goes on."""
        if self.grammar is not None and self.num_output:
            try:
                self.grammar.accept(self.tokens[-1])
            except GrammarError:
                log.exception("sequence %d is ended", self.seq_id)
                return "grammar_error"
        if self.tokens[-1] in self.stops and self.num_output and self.num_output >= self.params.min_tokens:
            return "stop"
        if self.grammar is not None and self.grammar.ended:
            return "stop"
        return "length" if len(self.tokens) >= self.most else None


def make_sequences(
    request: Request,
    models: Mapping[str, Model],
    ids: Iterator[int],
    max_model_len: int,
    eos_ids: frozenset[int],
    next_model: Callable[[Callable[[int], str | None], int], Model | None],
) -> list[Sequence]:
    """Makes the sequences of a request's choices.

    Args:
        request: A request that has been checked.
        models: The served models by name.
        ids: Gives each sequence its id.
        max_model_len: The context length in tokens. It may end a sequence before `max_tokens` does.
        eos_ids: The model's own end tokens.
        next_model: Applies a handoff rule of the request to a token: returns the model that goes on, or None.

    Returns:
        len(models) * n sequences, in the order of the choices.
    """
    room = max_model_len - len(request.prompt_ids)
    params = dataclasses.replace(
        request.params,
        max_tokens=min(request.params.max_tokens, room),
        min_tokens=min(request.params.min_tokens, room),
    )
    seed = secrets.randbits(32) if params.seed is None else params.seed
    sequences = []
    for i in range(len(request.models) * request.n):
        handoff = None
        if request.handoff is not None:
            handoff = functools.partial(next_model, request.handoff())
        sequences.append(
            Sequence(
                next(ids),
                models[request.models[i // request.n]],
                list(request.prompt_ids),
                params,
                seed=seed + i % request.n,
                grammar=request.grammar.start() if request.grammar is not None else None,
                eos_ids=eos_ids,
                reference=request.reference_logprobs,
                handoff=handoff,
                session=request.session,
                cache_salt=request.cache_salt,
                tenant=request.tenant,
                weight=request.weight,
            )
        )
    return sequences
