"""Servers for the clients of frameworks, which are told not to call home."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

# Before a framework is imported.
os.environ.update(
    OPENAI_AGENTS_DISABLE_TRACING="1",
    LANGSMITH_TRACING="false",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
)

from icarus_jax import cli
from icarus_jax.config import EngineConfig
from icarus_jax.weights.tokenizer import load_tokenizer
from tests import tiny
from tests.engine.harness import make_engine
from tests.server.served import Served

SMALL = EngineConfig(num_pages=512, max_num_seqs=2, max_num_batched_tokens=64, max_model_len=2048)


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    """The tiny trunk and its heads a and b: for what only checks the protocol."""
    path = tmp_path_factory.mktemp("frameworks")
    folder = tiny.tiny_model("llama", path, max_position_embeddings=SMALL.max_model_len)
    heads = {name: (tiny.tiny_adapter(folder, path, seed=seed), "shared") for seed, name in enumerate("ab")}
    tokenizer = load_tokenizer(folder)
    engine = make_engine(folder, heads, SMALL, (tokenizer.eos_token_id,))
    with contextlib.closing(Served(engine, tokenizer, (tokenizer.eos_token_id,))) as server:
        yield server


@pytest.fixture(scope="module")
def smollm() -> Iterator[Served]:
    """SmolLM2-135M-Instruct and the heads that were trained for it, as `make serve` serves them."""
    config = cli.load_config("multi.py")
    with config.unlocked():
        config.engine.update(max_num_seqs=2, num_pages=512, max_model_len=2048, max_num_batched_tokens=128)
    app = cli.build(config)
    with contextlib.closing(Served(app.engine, app.tokenizer, app.eos_ids)) as server:
        yield server
