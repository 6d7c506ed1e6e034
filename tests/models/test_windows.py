"""Sliding windows in the engine: chunks, decode steps, prefixes that heads share, and pages that are given back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter
from tests import tiny
from tests.engine.harness import SMALL, drain, make_engine, submit
from tests.models import oracle
from tests.models.test_families import hf_logits

CONFIG = dataclasses.replace(SMALL, num_pages=48, max_num_batched_tokens=16)


@pytest.mark.parametrize("family, gives_back", [("mistral", True), ("gemma2", False), ("gemma3_text", False)])
def test_tokens_in_chunks_and_on_shared_prefixes(family, gives_back, tmp_path):
    """The second pair hits what the first has left, behind the window too; other pages have been written over since."""
    folder = tiny.tiny_model(family, tmp_path, sliding_window=10)
    head = tiny.tiny_adapter(folder, tmp_path, seed=1)
    trunk = load_trunk(folder)
    factors = load_adapter(head, trunk.config).weights
    engine = make_engine(trunk, {"a": (head, "shared")}, config=CONFIG)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 256, 43).tolist()
    for text in (prompt, prompt + rng.integers(0, 256, 9).tolist(), rng.integers(0, 256, 50).tolist()):
        results = {model: submit(engine, model, text, max_tokens=14)[0] for model in ("trunk", "a")}
        freed = 0
        engine.run_inbox()
        while engine.has_work:
            engine.step()
            freed = max([freed, *(seq.num_freed for seq in engine.scheduler.running)])
        assert (freed > 5) == gives_back
        said = results["trunk"].token_ids
        assert said == hf_logits(folder, np.array(text + said))[len(text) - 1 : -1].argmax(-1).tolist()
        assert results["a"].token_ids == oracle.greedy(trunk, text, 14, factors)
    assert results["a"].cached_tokens >= 44  # of the trunk's, which was admitted first


@pytest.mark.parametrize(
    "family, changes",
    [
        ("gemma3_text", {"mesh": "2x2"}),
        ("gemma2", {"kernels": "gpu"}),
        pytest.param("mistral", {"kernels": "xla"}, marks=pytest.mark.full),
        pytest.param("gemma3_text", {"kernels": "gpu"}, marks=pytest.mark.full),
        pytest.param("gemma2", {"mesh": "1x2"}, marks=pytest.mark.full),
    ],
)
def test_other_kernels_and_meshes_say_the_same(family, changes, tmp_path):
    folder = tiny.tiny_model(family, tmp_path, sliding_window=5)
    trunk, prompt = load_trunk(folder), np.random.default_rng(3).integers(0, 256, 11).tolist()
    engine = make_engine(trunk, config=dataclasses.replace(CONFIG, max_num_seqs=2, **changes))
    result, _ = submit(engine, "trunk", prompt, max_tokens=4)[0], drain(engine)
    assert result.token_ids == oracle.greedy(trunk, prompt, 4)
