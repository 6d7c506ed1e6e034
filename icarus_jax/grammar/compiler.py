"""Compiles grammars, and follows one along an answer."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark
from llguidance.numpy import fill_next_token_bitmask_par

from icarus_jax.errors import RequestError
from icarus_jax.grammar.spec import MAX_CHARACTERS, GrammarSpec
from icarus_jax.grammar.trial import Trial

CACHED = 256  # compiled grammars that are kept
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

    def __init__(self, matcher: LLMatcher):
        """Starts before the first token."""
        self._matcher = matcher
        self.ended = False

    def accept(self, token: int) -> None:
        """Goes on by a token of the answer.

        Args:
            token: The token. It was drawn under the mask.

        Raises:
            GrammarError: The grammar's limits are reached, or it does not allow the token.
        """
        if not self._matcher.consume_token(token):
            raise GrammarError(self._matcher.get_error() or "the grammar does not allow what was generated")
        self.ended = self._matcher.is_stopped()


class Grammar:
    """A compiled grammar, from which each answer gets a matcher of its own."""

    def __init__(self, matcher: LLMatcher):
        """Keeps a matcher that has not been used."""
        self._matcher = matcher

    def start(self) -> Matcher:
        """Returns a matcher before the first token. Threads may call it at the same time."""
        return Matcher(self._matcher.deep_copy())


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
        self._trial = Trial(tokenizer, vocab_size, self._eos_ids, LIMITS)
        self._lock = threading.Lock()
        self._cache: OrderedDict[GrammarSpec, Grammar | str] = OrderedDict()  # a text: why it cannot be followed

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
        with self._lock:
            found = self._cache.get(spec)
        if found is None:
            found = self._compiled(spec)
        with self._lock:
            self._cache[spec] = found
            self._cache.move_to_end(spec)
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        if isinstance(found, str):
            raise RequestError(f"{spec.field} cannot be followed: {found}", spec.field)
        return found

    def _compiled(self, spec: GrammarSpec) -> Grammar | str:
        """Returns the grammar, or why there is none."""
        try:
            tokenizer, grammar = self._tokens(), READERS[spec.kind](spec.text)
        except (ValueError, GbnfToLarkError, RecursionError) as error:
            return _one_line(str(error))
        if reason := self._trial.error(grammar):
            return _one_line(reason)
        return Grammar(LLMatcher(tokenizer, grammar, limits=LLParserLimits(**LIMITS), log_level=0))

    def _tokens(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(self._json, n_vocab=self._vocab_size, eos_token=self._eos_ids or None)
            return self._tokenizer


def _read_schema(text: str) -> str:
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": BLANKS})


def _read_lark(text: str) -> str:
    """Reads Lark, or llama.cpp's GBNF, which begins with a rule's name and ::=."""
    return LLMatcher.grammar_from_lark(gbnf_to_lark(text) if GBNF.match(text) else text)


GBNF = re.compile(r"(?:\s|#.*\n)*[\w-]+\s*::=")
READERS = {"json_schema": _read_schema, "regex": LLMatcher.grammar_from_regex, "lark": _read_lark}


def _one_line(error: str) -> str:
    return " ".join(error.split())[:500]


_executor: LLExecutor | None = None


def fill_masks(matchers: Sequence[tuple[int, Matcher]], masks: np.ndarray) -> None:
    """Writes which tokens may come next. Several threads of llguidance's own share the work.

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
