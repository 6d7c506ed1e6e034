"""Training of heads on families with options of their own: the loss of both kinds is the oracle's.

transformers judges the oracle (tests/models/test_families.py). Llama and Qwen: test_step.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from icarus_jax.config import TARGETS, ModelConfig
from icarus_jax.training.heads import TrunkLora
from icarus_jax.training.loop import fit_targets
from icarus_jax.weights.checkpoint import load_trunk
from tests import tiny
from tests.training.test_step import METHODS, factors, make_examples, mean_loss, oracle_loss, packed, random_heads


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS.keys() - {"llama", "mistral", "ministral", "qwen2", "qwen3"}))
def test_the_loss_is_the_oracles(family, tmp_path):
    trunk, examples = load_trunk(tiny.tiny_model(family, tmp_path)), make_examples(3)
    tokens = sum(len(e.tokens) - e.num_prompt for e in examples)
    for kv, method in METHODS.items():
        method = fit_targets(method, ConfigDict({"targets": ""}), trunk.config)
        heads = random_heads(trunk, method)
        want = sum(oracle_loss(trunk, e, factors(heads, method), kv) for e in examples) / tokens
        np.testing.assert_allclose(mean_loss(trunk, method, heads, packed(examples)), [want], rtol=1e-4, err_msg=kv)


def test_targets_that_the_trunk_has():
    """All by default; one that is named and that the trunk does not have is refused."""
    dense = ModelConfig("llama", 64, 24, 40, 3, 4, 2, 8)
    mixture = dataclasses.replace(dense, num_experts=4, num_experts_per_tok=2)
    anything, named = ConfigDict({"targets": ""}), ConfigDict({"targets": "q_proj,up_proj"})
    assert fit_targets(METHODS["shared"], anything, dense) == METHODS["shared"]
    assert fit_targets(METHODS["shared"], anything, mixture).targets == ("q_proj", "o_proj")
    lora = TrunkLora(TARGETS, 4, 2.0)
    assert fit_targets(lora, anything, mixture) == TrunkLora(("k_proj", "v_proj", "q_proj", "o_proj"), 4, 2.0)
    with pytest.raises(ValueError, match=r"config.trunk.targets: this trunk has no gate_proj"):
        fit_targets(lora, named, mixture)
    with pytest.raises(ValueError, match=r"no up_proj, but experts.*it has q_proj, k_proj, v_proj, o_proj"):
        fit_targets(dataclasses.replace(METHODS["shared"], targets=("q_proj", "up_proj")), named, mixture)
