"""The trunk's K/V of a training file on disk: a step that reads them learns what one that computes them learns."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icarus_jax.training import data, kv_store, packing
from icarus_jax.training.heads import Method
from icarus_jax.training.kv_store import KvStore
from icarus_jax.training.two_stream import token_logprobs, trunk_kv
from tests.training.test_step import PREFIX, make_examples, params_of, random_heads, trunk  # noqa: F401

SHAPE = packing.RowShape(1, 24, 16)


@pytest.fixture
def examples():
    return data.numbered(make_examples(count=9), len(PREFIX))


@pytest.fixture
def compute(trunk):  # noqa: F811
    made = jax.jit(functools.partial(trunk_kv, trunk.config))
    return lambda batch: np.asarray(made(params_of(trunk), jnp.asarray(PREFIX), batch))


def test_gradients_are_those_of_computed_kv(trunk, examples, compute, tmp_path):  # noqa: F811
    method = Method("shared", targets=("q_proj", "o_proj", "down_proj"))
    heads = random_heads(trunk, method)
    store = KvStore(tmp_path, trunk.config, trunk.identity, examples, PREFIX)
    store.fill(packing.trunk_batches(examples, PREFIX, 2), compute)
    # Other rows than those that the file was filled with.
    batch = jax.tree.map(lambda x: x[0], next(packing.train_batches(examples, PREFIX, SHAPE, seed=3, accumulate=1)))

    @jax.jit
    @jax.value_and_grad
    def loss(heads, batch):
        logprobs, _ = token_logprobs(trunk.config, method, heads, params_of(trunk), jnp.asarray(PREFIX), batch)
        return -jnp.where(batch.target_segments > 0, logprobs, 0).sum()

    stored = store.attach(batch)
    want, got = loss(heads, batch), loss(heads, stored)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3 * float(jnp.abs(a).max()))
    np.testing.assert_allclose(want[0], got[0], rtol=1e-4)
    real = batch.segments > 0
    zeros = stored.kv * real[..., None, None, None, None]
    assert loss(heads, dataclasses.replace(stored, kv=zeros))[0] == got[0]  # padding is not read
    assert abs(loss(heads, dataclasses.replace(stored, kv=stored.kv[:, ::-1]))[0] - got[0]) > 0.01  # the rest is


def test_a_file_is_found_again_and_an_incomplete_one_is_continued(trunk, examples, compute, tmp_path):  # noqa: F811
    batches = packing.validation_batches(examples, PREFIX, SHAPE)
    assert len(batches) > 2
    asked = []

    def counting(batch):
        asked.append(batch)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return compute(batch)

    def opened(rows=examples, identity=trunk.identity):
        return KvStore(tmp_path, trunk.config, identity, rows, PREFIX)

    with pytest.raises(KeyboardInterrupt):
        opened().fill(batches, counting)
    opened().fill(batches, counting)
    assert [id(batch) for batch in asked] == [id(batch) for batch in (batches[0], batches[1], *batches[1:])]
    opened().fill(batches, counting)
    assert len(asked) == len(batches) + 1
    assert opened().path == opened().path
    assert opened(identity="another").path != opened().path != opened(data.numbered(examples[:-1], 3)).path
    for batch in batches:
        real = batch.segments > 0
        np.testing.assert_array_equal(opened().attach(batch).kv[real], compute(batch)[real].astype(np.float16))


def test_no_room_and_too_large_values_are_said(trunk, examples, compute, tmp_path, monkeypatch):  # noqa: F811
    store = KvStore(tmp_path, trunk.config, trunk.identity, examples, PREFIX)
    with pytest.raises(ValueError, match=r"train without --config\.train\.kv_store"):
        store.fill(packing.trunk_batches(examples, PREFIX, 2), lambda batch: compute(batch) * 1e6)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kv_store.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"no room .* No space left on device; name another folder"):
        KvStore(tmp_path / "more", trunk.config, trunk.identity, examples, PREFIX)
    assert not list((tmp_path / "more").iterdir())
