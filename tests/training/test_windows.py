"""Training on trunks with sliding windows, which reach back into the common prefix: the loss is the oracle's."""

from __future__ import annotations

import numpy as np
import pytest

from icarus_jax.weights.checkpoint import load_trunk
from tests import tiny
from tests.training.test_step import METHODS, factors, make_examples, mean_loss, oracle_loss, packed, random_heads


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_the_loss_is_the_oracles(family, tmp_path):
    trunk, examples = load_trunk(tiny.tiny_model(family, tmp_path, sliding_window=5)), make_examples(3)
    tokens = sum(len(e.tokens) - e.num_prompt for e in examples)
    for kv, method in METHODS.items():
        heads = random_heads(trunk, method)
        want = sum(oracle_loss(trunk, e, factors(heads, method), kv) for e in examples) / tokens
        np.testing.assert_allclose(mean_loss(trunk, method, heads, packed(examples)), [want], rtol=1e-4, err_msg=kv)
