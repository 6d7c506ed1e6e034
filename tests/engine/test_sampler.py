"""The sampler against transformers' logits processors, NumPy, and statistics."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from icarus_jax.engine import sampler
from icarus_jax.engine.sampler import SampleInputs, sample

S, V, C = 5, 300, 24
LOGITS = (np.random.default_rng(0).standard_normal((S, V)) * 4).astype(np.float32)
run = jax.jit(sample, static_argnames="logprobs")


def inputs(**changes) -> SampleInputs:
    x = SampleInputs.neutral(S, C, V)
    for name, value in changes.items():
        getattr(x, name)[...] = value
    return x


def kept(**changes) -> np.ndarray:
    return np.asarray(jax.jit(sampler._keep)(LOGITS, inputs(temperature=1.0, **changes)))


def hf_kept(*warpers) -> np.ndarray:
    scores = torch.tensor(LOGITS)
    for warper in warpers:
        scores = warper(None, scores)
    return torch.isfinite(scores).numpy()


@pytest.mark.parametrize("k", [1, 2, 17, 300, 1000])
def test_top_k(k):
    np.testing.assert_array_equal(kept(top_k=k), hf_kept(hf.TopKLogitsWarper(min(k, V))))


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p(p):
    np.testing.assert_array_equal(kept(top_p=p), hf_kept(hf.TopPLogitsWarper(p)))


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_min_p(p):
    np.testing.assert_array_equal(kept(min_p=p), hf_kept(hf.MinPLogitsWarper(p)))


def test_top_k_then_top_p():
    want = hf_kept(hf.TopKLogitsWarper(9), hf.TopPLogitsWarper(0.8))
    np.testing.assert_array_equal(kept(top_k=9, top_p=0.8), want)


def test_rows_have_their_own_parameters():
    x = inputs(temperature=[0, 1, 1, 1, 1], top_k=[0, 1, 0, 0, 0], top_p=[1, 1, 1e-6, 1, 1], min_p=[0, 0, 0, 1, 0])
    tokens = np.asarray(run(LOGITS, x, logprobs=False).tokens)
    np.testing.assert_array_equal(tokens[:4], LOGITS[:4].argmax(-1))
    assert set(kept(top_p=x.top_p, top_k=x.top_k, min_p=x.min_p).sum(-1).tolist()) == {1, V}


def test_penalties_match_transformers():
    rng = np.random.default_rng(1)
    history = rng.integers(0, V, (S, C)).astype(np.int32)
    logits = LOGITS.copy()
    x = inputs(repetition=1.3, history=history, prompt_len=10)
    want = hf.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(history, dtype=torch.long), torch.tensor(logits))
    np.testing.assert_allclose(sampler._penalise(jnp.asarray(logits), x), want, rtol=1e-6)
    counts = np.stack([np.bincount(row[10:], minlength=V) for row in history])
    x = inputs(presence=0.7, frequency=-0.4, history=history, prompt_len=10)
    want = logits + 0.4 * counts - 0.7 * (counts > 0)
    np.testing.assert_allclose(sampler._penalise(jnp.asarray(logits), x), want, rtol=1e-5, atol=1e-5)
    x.history[:, 12:] = V  # padding
    counts = np.stack([np.bincount(row[10:12], minlength=V) for row in history])
    np.testing.assert_allclose(
        sampler._penalise(jnp.asarray(logits), x), logits + 0.4 * counts - 0.7 * (counts > 0), rtol=1e-5, atol=1e-5
    )


def test_penalties_reach_the_choice():
    best = LOGITS.argmax(-1)
    x = inputs(presence=2.0, frequency=2.0, history=np.repeat(best[:, None], C, 1))
    tokens = np.asarray(run(LOGITS, x, logprobs=False).tokens)
    assert (tokens != best).all()


def test_bias_bans_and_forces():
    best = LOGITS.argmax(-1)
    x = inputs()
    x.bias_ids[:, 0], x.bias[:, 0] = best, -100
    x.bias_ids[:2, 1], x.bias[:2, 1] = 7, 100
    tokens = np.asarray(run(LOGITS, x, logprobs=False).tokens)
    assert (tokens[:2] == 7).all() and (tokens != best).all()


def test_draws_follow_the_distribution():
    logits = np.tile(np.array([[1.0, 0.0, 2.0, -1.0]], np.float32), (4000, 1))
    x = SampleInputs.neutral(4000, 1, 4)
    x.temperature[...], x.seed[...] = 0.8, np.arange(4000)
    freq = np.bincount(np.asarray(run(logits, x, logprobs=False).tokens), minlength=4) / 4000
    want = np.exp(logits[0] / 0.8) / np.exp(logits[0] / 0.8).sum()
    np.testing.assert_allclose(freq, want, atol=0.025)


def test_draws_depend_on_seed_and_position_alone():
    flat = np.zeros((S, V), np.float32)
    x = inputs(temperature=1.0, seed=[1, 2, 1, 1, 3], position=[5, 5, 6, 5, 5])
    a, b, c, d, _ = np.asarray(run(flat, x, logprobs=False).tokens)
    assert a == d and len({a, b, c}) == 3
    one = SampleInputs.neutral(1, C, V)
    one.temperature[0], one.seed[0], one.position[0] = 1.0, 1, 6
    assert int(run(flat[:1], one, logprobs=False).tokens[0]) == c


def test_logprobs_are_the_raw_models():
    x = inputs(temperature=0.3, target=np.arange(S), seed=np.arange(S), top_k=3)
    out = run(LOGITS, x, logprobs=True)
    want = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    rows = np.arange(S)
    np.testing.assert_allclose(out.logprob, want[rows, out.tokens], atol=1e-5)
    np.testing.assert_allclose(out.target_logprob, want[rows, rows], atol=1e-5)
    np.testing.assert_array_equal(out.top_ids, np.argsort(-want, kind="stable")[:, :20])
    assert [f.name for f in dataclasses.fields(out)][-1] == "top_logprobs" and out.top_logprobs.shape == (S, 20)


def test_greedy_needs_no_inputs():
    np.testing.assert_array_equal(run(LOGITS, None, logprobs=False).tokens, LOGITS.argmax(-1))
