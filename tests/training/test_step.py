"""Training: the loss, its gradient and the step are the paper's, whatever the packing, the batch and the devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from icarus_jax.config import LORA_TARGETS, TARGETS
from icarus_jax.models.block import PROJECTIONS
from icarus_jax.training import data as train_data
from icarus_jax.training import packing
from icarus_jax.training import step as train
from icarus_jax.training.heads import Method, init_heads
from icarus_jax.training.mesh import batch_sharding, make_mesh, place_params
from icarus_jax.training.two_stream import token_logprobs
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter
from tests import tiny
from tests.models import oracle

RANK = 4
METHODS = {
    "shared": Method("shared", targets=LORA_TARGETS, rank=RANK, scale=2.0),
    "isolated": Method("isolated", targets=TARGETS, rank=RANK, scale=2.0),
}
PREFIX = np.array([257, 40, 41], np.int32)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    return load_trunk(tiny.tiny_model("qwen3", tmp_path_factory.mktemp("trunk"), qkv_bias=True))


def params_of(trunk):
    return {name: jnp.asarray(values) for name, values in trunk.params.items()}


def random_heads(trunk, method, seed=0, count=1):
    """Heads whose B is not zero."""
    heads = init_heads(trunk.config, method, params_of(trunk), range(seed, seed + count))
    rng = np.random.default_rng(seed)
    return {t: (a, jnp.asarray(rng.normal(0, 0.05, b.shape), jnp.float32)) for t, (a, b) in heads.items()}


def factors(heads, method, head=0):
    """What the oracle takes: float64, the scale in B."""
    pairs = {t: (np.asarray(a[head], np.float64), np.asarray(b[head], np.float64)) for t, (a, b) in heads.items()}
    return {t: (a, b * method.scale) for t, (a, b) in pairs.items()}


def make_examples(count=7, seed=0, slot=1):
    rng = np.random.default_rng(seed)
    made = []
    for prompt, completion in rng.integers(1, (9, 7), (count, 2)).tolist():
        tokens = np.concatenate([PREFIX, rng.integers(0, 256, prompt + completion)])
        made.append(train_data.Example(tokens.astype(np.int32), len(PREFIX) + prompt, slot))
    return made


def packed(examples, rows=4, length=20, prefix=PREFIX):
    shape = packing.row_shape(examples, prefix, rows, length)
    return packing.validation_batches(examples, prefix, shape)


def oracle_loss(trunk, example, adapter, kv):
    """Summed over the completion, float64."""
    logits = oracle.logits(trunk, example.tokens, adapter, shared=kv == "shared")
    logprobs = oracle.log_softmax(logits)[np.arange(len(example.tokens) - 1), example.tokens[1:]]
    return -logprobs[example.num_prompt - 1 :].sum()


def mean_loss(trunk, method, heads, batches, prefix=PREFIX):
    loss, _ = train.validate(trunk.config, method, heads, params_of(trunk), jnp.asarray(prefix), batches)
    return loss


@pytest.mark.parametrize("kv", METHODS)
@pytest.mark.parametrize("rows, length, prefix", [(4, 20, PREFIX), (1, 60, PREFIX[:1]), (7, 18, PREFIX[:0])])
def test_loss_is_the_oracles_however_packed(trunk, kv, rows, length, prefix):
    method, examples = METHODS[kv], make_examples()
    heads = random_heads(trunk, method)
    want = sum(oracle_loss(trunk, e, factors(heads, method), kv) for e in examples)
    want /= sum(len(e.tokens) - e.num_prompt for e in examples)
    got = mean_loss(trunk, method, heads, packed(examples, rows, length, prefix), prefix)
    np.testing.assert_allclose(got, [want], rtol=1e-4)


def test_conventional_lora_loss_is_pefts(tmp_path):
    folder = tiny.tiny_model("llama", tmp_path)
    adapter = tiny.tiny_adapter(folder, tmp_path, TARGETS, rank=RANK, alpha=8)
    trunk = load_trunk(folder)
    weights = load_adapter(adapter, trunk.config).weights
    heads = {t: (jnp.asarray(a)[None], jnp.asarray(b)[None] / 2.0) for t, (a, b) in weights.items()}  # 2 = alpha / r
    examples = make_examples()
    model, total = tiny.hf_model(folder, adapter), 0.0
    for e in examples:
        labels = torch.tensor(e.tokens, dtype=torch.long)[None].clone()
        labels[:, : e.num_prompt] = -100
        with torch.no_grad():
            mean = model(torch.tensor(e.tokens)[None], labels=labels).loss
        total += float(mean) * (len(e.tokens) - e.num_prompt)
    want = total / sum(len(e.tokens) - e.num_prompt for e in examples)
    np.testing.assert_allclose(mean_loss(trunk, METHODS["isolated"], heads, packed(examples)), [want], rtol=1e-4)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kv", METHODS)
def test_gradient_is_the_oracles_finite_difference(trunk, kv, remat):
    """Along one random direction a factor, against float64 central differences of the NumPy oracle."""
    method = dataclasses.replace(METHODS[kv], remat=remat)
    heads = random_heads(trunk, method)
    example = make_examples(1, seed=3)[0]
    (batch,) = packed([example], rows=1)

    def loss(heads):
        logprobs, _ = token_logprobs(trunk.config, method, heads, params_of(trunk), jnp.asarray(PREFIX), batch)
        return -(logprobs * (batch.target_segments > 0)).sum()

    grads = jax.jit(jax.grad(loss))(heads)
    rng, step = np.random.default_rng(1), 1e-5
    for target, pair in grads.items():
        for side in (0, 1):
            direction = rng.standard_normal(pair[side].shape[1:])
            direction /= np.linalg.norm(direction)

            def moved(by, target=target, side=side, direction=direction):
                adapter = factors(heads, method)
                new = list(adapter[target])
                new[side] = new[side] + by * direction * (method.scale if side else 1.0)
                return oracle_loss(trunk, example, adapter | {target: tuple(new)}, kv)

            want = (moved(step) - moved(-step)) / (2 * step)
            got = float((np.asarray(pair[side][0], np.float64) * direction).sum())
            scale = np.linalg.norm(np.asarray(pair[side]))
            assert scale > 1e-3, target
            assert abs(got - want) < 2e-3 * scale, (target, side, got, want)


@pytest.mark.parametrize("kv", METHODS)
def test_no_gradient_reaches_the_trunk(trunk, kv):
    method = METHODS[kv]
    heads, (batch, *_) = random_heads(trunk, method), packed(make_examples())

    def loss(heads, params):
        return token_logprobs(trunk.config, method, heads, params, jnp.asarray(PREFIX), batch)[0].sum()

    of_heads, of_trunk = jax.jit(jax.grad(loss, argnums=(0, 1)))(heads, params_of(trunk))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(of_heads))
    assert not any(np.asarray(g).any() for g in of_trunk.values())


@pytest.mark.parametrize("kv", METHODS)
def test_full_fine_tuning(trunk, kv):
    """It starts as the trunk itself; a shared head's k and v get no gradient, all other weights do."""
    method = Method(kv, full=True)
    heads, examples = init_heads(trunk.config, method, params_of(trunk), [0]), make_examples()
    want = sum(oracle_loss(trunk, e, None, "shared") for e in examples)
    want /= sum(len(e.tokens) - e.num_prompt for e in examples)
    np.testing.assert_allclose(mean_loss(trunk, method, heads, packed(examples)), [want], rtol=1e-4)
    batch = packed(examples)[0]

    def loss(heads):
        return token_logprobs(trunk.config, method, heads, params_of(trunk), jnp.asarray(PREFIX), batch)[0].sum()

    grads = {name: np.asarray(g) for name, g in jax.jit(jax.grad(loss))(heads).items()}
    qkv, own_k_norm = grads.pop("qkv"), grads.pop("k_norm")
    assert np.abs(qkv[..., :-2, :]).max() > 0
    assert (np.abs(qkv[..., -2:, :]).max() > 0) == (np.abs(own_k_norm).max() > 0) == (kv == "isolated")
    assert all(np.abs(g).max() > 0 for g in grads.values())


OPTIMISER = train.Optimiser(steps=5, lr=1e-2, warmup=1, clip=0.5)


def steps(trunk, method, heads, batches, mesh=None):
    """Trains over [accumulate, B, ..] batches; (heads, losses f32[steps, A])."""
    state, losses = train.init_state(heads, OPTIMISER), []
    params = params_of(trunk) if mesh is None else place_params(trunk.params, mesh)
    if mesh is not None:
        state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
    for batch in batches:
        placed = batch if mesh is None else jax.device_put(batch, batch_sharding(mesh, stacked=True))
        state, metrics = train.train_step(
            trunk.config, method, OPTIMISER, state, params, jnp.asarray(PREFIX), placed, jnp.uint32(0)
        )
        losses.append(np.asarray(metrics.loss))
    return state.heads, np.array(losses)


def stacked(batches):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


@pytest.mark.full
def test_accumulated_batches_are_one_large_batch(trunk):
    method, examples = METHODS["shared"], make_examples(12)
    small = packed(examples, rows=2)
    assert len(small) > 1
    (large,) = packed(examples, rows=2 * len(small))
    a, losses_a = steps(trunk, method, random_heads(trunk, method), [stacked(small)] * 3)
    b, losses_b = steps(trunk, method, random_heads(trunk, method), [stacked([large])] * 3)
    np.testing.assert_allclose(losses_a, losses_b, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-4), a, b)


def test_heads_in_one_pass_are_trained_as_if_alone(trunk):
    method = METHODS["shared"]
    data = [make_examples(6, seed=1, slot=1), make_examples(9, seed=2, slot=2)]
    both, losses = steps(
        trunk, method, random_heads(trunk, method, count=2), [stacked(packed(data[0] + data[1], 8))] * 3
    )
    for i, examples in enumerate(data):
        first = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], random_heads(trunk, method, count=2))
        alone = [dataclasses.replace(e, slot=1) for e in examples]
        head, loss = steps(trunk, method, first, [stacked(packed(alone, 8))] * 3)
        np.testing.assert_allclose(losses[:, i], loss[:, 0], rtol=1e-5)
        mine = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], both)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-4), mine, head)


@pytest.mark.full
def test_other_meshes_train_as_one_device(trunk):
    """Eight devices that split the batch; two that split the trunk's weights.

    Not both at once: XLA's CPU runtime gives eight virtual devices eight threads, which a few collectives in flight
    block for good.
    """
    method = dataclasses.replace(METHODS["shared"], dropout=0.1)
    batches = [stacked(packed(make_examples(24, seed=s), rows=8, length=24)[:1]) for s in range(4)]
    _, want = steps(trunk, method, random_heads(trunk, method), batches)
    assert want[-1] != want[0]
    data = make_mesh()
    assert data.shape == {"data": 8, "model": 1}
    model = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "model"))
    for mesh in (data, model):
        _, got = steps(trunk, method, random_heads(trunk, method), batches, mesh)
        np.testing.assert_allclose(got, want, atol=1e-4)
    placed = place_params(trunk.params, model)
    assert placed["down"].addressable_shards[0].data.shape[1] * 2 == trunk.params["down"].shape[1]


def test_bfloat16_is_close(trunk):
    method, examples = METHODS["shared"], make_examples()
    heads = random_heads(trunk, method)
    want = mean_loss(trunk, method, heads, packed(examples))
    params = {name: values.astype(jnp.bfloat16) for name, values in params_of(trunk).items()}
    low, _ = train.validate(trunk.config, method, heads, params, jnp.asarray(PREFIX), packed(examples))
    assert 0 < abs(low - want) < 0.05 * want


def test_products_in_bfloat16_change_a_loss_by_their_rounding_alone(trunk):
    method, examples = METHODS["shared"], make_examples()
    heads, batches = random_heads(trunk, method), packed(examples)
    narrow = {name: w.astype(jnp.bfloat16) if name in PROJECTIONS else w for name, w in params_of(trunk).items()}
    loss = lambda params: train.validate(trunk.config, method, heads, params, jnp.asarray(PREFIX), batches)[0]  # noqa: E731
    exact, near = loss(params_of(trunk)), loss(narrow)
    np.testing.assert_allclose(near, exact, rtol=5e-3)
    assert not np.array_equal(near, exact)
