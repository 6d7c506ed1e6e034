"""kv_append: every implementation against the oracle."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pallas_kernels import kv_append as op


@pytest.mark.parametrize("implementation", [i for i in op.IMPLEMENTATIONS if i != "reference"])
def test_matches_the_oracle(implementation):
    rng = np.random.default_rng(0)
    kv = rng.standard_normal((2, 5, 3, 16, 128)).astype(np.float32)
    k, v = rng.standard_normal((2, 6, 3, 64)).astype(np.float32)
    slots = np.array([3 * 16 + 15, -1, 0, 4 * 16 + 7, -1, 79], np.int32)
    want = op.kv_append(kv, 1, k, v, slots, implementation="reference")
    got = jax.jit(lambda *a: op.kv_append(*a, implementation=implementation))(kv, 1, k, v, slots)
    np.testing.assert_array_equal(got, want)
    assert (want != kv).any() and (want[0] == kv[0]).all()


def test_wrong_shapes_are_refused():
    kv, rows = np.zeros((1, 2, 3, 16, 128), np.float32), np.zeros((4, 3, 64), np.float32)
    with pytest.raises(ValueError, match="do not fit"):
        op.kv_append(kv, 0, rows, rows[:3], np.zeros(4, np.int32))
