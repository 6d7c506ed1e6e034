"""Compiles grammars, and follows one along an answer."""

from __future__ import annotations

import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from icarus_jax.errors import RequestError
from icarus_jax.grammar.spec import MAX_CHARACTERS, GrammarSpec
from icarus_jax.grammar.trial import FAILED, Trial

CACHED = 256  # compiled grammars that are kept, and reasons why there is none
TRIALS = 2  # grammars that are tried at the same time
TOO_MANY = "too many states"  # llguidance's error at max_lexer_states
# The defaults of llguidance are higher. A mask is made within the engine's step.
LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "step_lexer_fuel": 50_000, "verbose_errors": False}

# A small model under a grammar may write blanks for ever: a few must do between two tokens of JSON.
BLANKS = r"[ \n\r\t]{0,16}"


class GrammarError(Exception):
    """An answer cannot be followed any further: the grammar has become too complex."""


class Matcher:
    """Follows a grammar along one answer. Only one thread at a time may use it.

    Attributes:
        ended: Whether the answer is complete: nothing but an end token may follow.
    """

    def __init__(self, grammar: Grammar, matcher: LLMatcher):
        """Starts before the first token. `matcher` shares its states, and so their limit, with the grammar's others."""
        self._grammar, self._matcher = grammar, matcher
        self._shares = True
        self._tokens: list[int] = []
        self.ended = False

    def accept(self, token: int) -> None:
        """Goes on by a token of the answer.

        Args:
            token: The token. It was drawn under the mask.

        Raises:
            GrammarError: The grammar's limits are reached, or it does not allow the token.
        """
        self._tokens.append(token)
        # A mask that could not be made allows the end only, and llguidance takes that token as if nothing were wrong.
        if self._matcher.is_error() or not self._matcher.consume_token(token):
            raise GrammarError(self._matcher.get_error() or "the grammar does not allow what was generated")
        self.ended = self._matcher.is_stopped()

    def part(self) -> bool:
        """Goes on with states of its own, if those that the answers share have become too many.

        Returns:
            Whether the answer can go on.
        """
        if not self._shares or TOO_MANY not in self._matcher.get_error():
            return False
        self._shares, self._matcher = False, self._grammar.make()
        self._grammar.worn = True
        return self._matcher.consume_tokens(self._tokens)


class Grammar:
    """A compiled grammar, from which each answer gets a matcher of its own.

    Attributes:
        worn: Whether the states that its answers share have become too many.
    """

    def __init__(self, make: Callable[[], LLMatcher]):
        """Starts without answers. `make` compiles the grammar."""
        self.make, self._matcher, self.worn = make, make(), False

    def start(self) -> Matcher:
        """Returns a matcher before the first token. Threads may call it at the same time."""
        if self.worn:
            self._matcher, self.worn = self.make(), False
        return Matcher(self, self._matcher.deep_copy())


class Compiler:
    """Compiles grammars for one tokenizer. Threads may use it at the same time."""

    def __init__(self, tokenizer: str, vocab_size: int, eos_ids: Iterable[int]):
        """Prepares. The tokenizer is read when the first grammar is compiled, which takes about half a second.

        Args:
            tokenizer: The tokenizer as the JSON of Hugging Face's tokenizers.
            vocab_size: V, the number of logits.
            eos_ids: The trunk's end tokens; without any, the tokenizer names them.
        """
        self._json, self._vocab_size, self._eos_ids = tokenizer, vocab_size, sorted(eos_ids)
        self._tokenizer: LLTokenizer | None = None
        self._trials: queue.LifoQueue[Trial] = queue.LifoQueue()  # the last one first: its process has started
        for _ in range(TRIALS):
            self._trials.put(Trial(tokenizer, vocab_size, self._eos_ids, LIMITS))
        self._lock = threading.Lock()
        self._cache: OrderedDict[GrammarSpec, Grammar | str] = OrderedDict()  # a text: why it cannot be followed

    def find(self, spec: GrammarSpec) -> Grammar | None:
        """Finds a grammar among the last ones.

        Args:
            spec: The grammar.

        Returns:
            The grammar; None: it is not among them.

        Raises:
            RequestError: It is, and there was a reason why it cannot be followed.
        """
        with self._lock:
            found = self._cache.get(spec)
            if found is not None:
                self._cache.move_to_end(spec)
        if isinstance(found, str):
            raise _refusal(spec, found)
        return found

    def compile(self, spec: GrammarSpec) -> Grammar:
        """Compiles a grammar, or finds it among the last ones.

        It may take a second or two. The interpreter's lock is not held meanwhile.

        Args:
            spec: The grammar.

        Raises:
            RequestError: It is no grammar, is too complex, or uses what llguidance does not support.
        """
        if len(spec.text) > MAX_CHARACTERS:
            raise RequestError(f"{spec.field}: {len(spec.text)} characters; at most {MAX_CHARACTERS}", spec.field)
        if (found := self.find(spec)) is not None:
            return found
        made = self._compiled(spec)
        if made != FAILED:  # perhaps for a reason of its own, such as a lack of memory
            self._keep(spec, made)
        if isinstance(made, str):
            raise _refusal(spec, made)
        return made

    def _keep(self, spec: GrammarSpec, made: Grammar | str) -> None:
        with self._lock:
            self._cache[spec] = made
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)

    def _compiled(self, spec: GrammarSpec) -> Grammar | str:
        """Returns the grammar, or why there is none."""
        try:
            tokenizer, grammar = self._tokens(), READERS[spec.kind](spec.text)
        except ValueError as error:
            return _one_line(str(error))
        trial = self._trials.get()
        try:
            reason = trial.error(grammar)
        finally:
            self._trials.put(trial)
        if reason:
            return _one_line(reason)
        return Grammar(lambda: LLMatcher(tokenizer, grammar, limits=LLParserLimits(**LIMITS), log_level=0))

    def _tokens(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(self._json, n_vocab=self._vocab_size, eos_token=self._eos_ids or None)
            return self._tokenizer


def _read_schema(text: str) -> str:
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": BLANKS})


def _read_lark(text: str) -> str:
    """Reads Lark, or llama.cpp's GBNF, which begins with a rule's name and ::=.

    Raises:
        ValueError: It is no grammar.
    """
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(text) if GBNF.match(text) else text)
    except Exception as error:  # gbnf_to_lark raises exceptions of many kinds
        raise ValueError(str(error)) from error


GBNF = re.compile(r"(?:\s|#.*\n)*[\w-]+\s*::=")
READERS = {"json_schema": _read_schema, "regex": LLMatcher.grammar_from_regex, "lark": _read_lark}


def _refusal(spec: GrammarSpec, reason: str) -> RequestError:
    return RequestError(f"{spec.field} cannot be followed: {reason}", spec.field)


def _one_line(error: str) -> str:
    return " ".join(error.split())[:500]


_executor: LLExecutor | None = None


def fill_masks(matchers: Sequence[tuple[int, Matcher]], masks: np.ndarray) -> None:
    """Writes which tokens may come next. Several threads of llguidance's own share the work.

    An answer that reaches the limit of its grammar's states gets states of its own, but only one in a call; another one
    that does so then fails, when its next token is accepted.

    Args:
        matchers: Pairs of a row of `masks` and the matcher whose mask belongs there.
        masks: i32[S, ceil(V / 32)]. Bit v % 32 of column v // 32 is set if token v may come next.
    """
    global _executor
    if not matchers:
        return
    if _executor is None:
        _executor = LLExecutor()
    fill_next_token_bitmask_par(_executor, [(matcher._matcher, row) for row, matcher in matchers], masks)
    worn = [(row, matcher) for row, matcher in matchers if matcher._matcher.is_error()]
    for row, matcher in worn[:1]:  # compiling takes long, and all rows of the step wait: the other answers end
        if matcher.part():
            fill_next_token_bitmask(matcher._matcher, masks, row)
