"""The text of one choice: the engine's outputs go in, and what the client gains from each comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from icarus_jax.scheduling.request import SamplingParams, TokenLogprob, TokenOutput
from icarus_jax.server.detokenizer import Detokenizer, Vocabulary
from icarus_jax.server.prompts import Prompt

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot write


def finite(value: float) -> float:
    """Makes a log-probability that JSON can write: minus infinity and NaN become LOWEST_LOGPROB."""
    return max(LOWEST_LOGPROB, value)  # with the arguments in this order, max of a NaN is LOWEST_LOGPROB


def offsets_in(text: str, ids: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Finds a prompt's tokens in the text that they were made of.

    Args:
        text: the text.
        ids: its token ids, with or without those that the tokenizer adds (such as BOS).
        vocabulary: made the ids.

    Returns:
        For each token the offset at which it starts in the text, in characters. An added token has no width.
    """
    for add_special_tokens in (True, False):
        made = vocabulary.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        if made["input_ids"] == list(ids):
            break
    else:
        return [min(offset, len(text)) for offset in vocabulary.prompt_text(ids)[1]]
    starts, last = [], 0
    for token_id, (start, end) in zip(ids, made["offset_mapping"], strict=True):
        if end == 0:  # of an added token, wherever it stands
            start = end = last
        token = vocabulary.token_bytes(token_id)
        if end - start < len(token.decode(errors="replace")):  # some tokenizers trim the spaces of a token's span
            start = min(start, max(last, start - len(token) + len(token.lstrip())))
        starts.append(start)
        last = end
    return starts


Echo = tuple[str, list[int]]  # a prompt's text, and the offset at which each of its tokens starts; without scores none


def echo_of(prompt: Prompt, params: SamplingParams, vocabulary: Vocabulary, skip_special_tokens: bool) -> Echo:
    """Makes the text of a prompt with which each choice that echoes it begins.

    Args:
        prompt: the prompt.
        params: says whether the prompt's tokens have log-probabilities.
        vocabulary: gives the bytes of each token.
        skip_special_tokens: whether special tokens are left out of the text.
    """
    if prompt.text is None:
        return vocabulary.prompt_text(prompt.ids, skip_special_tokens)
    return prompt.text, [] if params.logprobs is None else offsets_in(prompt.text, prompt.ids, vocabulary)


@dataclasses.dataclass
class Scored:
    """A token with its log-probability.

    Attributes:
        token_id: the token.
        logprob: its log-probability with the best alternatives; None for the first token of a prompt.
        offset: where the token starts in the text, in characters.
        reference: the trunk's log-probability of a generated token, if the request asks for it.
    """

    token_id: int
    logprob: TokenLogprob | None
    offset: int
    reference: float | None = None


@dataclasses.dataclass
class Delta:
    """What one choice gained by an output of the engine.

    The detokenizer holds text back while it could still become a stop string, or is not a whole character yet. Such
    text comes with the token that decides it.

    Attributes:
        model: the model that wrote the tokens; of joined deltas, the first one.
        text: the new text.
        token_ids: the new tokens.
        scored: the new tokens' log-probabilities; None if the request does not ask for them.
        prompt_logprobs: the log-probability of each prompt token, in the delta that brings them; its first is None.
        finish_reason: why the choice ended: 'stop', 'length', 'abort', 'error' or 'grammar_error'; None while it goes
            on.
        stop_reason: the stop string or the stop token's id that ended the choice. None for an EOS token.
    """

    model: str = ""
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    scored: list[Scored] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @staticmethod
    def join(deltas: Iterable[Delta]) -> Delta:
        """Joins the deltas of one choice, in their order, into a single one.

        Args:
            deltas: the deltas from the choice's first to its last.

        Returns:
            A delta with all text and tokens, and the last delta's reasons.
        """
        whole = Delta()
        for delta in deltas:
            whole.model = whole.model or delta.model
            whole.text += delta.text
            whole.token_ids += delta.token_ids
            if delta.scored is not None:
                whole.scored = whole.scored or []
                whole.scored += delta.scored
            whole.prompt_logprobs = whole.prompt_logprobs or delta.prompt_logprobs
            whole.finish_reason = delta.finish_reason
            whole.stop_reason = delta.stop_reason
        return whole

    @property
    def is_empty(self) -> bool:
        """True if the delta has neither text nor log-probabilities, and does not end the choice."""
        return not (self.text or self.scored or self.finish_reason)


class Choice:
    """One choice of an answer: it takes the engine's outputs in and makes text of them.

    Attributes:
        index: the choice's number in the answer.
        model: the model that writes now; a handoff changes it.
        prompt: the prompt that the choice continues.
        params: the sampling parameters that the engine was given.
        tokens_by_model: model -> how many tokens it has generated.
        handoffs: (index of a generated token, the model that writes from there on).
        kl_to_base: the sum of logprob - reference over the generated tokens, in nats.
        cached_tokens: how many of the prompt's tokens were in the cache.
        finish_reason: why the choice ended; None while it runs.
        begun: whether a chunk of it has been sent; the view that sends chunks sets it.
    """

    def __init__(
        self,
        index: int,
        model: str,
        prompt: Prompt,
        params: SamplingParams,
        vocabulary: Vocabulary,
        eos_ids: frozenset[int],
        skip_special_tokens: bool,
        echo: Echo | None = None,
    ):
        """Begins a choice.

        Args:
            index: the choice's number in the answer.
            model: the model that begins to write.
            prompt: the prompt to continue.
            params: the sampling parameters that the engine was given.
            vocabulary: gives the bytes of each token.
            eos_ids: the ids of the tokens that end a text.
            skip_special_tokens: whether special tokens are left out of the text.
            echo: what the text begins with, if it repeats the prompt.
        """
        self.index = index
        self.model = model
        self.prompt = prompt
        self.tokens_by_model = {model: 0}
        self.handoffs: list[tuple[int, str]] = []
        self.kl_to_base = 0.0
        self.cached_tokens = 0
        self.finish_reason: str | None = None
        self.begun = False
        self.params = params
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        self._eos_ids = eos_ids
        self._detokenizer = Detokenizer(vocabulary, params, skip_special_tokens, prompt.ids)
        self._echo = echo
        self._base = len(echo[0]) if echo else 0

    @property
    def num_tokens(self) -> int:
        """How many tokens the choice has generated."""
        return sum(self.tokens_by_model.values())

    def feed(self, output: TokenOutput) -> Delta:
        """Takes an output of the engine in.

        A stop string may end the choice before the engine does. The caller then has to abort the sequence.

        Args:
            output: the engine's next output for this choice.

        Returns:
            What the choice gained; its `finish_reason` is set if the choice has ended.
        """
        if output.token_ids and output.model != self.model:
            self.model = output.model
            self.handoffs.append((self.num_tokens, self.model))
        delta = Delta(self.model, prompt_logprobs=output.prompt_logprobs)
        if self.params.logprobs is not None:
            delta.scored = []
        if self._echo:
            self._add_echo(delta, output)
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        for i, token_id in enumerate(output.token_ids):
            self._add_token(delta, output, i, token_id)
            if self._detokenizer.stopped is not None:
                delta.finish_reason, delta.stop_reason = "stop", self._detokenizer.stopped
                break
        else:
            if output.finish_reason:
                delta.text += self._detokenizer.finish()
                delta.finish_reason = output.finish_reason
                if output.finish_reason == "stop" and delta.token_ids and delta.token_ids[-1] in self._ends:
                    last = delta.token_ids[-1]
                    delta.stop_reason = last if self.params.ignore_eos or last not in self._eos_ids else None
        self.tokens_by_model[self.model] = self.tokens_by_model.get(self.model, 0) + len(delta.token_ids)
        self.finish_reason = delta.finish_reason
        return delta

    def _add_token(self, delta: Delta, output: TokenOutput, i: int, token_id: int) -> None:
        delta.token_ids.append(token_id)
        # A grammar ends an answer with a token of its text; one that gives up, perhaps with an end token.
        is_stop = (
            output.finish_reason in ("stop", "grammar_error")
            and i == len(output.token_ids) - 1
            and token_id in self._ends
        )
        delta.text += self._detokenizer.push([token_id], is_stop and not self.params.include_stop_str_in_output)
        if delta.scored is not None and output.logprobs is not None:
            logprob, reference = output.logprobs[i], None
            if output.reference_logprobs is not None:
                reference = output.reference_logprobs[i]
                self.kl_to_base += finite(logprob.logprob) - finite(reference)
            delta.scored.append(Scored(token_id, logprob, self._base + self._detokenizer.start, reference))

    def _add_echo(self, delta: Delta, output: TokenOutput) -> None:
        assert self._echo is not None
        text, offsets = self._echo
        self._echo = None
        delta.text = text
        if delta.scored is not None and output.prompt_logprobs is not None:
            rows = zip(self.prompt.ids, output.prompt_logprobs, offsets, strict=True)
            delta.scored += [Scored(token_id, logprob, at) for token_id, logprob, at in rows]
