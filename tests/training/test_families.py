"""Training of heads on families with options of their own: the loss of both kinds is the oracle's.

transformers judges the oracle (tests/models/test_families.py). Llama and Qwen: test_step.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from icarus_jax.weights.checkpoint import load_trunk
from tests import tiny
from tests.training.test_step import METHODS, factors, make_examples, mean_loss, oracle_loss, packed, random_heads


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS.keys() - {"llama", "mistral", "ministral", "qwen2", "qwen3"}))
def test_the_loss_is_the_oracles(family, tmp_path):
    trunk, examples = load_trunk(tiny.tiny_model(family, tmp_path)), make_examples(3)
    tokens = sum(len(e.tokens) - e.num_prompt for e in examples)
    for kv, method in METHODS.items():
        heads = random_heads(trunk, method)
        want = sum(oracle_loss(trunk, e, factors(heads, method), kv) for e in examples) / tokens
        np.testing.assert_allclose(mean_loss(trunk, method, heads, packed(examples)), [want], rtol=1e-4, err_msg=kv)
