"""The program: killed runs go on exactly, what is trained is what is served, and mistakes are named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import train as train_config
from icarus_jax.config import HeadConfig
from icarus_jax.engine.engine import Engine
from icarus_jax.models import full_heads
from icarus_jax.training import loop, packing
from icarus_jax.training.corpus import load_data
from icarus_jax.training.log import compare_runs, read_metrics
from icarus_jax.training.two_stream import token_logprobs
from icarus_jax.weights.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter
from icarus_jax.weights.tokenizer import load_tokenizer
from tests import tiny
from tests.engine import harness
from tests.models import oracle

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    return tiny.tiny_model("llama", tmp_path_factory.mktemp("trunk"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Something to learn: letters of a few words, backwards."""
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "words.jsonl"
    words = ["".join(rng.choice(list("abcde"), rng.integers(1, 6))) for _ in range(120)]
    messages = [[{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}] for word in words]
    file.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in messages))
    return file


def settings(trunk, data, output, **more):
    return {
        "trunk.source": trunk,
        "data.path": str(data),
        "output": str(output),
        "data.rows": 8,
        "data.length": 40,
        "head.dropout": 0.1,
        "optimiser.steps": STEPS,
        "optimiser.lr": 1e-2,
        "optimiser.warmup": 2,
        "train.accumulate": 2,
        "train.validate_every": 5,
        "train.checkpoint_every": 2,
        "train.log_every": 1,
    } | {key.replace("__", "."): value for key, value in more.items()}


def train_here(arg, *where, **more):
    """Runs in this process, on its eight devices; returns (config, the heads' folders)."""
    config = train_config.get_config(arg)
    config.update_from_flattened_dict(settings(*where, **more))
    return config, loop.run(config)


def start(trunk, data, output, **more):
    """The program itself, on one device."""
    flags = [f"--config.{key}={value}" for key, value in settings(trunk, data, output, **more).items()]
    env = os.environ | {"XLA_FLAGS": "", "ICARUS_CACHE": str(data.parent / "cache")}
    command = [sys.executable, "launch/train.py", "--config=train.py:words", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(process, condition):
    end = time.monotonic() + 600
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def losses(output):
    return [row["words/loss"] for row in read_metrics(output) if "words/loss" in row]


@pytest.mark.full
def test_killed_and_resumed_is_as_uninterrupted(trunk, data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(trunk, data, whole)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.split() == [str(whole / "heads" / "words")]
    assert f"step {STEPS}/{STEPS}" in err and "min left" in err

    process = start(trunk, data, broken)
    wait_for(process, lambda: any(path.name.isdigit() for path in broken.glob("checkpoints/*")))
    process.kill()
    process.communicate()
    killed_at = len(losses(broken))
    assert 2 <= killed_at < STEPS - 4
    process = start(trunk, data, broken)
    wait_for(process, lambda: len(losses(broken)) > killed_at + 1)
    process.terminate()
    _, err = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "going on from step" in err and "stopped at step" in err
    process = start(trunk, data, broken)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "going on from step" in err

    assert losses(broken) == losses(whole) and len(losses(whole)) == STEPS
    checks = [[row["step"] for row in read_metrics(run) if "words/val_loss" in row] for run in (broken, whole)]
    assert checks[0] == checks[1] == [0, 5, 10, 15, 20, STEPS]
    want, got = (load_file(folder / "heads" / "words" / WEIGHTS_FILE) for folder in (whole, broken))
    assert want.keys() == got.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)

    # The same run on the eight devices of this process.
    train_here("words", trunk, data, tmp_path / "eight")
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(whole), atol=1e-4)


def last_validation(run):
    return [row["words/val_loss"] for row in read_metrics(run) if "words/val_loss" in row][-1]


def served_loss(engine, examples):
    """What the engine says of the held-out rows: nats a completion token."""
    scores = [
        harness.score(engine, "words", example.tokens.tolist())[example.num_prompt - 1 :]
        for example in examples.validation
    ]
    return -np.concatenate(scores).mean()


@pytest.mark.parametrize("kv, rslora", [("shared", False), ("shared", True), ("isolated", False)])
def test_what_is_trained_is_what_is_served(kv, rslora, trunk, data, tmp_path):
    more = {"head__kv": kv, "head__rslora": rslora, "train__accumulate": 1, "optimiser__steps": 6}
    config, (folder,) = train_here("words", trunk, data, tmp_path / "run", **more)
    method, checkpoint = loop.head_method(config.head, 1), load_trunk(trunk)
    examples = load_data(config, ["words"], checkpoint)
    adapter = load_adapter(str(folder), checkpoint.config)
    assert (adapter.kv_trained, adapter.trunk_identity) == (kv, checkpoint.identity)
    heads = {t: (jnp.asarray(a)[None], jnp.asarray(b)[None] / method.scale) for t, (a, b) in adapter.weights.items()}
    engine = harness.make_engine(trunk, {"words": (str(folder), kv)})
    assert served_loss(engine, examples) == pytest.approx(last_validation(tmp_path / "run"), abs=1e-3)
    params = {name: jnp.asarray(values) for name, values in checkpoint.params.items()}
    for example in examples.validation[:4]:
        (batch,) = packing.validation_batches([example], examples.prefix, packing.RowShape(1, 40, 8))
        logprobs, _ = token_logprobs(checkpoint.config, method, heads, params, jnp.asarray(examples.prefix), batch)
        trained = np.asarray(logprobs)[np.asarray(batch.target_segments) > 0]
        served = harness.score(engine, "words", example.tokens.tolist())[example.num_prompt - 1 :]
        np.testing.assert_allclose(served, trained, atol=1e-3)
        plain = oracle.log_softmax(oracle.logits(checkpoint, example.tokens))
        plain = plain[np.arange(len(example.tokens) - 1), example.tokens[1:]][example.num_prompt - 1 :]
        assert np.abs(plain - trained).max() > 0.1  # the head is not the trunk


def test_a_run_learns_and_tells_of_it(trunk, data, tmp_path):
    more = {"optimiser__steps": 30, "optimiser__lr": 2e-2, "head__dropout": 0.0, "train__accumulate": 1}
    _, (one, two) = train_here("words,more", trunk, f"{data},{data}", tmp_path / "run", **more)
    rows = read_metrics(tmp_path / "run")
    for name in ("words", "more"):
        checks = [row[f"{name}/val_loss"] for row in rows if f"{name}/val_loss" in row]
        assert len(checks) == 7 and checks[-1] < 0.8 * checks[0]
        assert all(0 <= row[f"{name}/val_exact"] <= 1 for row in rows if f"{name}/val_exact" in row)
    assert {"lr", "epoch", "tokens_per_s", "examples_per_s", "words/grad_norm"} < rows[-2].keys()
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    compare_runs([tmp_path / "run"] * 2, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"is no training run: it has no config\.json"):
        compare_runs([tmp_path], tmp_path / "none.png")
    a, b = (load_file(folder / WEIGHTS_FILE) for folder in (one, two))
    assert any((a[name] != b[name]).any() for name in a)  # two heads, not one twice
    assert json.loads((one / CONFIG_FILE).read_text())["r"] == 8


def test_a_run_goes_on_from_a_head(trunk, data, tmp_path):
    """At once it is as good as the head was, on another seed too."""
    more = {"optimiser__steps": 4, "head__dropout": 0.0, "head__rslora": True}
    _, (folder,) = train_here("words", trunk, data, tmp_path / "one", **more)
    more |= {"head__init": str(folder), "train__seed": 1, "optimiser__steps": 2}
    train_here("words", trunk, data, tmp_path / "two", **more)
    first = read_metrics(tmp_path / "two")[0]["words/val_loss"]
    assert first == pytest.approx(last_validation(tmp_path / "one"), rel=1e-4)
    with pytest.raises(ValueError, match=r"was trained with kv='shared', rank 8 and targets down_proj.* with .*rank 4"):
        train_here("words", trunk, data, tmp_path / "three", **more, head__rank=4)


def test_examples_are_repeated_and_those_held_out_are_not(trunk, data, tmp_path):
    config = train_config.get_config("words,more")
    config.update_from_flattened_dict(settings(trunk, f"{data},{data}", tmp_path, data__repeat="1,3"))
    examples = load_data(config, ["words", "more"], load_trunk(trunk))
    assert [sum(e.slot == slot for e in examples.training) for slot in (1, 2)] == [114, 342]
    assert [sum(e.slot == slot for e in examples.validation) for slot in (1, 2)] == [6, 6]
    assert len({e.start for e in examples.training}) == 228  # the K/V of a repeated one are stored once


@pytest.mark.full
def test_full_fine_tuning_is_saved(trunk, data, tmp_path):
    more = {"head__method": "full", "optimiser__lr": 1e-3, "head__dropout": 0.0, "optimiser__steps": 2}
    config, (folder,) = train_here("words", trunk, data, tmp_path / "run", **more)
    before, after = load_trunk(trunk), load_trunk(str(folder))
    assert after.identity != before.identity
    np.testing.assert_array_equal(after.params["embed"], before.params["embed"])
    np.testing.assert_array_equal(after.params["qkv"][..., -2:, :], before.params["qkv"][..., -2:, :])
    assert (after.params["gate_up"] != before.params["gate_up"]).any()
    assert json.loads((folder / full_heads.MARK).read_text()) == {"kv": "shared", "trunk": before.identity}
    assert load_tokenizer(after.path).encode("hi")

    # What is trained is what is served: the same log-probabilities, and not the trunk's.
    method, examples = loop.head_method(config.head, 1), load_data(config, ["words"], before)
    own = full_heads.load_full_head(str(folder), "shared", before, "float32")
    engine = Engine.create(
        harness.SMALL, before.config, before.params, {"words": (HeadConfig("words", str(folder)), own)}
    )
    assert served_loss(engine, examples) == pytest.approx(last_validation(tmp_path / "run"), abs=1e-3)
    heads = {name: jnp.asarray(values)[None] for name, values in own.params.items()}
    params = {name: jnp.asarray(values) for name, values in before.params.items()}
    example = examples.validation[0]
    (batch,) = packing.validation_batches([example], examples.prefix, packing.RowShape(1, 40, 8))
    logprobs, _ = token_logprobs(before.config, method, heads, params, jnp.asarray(examples.prefix), batch)
    trained = np.asarray(logprobs)[np.asarray(batch.target_segments) > 0]
    scores = {m: harness.score(engine, m, example.tokens.tolist())[example.num_prompt - 1 :] for m in engine.models}
    np.testing.assert_allclose(scores["words"], trained, atol=1e-3)
    assert np.abs(scores["trunk"] - trained).max() > 0.02


@pytest.mark.parametrize(
    "more, words",
    [
        ({"head__kv": "both"}, "config.head.kv='both'"),
        ({"head__kv": "activated"}, "config.head.kv='activated'; it is one of shared, isolated"),
        ({"head__method": "full"}, "targets and .dropout are LoRA's"),
        ({"head__rank": 0}, "config.head.rank=0"),
        ({"train__checkpoint_every": 0}, "config.train.checkpoint_every=0"),
        ({"head__method": "dora"}, "config.head.method='dora'"),
        ({"head__targets": "q_proj,v_proj"}, "a shared head makes no K/V"),
        ({"head__targets": "qproj"}, "'qproj' is none of"),
        ({"data__rows": 3}, "config.data.rows=3"),
        ({"mesh__model": 3}, "config.mesh.model=3"),
        ({"data__length": 10}, "words.jsonl:1: has"),
        ({"data__path": "/nowhere/x.jsonl"}, "no such file"),
        ({"data__path": ""}, "0 files for 1 heads"),
        ({"data__rows": 0}, "config.data.rows=0"),
        ({"head__dropout": 10}, "config.head.dropout=10"),
        ({"head__dtype": "bf16"}, "config.head.dtype='bf16'; it is one of"),
        ({"head__dtype": "int8"}, "config.head.dtype='int8'"),
        ({"head__names": "words,words", "data__path": "a,b"}, "every head has a name of its own"),
        ({"trunk__tune": True, "trunk__text": "/nowhere/t.jsonl"}, "config.trunk.text=/nowhere/t.jsonl: no such file"),
        ({"trunk__tune": True, "trunk__text_rows": -1}, "config.trunk.text_rows=-1"),
        ({"data__repeat": "1,1"}, "config.data.repeat='1,1'"),
        ({"data__repeat": "0"}, "a number of 1 or more for each of words"),
        ({"head__init": "a,b"}, "names 1 LoRA adapter"),
        ({"head__init": "/nowhere"}, "/nowhere"),
    ],
)
def test_mistakes_are_named(more, words, trunk, data, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        train_here("words", trunk, data, tmp_path / "run", **more)
    assert "\n" not in str(error.value)


def test_a_folder_of_another_run_is_refused(trunk, data, tmp_path):
    train_here("words", trunk, data, tmp_path / "run", optimiser__steps=1)
    with pytest.raises(ValueError, match=r"config\.head\.rank=8, not 4"):
        train_here("words", trunk, data, tmp_path / "run", optimiser__steps=1, head__rank=4)
    with pytest.raises(ValueError, match=r"config\.trunk\.tune=None, not True"):
        train_here("words", trunk, data, tmp_path / "run", optimiser__steps=1, trunk__tune=True)


def test_a_run_that_is_older_than_a_setting_goes_on(trunk, data, tmp_path):
    train_here("words", trunk, data, tmp_path / "run", optimiser__steps=1)
    record = tmp_path / "run" / "config.json"
    had = json.loads(record.read_text())
    assert (had.pop("config.head.init"), had.pop("config.data.repeat")) == ("", "")
    record.write_text(json.dumps(had))
    train_here("words", trunk, data, tmp_path / "run", optimiser__steps=1)
    for key in ("config.trunk.tune", "config.head.rank"):  # of a trunk that was tuned; of any run
        record.write_text(json.dumps(had | {key: 5}))
        with pytest.raises(ValueError, match=f"{key}=5, not"):
            train_here("words", trunk, data, tmp_path / "run", optimiser__steps=1)
        assert json.loads(record.read_text()) == had | {key: 5}


def test_a_run_over_other_data_is_refused(trunk, data, tmp_path):
    """Also over the same tokens, if other ones of them are the completion."""
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "a", "completion": "bcd"}]
    for row in rows:
        (tmp_path / "x.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
        if row is rows[0]:
            train_here("words", trunk, tmp_path / "x.jsonl", tmp_path / "run", optimiser__steps=1)
    with pytest.raises(ValueError, match="data="):
        train_here("words", trunk, tmp_path / "x.jsonl", tmp_path / "run", optimiser__steps=1)


def test_a_head_without_rows_in_a_step_has_no_loss_there(trunk, data, tmp_path):
    """Nor a validation loss, if none of its rows are held out: 0 would be drawn as a wonder."""
    (tmp_path / "few.jsonl").write_text('{"prompt": "ab", "completion": "c"}\n' * 2)
    more = {"optimiser__steps": 6, "train__accumulate": 1, "data__rows": 8, "head__dropout": 0.0}
    train_here("words,few", trunk, f"{data},{tmp_path / 'few.jsonl'}", tmp_path / "run", **more)
    rows = read_metrics(tmp_path / "run")
    assert [row for row in rows if "words/val_loss" in row] and not [row for row in rows if "few/val_loss" in row]
    seen = [row["few/loss"] for row in rows if "few/loss" in row]
    assert len([row for row in rows if "words/loss" in row]) == 6 > len(seen) > 0 and min(seen) > 0


def test_a_saved_head_can_be_bfloat16(trunk, data, tmp_path):
    """A finished run saves its head anew: only the file's numbers are asked for in another format."""
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        _, (folder,) = train_here("words", trunk, data, tmp_path / "run", optimiser__steps=1, head__dtype=dtype)
        tensors = load_file(folder / WEIGHTS_FILE)
        assert {tensor.dtype.name for tensor in tensors.values()} == {dtype}
        assert (folder / WEIGHTS_FILE).stat().st_size > size * sum(tensor.size for tensor in tensors.values())
    assert json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"] == trunk


@pytest.mark.parametrize("arg", ["", "intent,", "a b", "../x"])
def test_bad_config_arguments(arg):
    with pytest.raises(ValueError, match="a head's name"):
        train_config.get_config(arg)
