"""The loss of a trunk on texts, against transformers."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from icarus_jax import cli
from icarus_jax.bench import loss
from icarus_jax.errors import UsageError
from tests import tiny
from tests.test_llm import ENGINE


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["icarus_jax.cli.composition"], "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(loss, "CHUNK", 40)
    made = cli.serving_config()
    made.trunk.update(source=tiny.tiny_model("llama", tmp_path), name="trunk")
    made.engine.update(ENGINE)
    return made


def test_the_loss_is_transformers(config, tmp_path):
    plain, rows = tmp_path / "plain.txt", tmp_path / "rows.jsonl"
    plain.write_text("x" * 60 + "quick brown fox")  # two chunks of 40 and 35 tokens
    rows.write_text(json.dumps({"a": "one", "b": [{"c": "two"}], "n": 3}) + "\n" + json.dumps("three") + "\n")
    report = loss.run(config, [str(plain), str(rows)], 1000)

    model, tokenizer = tiny.hf_model(config.trunk.source), tiny.tiny_tokenizer()
    losses = {}
    for path, texts in (
        (plain, [plain.read_text()[:40], plain.read_text()[40:]]),
        (rows, ["one\ntwo", "three"]),
    ):
        losses[str(path)] = []
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                logprobs = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
            losses[str(path)] += (-logprobs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]).tolist()
    whole = np.concatenate(list(losses.values()))
    assert report["tokens"] == len(whole) == 39 + 34 + 6 + 4
    assert report["files"] == {path: pytest.approx(np.mean(values), abs=1e-4) for path, values in losses.items()}
    assert report["loss"] == pytest.approx(whole.mean(), abs=1e-4)
    assert report["perplexity"] == pytest.approx(np.exp(whole.mean()), rel=1e-4)
    assert 0 < report["standard_error"] < 1


def test_every_file_has_its_share(config, tmp_path):
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in files:
        file.write_text("abcdefgh" * 20)
    report = loss.run(config, [str(file) for file in files], 100)
    assert report["tokens"] == 100 and len(report["files"]) == 2


def test_chunks_are_no_longer_than_the_engine_takes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 1024)
    config.engine.max_model_len = 30
    (text := tmp_path / "a.txt").write_text("abcdefgh" * 10)
    assert loss.run(config, [str(text)], 1000)["tokens"] == 28 + 28 + 21


def test_what_cannot_be_read_is_said(config, tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        loss.texts_of([str(tmp_path / "nowhere")])
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UsageError, match=r"bad\.jsonl"):
        loss.texts_of([str(tmp_path / "bad.jsonl")])
    (tmp_path / "one.txt").write_text("")
    with pytest.raises(UsageError, match="two tokens"):
        loss.run(config, [str(tmp_path / "one.txt")], 10)
    with pytest.raises(UsageError, match="--texts"):
        loss.run(config, [], 10)
    for tokens in (1, 0, -5):
        with pytest.raises(UsageError, match=f"--tokens={tokens}: it is at least 1 for each file, 2 in all"):
            loss.run(config, ["a", "b"], tokens)


def test_a_row_may_hold_other_ends_of_lines(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps("one\u2028two\x85three", ensure_ascii=False) + "\n\n" + json.dumps("four") + "\n")
    assert loss.texts_of([str(rows)]) == ["one\u2028two\x85three", "four"]
