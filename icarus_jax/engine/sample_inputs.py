"""The inputs of the sampler: what a step's program does, and how its inputs are packed into one array."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from icarus_jax.scheduling.request import MAX_LOGIT_BIAS, MAX_STOPS

# W, the entries of a row's biases: those of logit_bias, and the stop tokens and end tokens that min_tokens forbids.
BIAS_WIDTH = MAX_LOGIT_BIAS + 2 * MAX_STOPS
# What the programs can do, the cheapest first. A step runs the first that does all that its sequences ask for.
VARIANTS: dict[str, frozenset[str]] = {
    "greedy": frozenset(),
    "random": frozenset({"random"}),
    "filtered": frozenset({"random", "filtered"}),
    "greedy_logprobs": frozenset({"logprobs"}),
    "filtered_logprobs": frozenset({"random", "filtered", "logprobs"}),
    "greedy_masked": frozenset({"masked"}),
    "greedy_changed": frozenset({"logprobs", "penalised", "masked"}),
    "everything": frozenset({"random", "filtered", "logprobs", "penalised", "masked"}),
}


def variant_for(*, random: bool, filtered: bool, penalised: bool, logprobs: bool, masked: bool = False) -> str:
    """Chooses the program of a step.

    Args:
        random: Whether any row has a temperature above 0.
        filtered: Whether any such row has a top_k, top_p or min_p.
        penalised: Whether any row has a penalty or a bias.
        logprobs: Whether log-probabilities are wanted.
        masked: Whether any row may draw from some tokens only, as a grammar says.

    Returns:
        The name of the cheapest of VARIANTS that does all of it.
    """
    asked = {
        "random": random,
        "filtered": filtered,
        "penalised": penalised,
        "logprobs": logprobs,
        "masked": masked,
    }
    needs = {feature for feature, wanted in asked.items() if wanted}
    return next(name for name, does in VARIANTS.items() if needs <= does)


# How SampleInputs are packed. For each field: the feature whose variants have it; its dtype, of 32 bits; the value that
# changes nothing (None: the vocabulary's size, which marks padding); and its columns (0: all that are left).
COLUMNS: dict[str, tuple[str, type, float | None, int]] = {
    "temperature": ("random", np.float32, 0, 1),
    "seed": ("random", np.uint32, 0, 1),
    "position": ("random", np.int32, 0, 1),
    "top_k": ("filtered", np.int32, 0, 1),
    "top_p": ("filtered", np.float32, 1, 1),
    "min_p": ("filtered", np.float32, 0, 1),
    "target": ("logprobs", np.int32, 0, 1),
    "follow": ("logprobs", np.int32, -1, 1),
    "repetition": ("penalised", np.float32, 1, 1),
    "presence": ("penalised", np.float32, 0, 1),
    "frequency": ("penalised", np.float32, 0, 1),
    "prompt_len": ("penalised", np.int32, 0, 1),
    "fed": ("penalised", np.int32, 0, 1),
    "fed_at": ("penalised", np.int32, -1, 1),
    "bias_ids": ("penalised", np.int32, None, BIAS_WIDTH),
    "bias": ("penalised", np.float32, 0, BIAS_WIDTH),
    "history": ("penalised", np.int32, None, 0),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SampleInputs:
    """How to sample each of S rows. `SamplingParams` describes the parameters.

    C is the context length, V the vocabulary size, W = BIAS_WIDTH. What the variant does not need is None. Packed, the
    others are the columns of one array i32[S, width], in the order of COLUMNS.

    Attributes:
        temperature: f32[S]. 0: take the likeliest token.
        seed: u32[S].
        position: i32[S], the position of the token to be drawn.
        top_k: i32[S]. 0: all tokens.
        top_p: f32[S].
        min_p: f32[S].
        target: i32[S], a token whose log-probability is wanted.
        follow: i32[S], a row whose drawn token is the target instead; -1: none.
        repetition: f32[S], the repetition penalty.
        presence: f32[S], the presence penalty.
        frequency: f32[S], the frequency penalty.
        prompt_len: i32[S], how many tokens of `history` are the prompt.
        fed: i32[S], the row of the step before that has sampled the last token of `history`.
        fed_at: i32[S], the place of that token in `history`; -1: all of `history` is there.
        bias_ids: i32[S, W], the tokens whose logits are changed. V marks padding.
        bias: f32[S, W], what is added to their logits.
        history: i32[S, C], the sequence's tokens: prompt, then output. V marks padding. Only penalties need it.
    """

    temperature: Any = None
    seed: Any = None
    position: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    target: Any = None
    follow: Any = None
    repetition: Any = None
    presence: Any = None
    frequency: Any = None
    prompt_len: Any = None
    fed: Any = None
    fed_at: Any = None
    bias_ids: Any = None
    bias: Any = None
    history: Any = None

    def reset(self, vocab: int, rows: Any = slice(None)) -> None:
        """Makes rows neutral.

        Args:
            vocab: V, the vocabulary size.
            rows: What NumPy takes as an index of rows.
        """
        for name, (_, _, value, _) in COLUMNS.items():
            if getattr(self, name) is not None:
                getattr(self, name)[rows] = vocab if value is None else value


def packed_width(context: int, variant: str) -> int:
    """Counts the columns of a variant's packed inputs.

    Args:
        context: C, the context length in tokens.
        variant: One of VARIANTS.
    """
    return sum(width or context for feature, _, _, width in COLUMNS.values() if feature in VARIANTS[variant])


def mask_shape(rows: int, vocab: int, variant: str) -> tuple[int, int]:
    """Returns the shape of the masks of a step: a bit for each token, or nothing if the variant takes none.

    Args:
        rows: S, the number of rows with logits.
        vocab: V, the vocabulary size.
        variant: One of VARIANTS.
    """
    return rows, -(-vocab // 32) if "masked" in VARIANTS[variant] else 0


def unpack(packed: Any, variant: str) -> SampleInputs:
    """Finds the fields in packed inputs.

    Args:
        packed: i32[S, width], a NumPy array, or a JAX array within a program.
        variant: One of VARIANTS.

    Returns:
        The inputs; of a NumPy array they are views, so that what is written to them is written to `packed`.
    """
    found, start = {}, 0
    for name, (feature, dtype, _, width) in COLUMNS.items():
        if feature in VARIANTS[variant]:
            end = start + width if width else packed.shape[1]
            found[name] = (packed[:, start] if width == 1 else packed[:, start:end]).view(dtype)
            start = end
    return SampleInputs(**found)
