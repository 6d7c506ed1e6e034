"""What `build` checks once the trunk has been read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from configs import single
from icarus_jax import cli
from icarus_jax.cli import composition
from icarus_jax.config import RopeScaling
from icarus_jax.errors import UsageError
from icarus_jax.models.presets import MODELS
from icarus_jax.weights.checkpoint import load_trunk
from pallas_kernels.linear import quantise
from tests import tiny
from tests.engine import harness


def test_a_context_that_the_trunk_was_not_made_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(composition, "enable_compilation_cache", lambda: None)
    config = single.get_config()
    with config.unlocked():
        config.trunk.source = tiny.tiny_model("llama", tmp_path)  # of 512 positions
        config.engine.update(dataclasses.asdict(harness.SMALL) | {"max_model_len": 513, "num_pages": 1024})
    with pytest.raises(UsageError, match=r"max_model_len is 513, .* at most 512 tokens .*=512 or less") as error:
        cli.build(config)
    assert "\n" not in str(error.value)


LINEAR, LLAMA3 = RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0)


@pytest.mark.parametrize("scaling, most", [(None, 100), (LINEAR, 400), (LLAMA3, 100)])
def test_only_linear_scaling_stretches_the_context(scaling, most):
    model = dataclasses.replace(MODELS["smollm2-135m"], max_position_embeddings=100, rope_scaling=scaling)
    engine = dataclasses.replace(harness.SMALL, num_pages=1024)
    composition.check_context(dataclasses.replace(engine, max_model_len=most), model)
    with pytest.raises(UsageError, match=f"max_model_len is {most + 1}.* at most {most} tokens"):
        composition.check_context(dataclasses.replace(engine, max_model_len=most + 1), model)


def test_weights_are_quantised_from_the_numbers_in_the_file(tmp_path, monkeypatch, caplog):
    """Not from what engine.dtype makes of them. The log says that the heads were trained on other numbers."""
    monkeypatch.setattr(composition, "enable_compilation_cache", lambda: None)
    folder = tiny.tiny_model("llama", tmp_path)
    config = single.get_config()
    with config.unlocked():
        config.trunk.source = folder
        config.heads = {"a": {"path": tiny.tiny_adapter(folder, tmp_path), "kv": "shared"}}
        config.engine.update(dataclasses.asdict(harness.SMALL) | {"dtype": "bfloat16", "weights": "fp8"})
        config.engine.kernels = "xla"
    weights, _ = cli.build(config).engine.runner.weights
    assert "engine.weights=fp8: the heads (a) were trained on weights of another precision" in caplog.text
    got, want = weights["blocks"]["down"].get_value(), quantise(load_trunk(folder).params["down"], "fp8")
    np.testing.assert_array_equal(np.float32(got.values), np.float32(want.values))
    np.testing.assert_array_equal(got.scales, want.scales)
    assert weights["final_norm"].get_value().dtype == "bfloat16"


@pytest.mark.parametrize("adapter, words", [(False, "has no weights in fewer bits"), (True, "is not as it is stored")])
def test_what_is_not_stored_in_blocks_cannot_be_kept_so(adapter, words, tmp_path, monkeypatch):
    monkeypatch.setattr(composition, "enable_compilation_cache", lambda: None)
    folder = tiny.tiny_model("llama", tmp_path)
    config = single.get_config()
    with config.unlocked():
        config.trunk.source = folder
        config.trunk.adapter = tiny.tiny_adapter(folder, tmp_path) if adapter else ""
        config.engine.update(dataclasses.asdict(harness.SMALL) | {"weights": "as_stored"})
    with pytest.raises(UsageError, match=words):
        cli.build(config)
