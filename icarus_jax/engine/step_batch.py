"""Between a step's plan and its arrays: rows for attention, inputs of the sampler, and the sampler's results."""

from __future__ import annotations

import dataclasses

import numpy as np

from icarus_jax.engine.buckets import Bucket
from icarus_jax.engine.sampler import SampleInputs, Samples
from icarus_jax.models.trunk import Rows
from icarus_jax.scheduling.plan import SampleRow, StepPlan, Work
from icarus_jax.scheduling.request import TokenLogprob
from icarus_jax.scheduling.sequence import Sequence
from pallas_kernels.paged_attention import SequenceRows

BAN = -1e30  # the bias of a token that must not be drawn


@dataclasses.dataclass
class StepBatch:
    """A plan as NumPy arrays, padded to a bucket.

    Attributes:
        bucket: The shape of the step.
        rows: The inputs of the forward program.
        sampling: The inputs of the sampler; None for plain greedy sampling.
        variant: The sampler to use, one of programs.VARIANTS.
        counts: How many rows with logits each work of the plan has, in the plan's order.
    """

    bucket: Bucket
    rows: Rows
    sampling: SampleInputs | None
    variant: str
    counts: list[int]


def sequence_rows(work: Work, writer: int, reader: int, pages: np.ndarray) -> SequenceRows:
    """Makes the attention rows of one sequence, in order of position.

    Args:
        work: What the step does for the sequence.
        writer: The index of its first writer row in the batch.
        reader: The index of its first reader row in the batch.
        pages: i32[P], its page table.
    """
    written = np.arange(work.start, work.start + work.num_write, dtype=np.int32)
    num_read = work.num_read + work.reads_reference
    if not num_read:
        return SequenceRows(written - work.start + writer, written, pages)
    read = np.arange(work.read_start, work.read_start + num_read, dtype=np.int32)
    rows = np.concatenate([written - work.start + writer, read - work.read_start + reader])
    read[work.num_read :] = work.logit_start + work.num_logits - 1  # the reference row is at the last position, too
    positions = np.concatenate([written, read])
    order = np.argsort(positions, kind="stable")
    return SequenceRows(rows[order], positions[order], pages)


def sampling_inputs(plan: StepPlan, num_rows: int, context: int, vocab: int) -> tuple[SampleInputs | None, str]:
    """Makes the inputs of the sampler.

    Args:
        plan: The plan of the step.
        num_rows: S, the number of rows with logits, padding included.
        context: C, the context length in tokens.
        vocab: V, the vocabulary size.

    Returns:
        The inputs, or None for plain greedy sampling; and the sampler to use, one of programs.VARIANTS.
    """
    params = [work.seq.params for work in plan.work]
    plain = all(p.greedy and not (p.has_penalties or p.logit_bias or p.min_tokens) for p in params)
    wants_logprobs = any(
        work.seq.params.logprobs is not None or work.seq.wants_score or work.reference for work in plan.work
    )
    if plain and not wants_logprobs:
        return None, "greedy"
    x = SampleInputs.neutral(num_rows, context, vocab)
    row = 0
    for work in plan.work:
        for position in range(work.logit_start, work.logit_start + work.num_logits):
            _fill(x, row, work.seq, position)
            row += 1
        if work.reference:
            x.follow[row] = row - 1
            row += 1
    return x, "logprobs" if wants_logprobs else "sample"


def _fill(x: SampleInputs, row: int, seq: Sequence, position: int) -> None:
    """Sets the sampling inputs of a row whose logits are those of `position`."""
    if position + 1 < seq.prompt_len:  # the row scores the prompt's own next token; nothing is drawn
        x.target[row] = seq.tokens[position + 1]
        return
    p = seq.params
    x.temperature[row] = p.temperature
    x.top_k[row] = max(p.top_k, 0)
    x.top_p[row] = p.top_p
    x.min_p[row] = p.min_p
    x.repetition[row] = p.repetition_penalty
    x.presence[row] = p.presence_penalty
    x.frequency[row] = p.frequency_penalty
    x.seed[row] = seq.seed & 0xFFFFFFFF
    x.position[row] = position + 1
    x.prompt_len[row] = seq.prompt_len
    if p.has_penalties:
        x.history[row, : len(seq.tokens)] = seq.tokens
    bias = list(p.logit_bias)
    if seq.num_output < p.min_tokens:
        stops = set(p.stop_token_ids)
        if not p.ignore_eos:
            stops |= seq.eos_ids
        bias += [(token, BAN) for token in stops]
    for i, (token, value) in enumerate(bias):
        x.bias_ids[row, i] = token
        x.bias[row, i] = value


def results_by_work(samples: Samples, batch: StepBatch) -> list[list[SampleRow]]:
    """Splits the sampler's results by sequence.

    Args:
        samples: The results, as NumPy arrays.
        batch: The batch that they belong to.

    Returns:
        For each work of the plan its rows with logits, in order.
    """
    rows = []
    first = 0
    for count in batch.counts:
        rows.append([_sample_row(samples, batch.sampling, i) for i in range(first, first + count)])
        first += count
    return rows


def _sample_row(samples: Samples, x: SampleInputs | None, i: int) -> SampleRow:
    token = int(samples.tokens[i])
    if samples.logprob is None or x is None:
        return SampleRow(token)
    top = tuple(zip(samples.top_ids[i].tolist(), samples.top_logprobs[i].tolist(), strict=True))
    target = TokenLogprob(int(x.target[i]), float(samples.target_logprob[i]), top)
    return SampleRow(token, TokenLogprob(token, float(samples.logprob[i]), top), target)
