"""The engine's input and output: a request, how to sample for it, and what each step returns to a stream."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from icarus_jax.errors import RequestError
from icarus_jax.grammar.compiler import Grammar
from icarus_jax.scheduling.registry import Model

MAX_LOGPROBS = 20  # alternatives per token
MAX_LOGIT_BIAS = 300  # entries of logit_bias
MAX_STOPS = 16  # stop strings, and stop tokens
MAX_STOP_CHARACTERS = 1000  # of a stop string


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a sampling field may have.

    Attributes:
        low: The lower end.
        high: The upper end, which is allowed unless it is infinite.
        above: Whether the lower end itself is excluded.
    """

    low: float
    high: float = math.inf
    above: bool = False

    def check(self, field: str, value: float) -> None:
        """Checks a value.

        Args:
            field: The field's name, for the message.
            value: The value.

        Raises:
            RequestError: The value is outside the range, infinite or NaN.
        """
        if (self.low < value if self.above else self.low <= value) and value <= self.high and value != math.inf:
            return
        low = f"be above {self.low:g}" if self.above else f"be at least {self.low:g}"
        high = "" if self.high == math.inf else f" and at most {self.high:g}"
        raise RequestError(f"{field} is {value}; it must {low}{high}", field)


def _field(default: Any, low: float, high: float = math.inf, above: bool = False) -> Any:
    """Declares a dataclass field with a range."""
    return dataclasses.field(default=default, metadata={"range": Range(low, high, above)})


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens. Names and defaults are those of the OpenAI API and of vLLM.

    The request bodies of the HTTP API are made from these fields too (server/protocol.py).

    Attributes:
        max_tokens: The largest number of tokens to generate; 0 only scores the prompt.
        min_tokens: The smallest number of tokens to generate: no stop ends the text before.
        temperature: Divides the logits before a draw; 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens; 0 or -1: from all.
        top_p: Draw from the likeliest tokens that together have this probability; 1: from all.
        min_p: Draw from the tokens that have at least this share of the likeliest token's probability.
        repetition_penalty: Divides the positive logits, and multiplies the negative logits, of tokens that are in the
            prompt or the output (CTRL, arXiv 1909.05858). 1: no penalty.
        presence_penalty: Is subtracted from the logits of tokens that are in the output.
        frequency_penalty: Is subtracted from a token's logit once for each time that it is in the output.
        logit_bias: Pairs (token id, bias), or a mapping; the bias, -100 to 100, is added to the token's logit.
        stop: Strings that end the text, or one string.
        stop_token_ids: Tokens that end the text.
        include_stop_str_in_output: Whether the text keeps the stop string.
        ignore_eos: Whether the model's own end tokens are treated as any other token.
        seed: The seed of the random draws; None: a random one.
        logprobs: How many alternatives (0 to 20) to report for each generated token; None: no log-probabilities.
        prompt_logprobs: The same for each token of the prompt.

    Raises:
        RequestError: A value is outside its range; the error's `field` names it.
    """

    max_tokens: int = _field(16, 0)
    min_tokens: int = _field(0, 0)
    temperature: float = _field(1.0, 0, 100)
    top_k: int = _field(0, -1)
    top_p: float = _field(1.0, 0, 1, above=True)
    min_p: float = _field(0.0, 0, 1)
    repetition_penalty: float = _field(1.0, 0, above=True)
    presence_penalty: float = _field(0.0, -2, 2)
    frequency_penalty: float = _field(0.0, -2, 2)
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = _field(None, 0, MAX_LOGPROBS)
    prompt_logprobs: int | None = _field(None, 0, MAX_LOGPROBS)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # vLLM takes one string, too
            object.__setattr__(self, "stop", (self.stop,))
        if isinstance(self.logit_bias, Mapping):
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and "range" in field.metadata:
                field.metadata["range"].check(field.name, value)
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}", "min_tokens")
        self._check_lists()

    def _check_lists(self) -> None:
        for name, most in (("logit_bias", MAX_LOGIT_BIAS), ("stop", MAX_STOPS), ("stop_token_ids", MAX_STOPS)):
            if len(getattr(self, name)) > most:
                raise RequestError(f"{name} has {len(getattr(self, name))} entries; at most {most} are allowed", name)
        for _, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise RequestError(f"a logit_bias is {bias}; it must lie between -100 and 100", "logit_bias")
        if any(not text for text in self.stop):
            raise RequestError("a stop string is empty", "stop")
        if (longest := max(map(len, self.stop), default=0)) > MAX_STOP_CHARACTERS:
            message = f"stop has a string of {longest} characters; at most {MAX_STOP_CHARACTERS} are allowed"
            raise RequestError(message, "stop")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty changes the logits. The sampler then needs the sequence's tokens."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @functools.cached_property
    def features(self) -> Features:
        """What the sampler must be able to do for these parameters."""
        return Features(
            random=not self.greedy,
            filtered=not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0),
            penalised=self.has_penalties or bool(self.logit_bias),
            logprobs=self.logprobs is not None,
            min_tokens=self.min_tokens > 0,
        )


class Features(NamedTuple):
    """What sampling parameters ask of the sampler; a step's program is chosen by it."""

    random: bool  # tokens are drawn at random
    filtered: bool  # from some of the tokens only
    penalised: bool  # logits are changed by penalties or biases
    logprobs: bool  # log-probabilities of generated tokens are wanted
    min_tokens: bool  # end tokens are forbidden at first


@dataclasses.dataclass(frozen=True)
class SessionHint:
    """What a client says of the conversation that a request belongs to.

    Attributes:
        id: The session's id.
        retain_s: For how many seconds its pages are kept after the answer. inf: until they are released. None: until
            they are evicted, as any cached page.
        next_model: The name of the model that will most likely continue; None if it is not known.
    """

    id: str
    retain_s: float | None = None
    next_model: str | None = None


# Makes the handoff rule of one choice. The rule is told each new token, and names the model that writes the next one.
Handoff = Callable[[], Callable[[int], str | None]]


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt for one or several models.

    The answers, called choices, number len(models) * n. Choice i is the (i % n)-th answer of models[i // n], and its
    random draws use the seed + i % n.

    Attributes:
        models: The names of the models that answer.
        prompt_ids: The token ids of the prompt.
        params: How to pick tokens.
        n: The number of answers of each model.
        handoff: Is called once for each choice. What it returns is called on the engine's thread with each new token,
            and returns the name of the model that writes the next token, or None for no change.
        grammar: What every answer has to follow; None for free text.
        reference_logprobs: Whether the trunk's log-probability of each generated token is wanted too.
        session: What the client says of the conversation.
        cache_salt: Only requests with the same salt share pages; '' is a salt too.
        tenant: Who asks. The tenants that wait share the engine fairly.
        weight: The tenant's share, compared with those of the others; above 0.
    """

    models: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    n: int = 1
    handoff: Handoff | None = None
    grammar: Grammar | None = None
    reference_logprobs: bool = False
    session: SessionHint | None = None
    cache_salt: str = ""
    tenant: str = ""
    weight: float = 1.0

    def check(self, models: Mapping[str, Model], limit: int, vocab: int, max_num_seqs: int) -> None:
        """Checks whether the engine can serve the request.

        Args:
            models: The served models by name.
            limit: The context length in tokens.
            vocab: The size of the vocabulary.
            max_num_seqs: The largest `n`.

        Raises:
            RequestError: It cannot; the error's `field` names what is wrong.
        """
        served = ", ".join(models)
        for name in self.models:
            if name not in models:
                raise RequestError(f"the model {name!r} does not exist; served: {served}", "model")
            if self.reference_logprobs and models[name].salt:
                raise RequestError(
                    f"reference_logprobs need the trunk's K/V, and {name!r} makes its own", "reference_logprobs"
                )
        if not self.models:
            raise RequestError(f"no model is named; served: {served}", "models")
        if not self.prompt_ids:
            raise RequestError("the prompt is empty", "prompt")
        if len(self.prompt_ids) + min(1, self.params.max_tokens) > limit:
            raise RequestError(
                f"the prompt has {len(self.prompt_ids)} tokens; the context holds {limit}, output included", "prompt"
            )
        if not 1 <= self.n <= max_num_seqs:
            raise RequestError(f"n is {self.n}; it must lie between 1 and {max_num_seqs}", "n")
        named = {
            "prompt": self.prompt_ids,
            "logit_bias": [t for t, _ in self.params.logit_bias],
            "stop_token_ids": self.params.stop_token_ids,
        }
        for field, ids in named.items():
            bad = next((t for t in ids if not 0 <= t < vocab), None)
            if bad is not None:
                raise RequestError(f"{field} holds the token id {bad}; ids lie between 0 and {vocab - 1}", field)


@dataclasses.dataclass
class TokenLogprob:
    """A token's log-probability under the raw logits: without temperature, penalties and biases.

    Attributes:
        token_id: The token.
        logprob: Its log-probability, in nats.
        top: The MAX_LOGPROBS likeliest tokens and their log-probabilities, the likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(slots=True)
class TokenOutput:
    """What one step returns to the stream of one sequence.

    Attributes:
        seq_id: The sequence's id.
        token_ids: The new tokens; empty if the stream only ends, or if only the prompt was scored.
        model: The name of the model that wrote them.
        logprobs: Their log-probabilities; None if they were not asked for.
        reference_logprobs: Their log-probabilities under the trunk, in nats; None if they were not asked for.
        prompt_logprobs: The log-probabilities of the whole prompt, in the stream's first output if they were asked
            for. The first entry is None, because nothing precedes the first token.
        finish_reason: Why the stream ends with this output: 'stop', 'length', 'abort', 'error', or 'grammar_error' if
            its grammar has become too complex to go on. None: it goes on.
        cached_tokens: How many tokens of the prompt were taken from the prefix cache.
        admitted_at: When the sequence was admitted, in seconds (monotonic); None if it never was.
    """

    seq_id: int
    token_ids: list[int]
    model: str = ""
    logprobs: list[TokenLogprob] | None = None
    reference_logprobs: list[float] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: str | None = None
    cached_tokens: int = 0
    admitted_at: float | None = None
