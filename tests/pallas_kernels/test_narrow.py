"""Products of float32 rows and bfloat16 weights, and their gradient, against float64 products of rounded operands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear.quantised import multiply


def rounded(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)


@pytest.mark.parametrize("shape", [(48, 32), (48, 2, 16), (48, 3, 2, 8)])
def test_operands_are_rounded_and_sums_are_not(shape):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, shape[0])), jnp.float32)
    w = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    seed = jnp.asarray(rng.normal(size=(5, *shape[1:])), jnp.float32)
    out, back = jax.vjp(lambda x: multiply(x, w), x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, np.tensordot(rounded(x), rounded(w), 1), rtol=1e-5, atol=1e-5)
    flat = rounded(w).reshape(shape[0], -1)
    (gradient,) = back(seed)
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, rounded(seed).reshape(5, -1) @ flat.T, rtol=1e-5, atol=1e-5)


def test_the_compiled_product_keeps_the_weights_in_bfloat16():
    x, w = jnp.ones((64, 96)), jnp.ones((96, 128), jnp.bfloat16)
    text = jax.jit(multiply).lower(x, w).as_text()
    assert "tensor<96x128xf32>" not in text
