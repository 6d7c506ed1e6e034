"""The sampler against transformers' logits processors, sorts in NumPy, and statistics."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from icarus_jax.engine import sampler
from icarus_jax.engine.sample_inputs import VARIANTS, SampleInputs, mask_shape, packed_width, unpack, variant_for
from icarus_jax.engine.sampler import sample

S, V, C = 5, 300, 24
LOGITS = (np.random.default_rng(0).standard_normal((S, V)) * 4).astype(np.float32)
run = jax.jit(sample, static_argnames="variant")


def inputs(variant="everything", shape=(S, C, V), **changes) -> SampleInputs:
    rows, context, vocab = shape
    x = unpack(np.empty((rows, packed_width(context, variant)), np.int32), variant)
    x.reset(vocab)
    for name, value in changes.items():
        getattr(x, name)[...] = value
    return x


def tokens_of(logits, x: SampleInputs, variant="everything", masks=None) -> np.ndarray:
    if masks is None:
        masks = np.full(mask_shape(len(logits), logits.shape[1], variant), -1, np.int32)
    return np.asarray(run(logits, x, None, masks, variant=variant).tokens)


def kept(**changes) -> np.ndarray:
    return np.asarray(jax.jit(sampler._keep)(LOGITS, inputs("filtered", **changes)))


def sorted_kept(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """What one row may draw, by sorting it."""
    weights = np.asarray(jnp.exp(scaled - scaled.max()))
    left = weights >= np.sort(weights)[::-1][min(top_k or len(weights), len(weights)) - 1]
    falling = np.sort(weights[left])[::-1]
    sums = np.cumsum(falling.astype(np.float64))
    last = np.searchsorted(sums, np.float32(top_p) * sums[-1]) if top_p < 1 else -1
    return left & (weights >= max(falling[last], np.float32(min_p)))


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
    np.testing.assert_array_equal(tokens_of(LOGITS, x)[:4], LOGITS[:4].argmax(-1))
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
    assert (tokens_of(LOGITS, x) != best).all()


def test_bias_bans_and_forces():
    best = LOGITS.argmax(-1)
    x = inputs()
    x.bias_ids[:, 0], x.bias[:, 0] = best, -100
    x.bias_ids[:2, 1], x.bias[:2, 1] = 7, 100
    tokens = tokens_of(LOGITS, x)
    assert (tokens[:2] == 7).all() and (tokens != best).all()


def test_draws_follow_the_distribution():
    logits = np.tile(np.array([[1.0, 0.0, 2.0, -1.0]], np.float32), (4000, 1))
    x = inputs("random", (4000, 1, 4), temperature=0.8, seed=np.arange(4000))
    freq = np.bincount(tokens_of(logits, x, "random"), minlength=4) / 4000
    want = np.exp(logits[0] / 0.8) / np.exp(logits[0] / 0.8).sum()
    np.testing.assert_allclose(freq, want, atol=0.025)


def test_draws_depend_on_seed_and_position_alone():
    flat = np.zeros((S, V), np.float32)
    x = inputs("random", temperature=1.0, seed=[1, 2, 1, 1, 3], position=[5, 5, 6, 5, 5])
    a, b, c, d, _ = tokens_of(flat, x, "random")
    assert a == d and len({a, b, c}) == 3
    one = inputs(shape=(1, C, V), temperature=1.0, seed=1, position=6)  # in another program, too
    assert tokens_of(flat[:1], one) == [c]


def test_logprobs_are_the_raw_models():
    follow = [-1, -1, 0, -1, 1]
    x = inputs("filtered_logprobs", temperature=0.3, target=np.arange(S), follow=follow, seed=np.arange(S), top_k=3)
    out = run(LOGITS, x, variant="filtered_logprobs")
    want = LOGITS - np.log(np.exp(LOGITS).sum(-1, keepdims=True))
    rows, tokens = np.arange(S), np.asarray(out.tokens)
    targets = [0, 1, tokens[0], 3, tokens[1]]
    np.testing.assert_allclose(out.logprob, want[rows, tokens], atol=1e-5)
    np.testing.assert_allclose(out.target_logprob, want[rows, targets], atol=1e-5)
    np.testing.assert_array_equal(out.top_ids, np.argsort(-want, kind="stable")[:, :20])
    np.testing.assert_allclose(out.top_logprobs, -np.sort(-want)[:, :20], atol=1e-5)
    assert [f.name for f in dataclasses.fields(out)][-1] == "top_logprobs"


@pytest.mark.parametrize("vocab", [3, 16, 20, 33])
def test_the_likeliest_tokens_are_in_order(vocab):
    logits = np.random.default_rng(2).integers(-3, 3, (S, vocab)).astype(np.float32)  # many equal ones
    out = run(logits, inputs("greedy_logprobs", (S, C, vocab)), variant="greedy_logprobs")
    np.testing.assert_array_equal(out.top_ids, np.argsort(-logits, kind="stable")[:, :20])


def test_greedy_needs_no_inputs():
    logits = LOGITS.copy()
    logits[0, [7, 200]] = logits.max() + 1  # of equals the first
    np.testing.assert_array_equal(tokens_of(logits, None, "greedy"), logits.argmax(-1))


def test_a_row_of_nan_stays_alone():
    logits = LOGITS.copy()
    logits[2] = np.nan
    for variant in VARIANTS:
        tokens = tokens_of(logits, inputs(variant), variant)
        assert 0 <= tokens[2] < V
        np.testing.assert_array_equal(np.delete(tokens, 2), np.delete(LOGITS.argmax(-1), 2))


# ---- thresholds by digits


def test_a_threshold_is_the_smallest_value_kept():
    """Every bit of it: values that differ in the last bit, denormals, zeros and ones."""
    rng = np.random.default_rng(3)
    values = rng.random((6, 1000)).astype(np.float32) ** 8
    values[1] = np.float32(0.3)
    values[2] = (np.float32(0.3).view(np.int32) + rng.permutation(1000).astype(np.int32)).view(np.float32)
    values[3] = 2.0 ** -rng.integers(0, 149, 1000)
    values[4, 10:] = 0
    values[5, ::2] = 1
    keep = jax.jit(lambda v, k: v >= sampler._threshold(v, lambda: jnp.int32(1), k)[:, None])
    for k in (1, 2, 77, 500, 999, 1000):
        want = np.sort(values)[:, ::-1][:, k - 1]
        want[want < np.finfo(np.float32).tiny] = 0  # XLA takes denormals as zeros
        np.testing.assert_array_equal(keep(values, np.full(6, k, np.int32)), values >= want[:, None])


def test_rows_keep_what_a_sort_keeps():
    rng = np.random.default_rng(4)
    rows, vocab = 64, 50_000
    logits = (rng.standard_normal((rows, vocab)) * rng.uniform(0.1, 6, (rows, 1))).astype(np.float32)
    logits[:8] = np.round(logits[:8])  # ties
    logits[8:12] = 0.5
    logits[12:16, ::3] = -1e30  # banned
    x = inputs("filtered", (rows, 1, vocab))
    x.top_k[...] = rng.choice([0, 0, 1, 2, 40, 1000, vocab - 1, 10 * vocab], rows)
    x.top_p[...] = rng.choice([1, 1, 1e-6, 0.3, 0.9, 0.999], rows)
    x.min_p[...] = rng.choice([0, 0, 0, 0.01, 0.5, 1], rows)
    x.temperature[...], x.seed[...], x.position[...] = rng.uniform(0.2, 2, rows), rng.integers(0, 1 << 32, rows), 9
    scaled = logits / x.temperature[:, None]
    got = np.asarray(jax.jit(sampler._keep)(scaled, x))
    want = np.stack([sorted_kept(*row) for row in zip(scaled, x.top_k, x.top_p, x.min_p, strict=True)])
    np.testing.assert_array_equal(got.sum(-1), want.sum(-1))
    np.testing.assert_array_equal(got, want)
    # The draw is the largest of the kept ones with noise of the row's own key.
    keys = [jax.random.fold_in(jax.random.key(seed), 9) for seed in x.seed]
    noisy = scaled + np.stack([jax.random.gumbel(key, (vocab,)) for key in keys])
    np.testing.assert_array_equal(tokens_of(logits, x, "filtered"), np.where(want, noisy, -np.inf).argmax(-1))


# ---- variants and packed inputs

FEATURES = ("random", "filtered", "penalised", "logprobs", "masked")


@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=5)), ids=str)
def test_a_variant_does_what_is_asked_for(asked):
    needs = {name for name, wanted in zip(FEATURES, asked, strict=True) if wanted}
    name = variant_for(**dict(zip(FEATURES, asked, strict=True)))
    assert needs <= VARIANTS[name]
    assert not any(needs <= does < VARIANTS[name] for does in VARIANTS.values())  # no smaller one does


def test_variants_agree():
    some = {"temperature": [0, 1, 0.5, 2, 1], "seed": np.arange(S), "position": 3}
    for variant, does in VARIANTS.items():
        x = inputs(variant, **(some if "random" in does else {}))
        everything = inputs(**(some if "random" in does else {}))
        np.testing.assert_array_equal(tokens_of(LOGITS, x, variant), tokens_of(LOGITS, everything))
        masks = np.full(mask_shape(S, V, variant), -1, np.int32)
        assert (run(LOGITS, x, None, masks, variant=variant).logprob is not None) == ("logprobs" in does)


@pytest.mark.parametrize("vocab", [V, 320, 321])
def test_a_mask_leaves_what_it_allows(vocab):
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((S, vocab)).astype(np.float32)
    allowed = rng.random((S, vocab)) < 0.05
    allowed[0], allowed[1] = True, np.arange(vocab) == vocab - 1
    bits = np.packbits(np.pad(allowed, ((0, 0), (0, -vocab % 32))), axis=1, bitorder="little")
    masks = bits.view(np.int32)
    assert masks.shape == mask_shape(S, vocab, "everything")
    want = np.where(allowed, logits, -np.inf)
    x = inputs("greedy_masked", (S, C, vocab))
    np.testing.assert_array_equal(tokens_of(logits, x, "greedy_masked", masks), want.argmax(-1))
    # Filters count what is allowed alone: the three likeliest of these.
    drawn = [
        tokens_of(logits, inputs("everything", (S, C, vocab), temperature=1.0, top_k=3, seed=i), "everything", masks)
        for i in range(60)
    ]
    for row in range(S):
        likeliest = np.argsort(-want[row])[: min(3, allowed[row].sum())]
        assert {int(tokens[row]) for tokens in drawn} == set(likeliest.tolist())


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_inputs_reach_the_device(variant):
    rng = np.random.default_rng(5)
    packed = np.zeros((S, packed_width(C, variant)), np.int32)
    x = unpack(packed, variant)
    x.reset(V)
    neutral, fields = inputs(variant), [f.name for f in dataclasses.fields(x) if getattr(x, f.name) is not None]
    for name in fields:
        view = getattr(x, name)
        np.testing.assert_array_equal(view, getattr(neutral, name))
        view[...] = rng.integers(-9, 9, view.shape) if view.dtype == np.int32 else rng.random(view.shape)
    if x.seed is not None:
        x.seed[...] = 0xFFFFFFFF - np.arange(S)
    there = jax.jit(unpack, static_argnums=1)(packed, variant)
    for name in fields:
        got, want = getattr(there, name), getattr(x, name)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert len(jax.tree.leaves(there)) == len(fields)
    x.reset(V, [1, 3])
    for name in fields:
        np.testing.assert_array_equal(getattr(x, name)[[1, 3]], getattr(neutral, name)[[1, 3]])
        np.testing.assert_array_equal(getattr(x, name)[[0, 2]], getattr(there, name)[jnp.array([0, 2])])


def test_only_penalties_need_a_history():
    assert all(packed_width(100_000, variant) < 10 for variant in VARIANTS if "penalised" not in VARIANTS[variant])
    assert packed_width(0, "greedy") == 0
