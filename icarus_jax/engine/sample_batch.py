"""The sampler's inputs for a plan. Host only."""

from __future__ import annotations

from operator import attrgetter

import numpy as np

from icarus_jax.engine.sample_inputs import BIAS_WIDTH, SampleInputs, packed_width, unpack, variant_for
from icarus_jax.scheduling.plan import StepPlan, Work
from icarus_jax.scheduling.sequence import Sequence

BAN = -1e30  # the bias of a token that must not be drawn
_DRAW = attrgetter("params.temperature", "params.top_k", "params.top_p", "params.min_p")


def choose_variant(plan: StepPlan) -> str:
    """Chooses the sampler of a step.

    Args:
        plan: The plan of the step.

    Returns:
        One of sampler.VARIANTS.
    """
    kinds = {work.seq.params.features for work in plan.work}
    scores = any(work.reference or work.logit_start < work.seq.prompt_len - 1 for work in plan.work if work.num_logits)
    return variant_for(
        random=any(kind.random for kind in kinds),
        filtered=any(kind.filtered for kind in kinds),
        penalised=any(kind.penalised for kind in kinds)
        or (any(kind.min_tokens for kind in kinds) and any(map(_forbids_ends, plan.work))),
        logprobs=scores or any(kind.logprobs for kind in kinds),
        masked=any(work.seq.grammar is not None and work.samples for work in plan.work),
    )


def sampling_inputs(
    plan: StepPlan, num_rows: int, context: int, vocab: int, last_rows: dict[Sequence, int]
) -> tuple[np.ndarray, str]:
    """Makes the inputs of the sampler.

    Args:
        plan: The plan of the step.
        num_rows: S, the number of rows with logits, padding included.
        context: C, the context length in tokens.
        vocab: V, the vocabulary size.
        last_rows: For each sequence whose last token is pending, the row with logits that has sampled it.

    Returns:
        The packed inputs i32[S, width], and the sampler to use, one of sampler.VARIANTS.
    """
    variant = choose_variant(plan)
    packed = np.empty((num_rows, packed_width(context, variant)), np.int32)
    x = unpack(packed, variant)
    x.reset(vocab)
    if variant == "greedy":
        return packed, variant
    counts = np.array([work.num_logits + work.reference for work in plan.work])
    last = np.cumsum(counts) - 1 - np.array([work.reference for work in plan.work])  # the row of a sequence's draw
    drawing = [q for q, work in enumerate(plan.work) if work.samples]
    rows = last[drawing]
    if x.temperature is not None:
        sequences = [plan.work[q].seq for q in drawing]
        temperature, top_k, top_p, min_p = np.array(list(map(_DRAW, sequences)), np.float64).reshape(-1, 4).T
        x.temperature[rows] = temperature
        x.seed[rows] = [seq.seed & 0xFFFFFFFF for seq in sequences]  # of 64 bits: no float holds them
        x.position[rows] = [plan.work[q].logit_start + plan.work[q].num_logits for q in drawing]
        if x.top_k is not None:
            x.top_k[rows], x.top_p[rows], x.min_p[rows] = np.maximum(top_k, 0), top_p, min_p
    if x.target is not None:
        _fill_targets(x, plan, counts)
    if x.history is not None:
        for row, q in zip(rows, drawing, strict=True):
            _penalise(x, row, plan.work[q], last_rows)
    return packed, variant


def _forbids_ends(work: Work) -> bool:
    """Returns whether the next token must not end the text, because there are fewer than min_tokens."""
    seq = work.seq
    return work.samples and work.logit_start + work.num_logits - seq.prompt_len < seq.params.min_tokens


def _fill_targets(x: SampleInputs, plan: StepPlan, counts: np.ndarray) -> None:
    """Rows of the prompt score its own next token, reference rows the token that is drawn before them."""
    for first, work in zip((np.cumsum(counts) - counts).tolist(), plan.work, strict=True):
        scored = min(work.num_logits, work.seq.prompt_len - 1 - work.logit_start)
        if scored > 0:
            begin = work.logit_start + 1
            x.target[first : first + scored] = work.seq.tokens[begin : begin + scored]
        if work.reference:
            row = first + work.num_logits
            x.follow[row] = row - 1


def _penalise(x: SampleInputs, row: int, work: Work, last_rows: dict[Sequence, int]) -> None:
    """Sets the penalties and biases of the row that draws a sequence's next token."""
    seq, p = work.seq, work.seq.params
    if p.has_penalties:
        x.repetition[row], x.presence[row], x.frequency[row] = (
            p.repetition_penalty,
            p.presence_penalty,
            p.frequency_penalty,
        )
        x.prompt_len[row] = seq.prompt_len
        x.history[row, : len(seq.tokens)] = seq.tokens
        known = len(seq.tokens)
        if work.logit_start + work.num_logits > known:  # its last token is on the device
            x.fed[row], x.fed_at[row] = last_rows[seq], known
    bias = list(p.logit_bias)
    if _forbids_ends(work):
        stops = set(p.stop_token_ids)
        if not p.ignore_eos:
            stops |= seq.eos_ids
        bias += [(token, BAN) for token in stops]
    assert len(bias) <= BIAS_WIDTH
    for i, (token, value) in enumerate(bias):
        x.bias_ids[row, i] = token
        x.bias[row, i] = value
