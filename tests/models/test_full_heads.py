"""A fully fine-tuned head beside the trunk: it decodes with its own weights, from the trunk's K/V alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from configs import single
from icarus_jax import cli
from icarus_jax.config import HeadConfig
from icarus_jax.engine.engine import Engine
from icarus_jax.errors import UsageError
from icarus_jax.models import full_heads
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter
from tests import tiny
from tests.engine import harness
from tests.models import oracle


@pytest.fixture(scope="module", params=["gpt_oss", "qwen3"])
def saved(request, tmp_path_factory):
    """(the trunk's folder, the trunk, the head's folder, a checkpoint of the head's weights)."""
    path = tmp_path_factory.mktemp("full")
    folder = tiny.tiny_model(request.param, path, **({"qkv_bias": True} if request.param == "qwen3" else {}))
    trunk, rng = load_trunk(folder), np.random.default_rng(5)
    own = {
        name: trunk.params[name] + rng.normal(0, 0.1, trunk.params[name].shape).astype(np.float32)
        for name in full_heads.OWN_PARAMS
        if name in trunk.params
    }
    full_heads.save_full_head(str(path / "head"), full_heads.FullHead(own), "shared", trunk)
    return folder, trunk, path / "head", dataclasses.replace(trunk, params={**trunk.params, **own})


def served(trunk, path) -> Engine:
    head = full_heads.load_full_head(str(path), "shared", trunk, "float32")
    # What makes keys and values must go unused: the head reads the trunk's.
    for name, values in head.params.items():
        if name.startswith("qkv"):
            values[..., -2:, :] = 1e9
        if name == "k_norm":
            values[...] = 1e9
    heads = {"own": (HeadConfig("own", str(path)), head)}
    return Engine.create(harness.SMALL, trunk.config, trunk.params, heads)


def test_it_is_the_oracles_and_the_trunk_stays_itself(saved):
    _, trunk, path, decoder = saved
    engine = served(trunk, path)
    prompt = np.random.default_rng(1).integers(0, 256, 37).tolist()
    results = {m: harness.submit(engine, m, prompt, max_tokens=10)[0] for m in ("own", "trunk", "own")}
    harness.drain(engine)
    want = oracle.greedy(trunk, prompt, 10, decoder=decoder)
    assert results["own"].token_ids == want != results["trunk"].token_ids
    assert results["trunk"].token_ids == oracle.greedy(trunk, prompt, 10)
    assert engine.stats.prefill_tokens == len(prompt)  # one prefill, in two chunks, for both models
    text = prompt + want
    for model, own in (("own", decoder), ("trunk", None)):
        logprobs = oracle.log_softmax(oracle.logits(trunk, text, decoder=own))
        expected = logprobs[np.arange(len(text) - 1), text[1:]]
        np.testing.assert_allclose(harness.score(engine, model, text), expected, atol=2e-3)


def config_of(folder: str, *heads: str):
    config = single.get_config()
    with config.unlocked():
        config.trunk.source = folder
        config.engine.update(dataclasses.asdict(harness.SMALL))
    cli.add_heads(config, heads)
    return config


def test_programs_serve_it(saved, monkeypatch):
    folder, trunk, path, decoder = saved
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)
    engine = cli.build(config_of(folder, f"own={path}")).engine
    assert harness.generate(engine, "own", [5, 6, 7], max_tokens=5).token_ids == oracle.greedy(
        trunk, [5, 6, 7], 5, decoder=decoder
    )


def test_what_cannot_be_served_is_refused(saved, tmp_path, monkeypatch):
    folder, trunk, path, _ = saved
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)
    with pytest.raises(UsageError, match=r"'own'.*kv='shared' alone"):
        cli.build(config_of(folder, f"own={path}:isolated"))
    with pytest.raises(UsageError, match="'own' is fully fine-tuned: an engine holds one such head"):
        cli.build(config_of(folder, f"own={path}", "h=random:1"))
    other = dataclasses.replace(trunk, identify=lambda: "f" * 64)
    with pytest.raises(ValueError, match="not on the one loaded, ffffffffffff"):
        full_heads.load_full_head(str(path), "shared", other, "float32")
    copy = Path(tmp_path / "ordinary")
    copy.mkdir()
    (copy / full_heads.MARK).write_text(json.dumps({"kv": "isolated", "trunk": trunk.identity}))
    with pytest.raises(ValueError, match=r"--config\.trunk\.source="):
        full_heads.load_full_head(str(copy), "shared", trunk, "float32")
    with pytest.raises(ValueError, match="is no adapter"):
        load_adapter(str(path), trunk.config)
