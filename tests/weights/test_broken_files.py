"""A file cut short or altered anywhere is one line that names it, or a load that is well formed; nothing else."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from icarus_jax.models import full_heads
from icarus_jax.weights import adapter_files, gguf_file, reading
from icarus_jax.weights.checkpoint import load_trunk, open_trunk, save_orbax
from icarus_jax.weights.params import param_shapes
from icarus_jax.weights.peft import Adapter, load_adapter
from icarus_jax.weights.tokenizer import eos_token_ids, load_tokenizer
from tests.tiny import tiny_adapter, tiny_model, write_gguf
from tests.weights.test_tokenizer import byte_level_gguf

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 264}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> pathlib.Path:
    """A folder with a small one of each kind."""
    top = tmp_path_factory.mktemp("made")
    folder = tiny_model("llama", top, **SIZES)
    shutil.copytree(folder, top / "folder")
    save_orbax(load_trunk(folder), str(top / "orbax"))
    (top / "gguf").mkdir()
    write_gguf(folder, top / "gguf" / "model.gguf")
    (top / "words").mkdir()
    byte_level_gguf(top / "words" / "words.gguf", "qwen2", add_eot_token_id=2)
    shutil.copytree(tiny_adapter(folder, top, rank=2, alpha_pattern={"q_proj": 3}), top / "peft")
    adapter_files.convert(top / "peft", top / "orbax_adapter")
    return top


def check_trunk(path: pathlib.Path) -> None:
    trunk = load_trunk(str(path))
    assert {name: values.shape for name, values in trunk.params.items()} == param_shapes(trunk.config)
    assert isinstance(trunk.identity, str)


def check_tokenizer(path: pathlib.Path) -> None:
    tokenizer = load_tokenizer(str(path))
    assert all(type(token) is int for token in tokenizer("hello").input_ids)
    assert all(0 <= token < 1 << 31 for token in eos_token_ids(tokenizer, str(path)))


def adapter_checker(made: pathlib.Path) -> Callable[[pathlib.Path], None]:
    config = open_trunk(str(made / "folder")).config

    def check(path: pathlib.Path) -> None:
        adapter = load_adapter(str(path), config)
        assert isinstance(adapter, Adapter)
        for target, (a, b) in adapter.weights.items():
            assert (a.shape[1], b.shape[2]) == config.target_shapes[target]
            assert np.isfinite(a).all() and np.isfinite(b).all()

    return check


def altered(whole: bytes, seed: int, flips: int, cuts: int) -> list[bytes]:
    """The content cut off, and with one bit or byte changed, at places that lie densely at its beginning."""
    rng = np.random.default_rng(seed)
    size = len(whole)
    places = {int(size * share) for share in rng.random(flips) ** 3} | set(range(0, min(size, 64), 5))
    found = []
    for place in sorted(places - {size}):
        for value in (whole[place] ^ (1 << int(rng.integers(8))), int(rng.integers(256))):
            found.append(whole[:place] + bytes([value]) + whole[place + 1 :])
    ends = {0, 1, 7, 8, 9, size // 2, size - 1} | {int(size * share) for share in rng.random(cuts) ** 2}
    return found + [whole[:end] for end in sorted(ends) if end < size]


KINDS = [
    ("folder", "config.json", 60),
    ("folder", "model.safetensors", 60),
    ("folder", "tokenizer.json", 30),
    ("folder", "generation_config.json", 30),
    ("gguf", "model.gguf", 150),
    ("words", "words.gguf", 60),
    ("peft", "adapter_config.json", 120),
    ("peft", "adapter_model.safetensors", 80),
    ("orbax", "icarus_trunk.json", 20),
    ("orbax_adapter", "adapter_config.json", 10),
]


def one_line(load: Callable[[pathlib.Path], None], path: pathlib.Path) -> None:
    try:
        load(path)
    except ValueError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 1500, message


@pytest.mark.parametrize("kind, name, flips", KINDS)
def test_a_file_cut_or_altered(kind, name, flips, made, tmp_path):
    folder = tmp_path / kind
    shutil.copytree(made / kind, folder)
    load: Callable[[pathlib.Path], None] = check_trunk
    if kind in ("peft", "orbax_adapter"):
        load = adapter_checker(made)
    elif kind == "words" or "token" in name or "generation" in name:
        load = check_tokenizer
    path = folder / name if name.endswith(".gguf") else folder
    whole = (folder / name).read_bytes()
    for content in altered(whole, len(name), flips, flips // 4):
        (folder / name).write_bytes(content)
        one_line(load, path)
    (folder / name).write_bytes(whole)
    load(path)


@pytest.mark.parametrize("kind", ["orbax", "orbax_adapter"])
def test_a_checkpoint_cut_or_altered(kind, made, tmp_path):
    load = check_trunk if kind == "orbax" else adapter_checker(made)
    files = [
        file for file in sorted((made / kind).rglob("*")) if file.is_file() and len(file.parts) > len(made.parts) + 2
    ]
    assert files
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(made / kind, folder)
        place = folder / file.relative_to(made / kind)
        whole = place.read_bytes()
        for content in altered(whole, number, 1, 0)[::6]:
            place.write_bytes(content)
            one_line(load, folder)
        place.unlink()
        one_line(load, folder)


WRONG: list[tuple[str, dict]] = [
    ("num_layers", {"num_hidden_layers": 1 << 40}),
    ("hidden_size", {"hidden_size": -16}),
    ("vocab_size", {"vocab_size": "264"}),
    ("num_attention_heads", {"num_attention_heads": 0, "head_dim": None}),
    ("head_dim", {"head_dim": 7}),
    ("rms_norm_eps", {"rms_norm_eps": float("nan")}),
    ("rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}),
    ("factor", {"rope_parameters": {"rope_type": "linear", "factor": 0.0}}),
    ("tie_word_embeddings", {"tie_word_embeddings": "no"}),
    ("max_position_embeddings", {"max_position_embeddings": 1.5}),
    ("rope", {"rope_parameters": [1]}),
]


@pytest.mark.parametrize("key, change", WRONG)
def test_sizes_that_cannot_be(key, change, made, tmp_path):
    shutil.copytree(made / "folder", tmp_path / "folder")
    file = tmp_path / "folder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        load_trunk(str(tmp_path / "folder"))
    assert "\n" not in str(error.value) and key in str(error.value)


@pytest.mark.parametrize("weights", [["../../etc/model.safetensors"], [7], ["a\0b"]])
def test_an_index_that_leads_elsewhere(weights, made, tmp_path):
    shutil.copytree(made / "folder", tmp_path / "folder")
    index = {"weight_map": {str(number): weight for number, weight in enumerate(weights)}}
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index"):
        load_trunk(str(tmp_path / "folder"))


def test_a_tensor_in_two_shards(made, tmp_path):
    shutil.copytree(made / "folder", tmp_path / "folder")
    shutil.copy(tmp_path / "folder" / "model.safetensors", tmp_path / "folder" / "two.safetensors")
    index = {"weight_map": {"a": "model.safetensors", "b": "two.safetensors"}}
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lies in two"):
        load_trunk(str(tmp_path / "folder"))


def touch(file: pathlib.Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("kind, name", [("folder", "model.safetensors"), ("gguf", "model.gguf"), ("orbax", None)])
def test_a_trunk_that_changes_while_it_is_read(kind, name, made, tmp_path):
    folder = tmp_path / kind
    shutil.copytree(made / kind, folder)
    trunk = open_trunk(str(folder / name if name and name.endswith(".gguf") else folder))
    assert trunk.params["embed"][:, :].shape == (264, 16)
    file = folder / name if name else max((folder / "params").rglob("*"), key=lambda file: file.stat().st_size)
    with file.open("r+b") as cut:
        cut.truncate(100)  # memory-mapped: to read on would kill the process
    for part in ("embed", "down"):
        whole = (slice(None),) * len(trunk.params[part].shape)
        with pytest.raises(ValueError, match=r"changed while it was read|cannot be read") as error:
            trunk.params[part][whole]
        assert str(folder) in str(error.value)


CUT_IN_A_READ = """
import contextlib, os, sys
from icarus_jax.weights import gguf, huggingface
from icarus_jax.weights.checkpoint import open_trunk
trunk = open_trunk(sys.argv[1])
for module in (gguf, huggingface):  # these look for changes before and after
    module.unchanged = lambda *_: contextlib.nullcontext()
os.truncate(sys.argv[2], 100)
for read in (lambda: trunk.params["embed"][:, :], lambda: trunk.identity):
    try:
        read()
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("kind, name", [("folder", "model.safetensors"), ("gguf", "model.gguf")])
def test_a_trunk_that_is_cut_off_in_the_middle_of_a_read(kind, name, made, tmp_path):
    """A mapped file would end the process: SIGBUS."""
    shutil.copytree(made / kind, tmp_path / kind)
    file = tmp_path / kind / name
    args = [sys.executable, "-c", CUT_IN_A_READ, str(file if kind == "gguf" else file.parent), str(file)]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.returncode, done.stderr)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{file} ends in the middle") for line in lines), lines


@pytest.mark.parametrize("kind", ["peft", "orbax_adapter"])
def test_an_adapter_that_changes_while_it_is_read(kind, made, tmp_path, monkeypatch):
    shutil.copytree(made / kind, tmp_path / kind)
    files = [file for file in (tmp_path / kind).rglob("*") if file.is_file()]
    files = [file for file in files if "README" not in file.name]
    for file in files:
        real = adapter_files._read_tensors
        monkeypatch.setattr(
            adapter_files, "_read_tensors", lambda path, file=file, real=real: (touch(file), real(path))[1]
        )
        with pytest.raises(ValueError, match="changed while it was read"):
            adapter_files.read(tmp_path / kind)
        monkeypatch.undo()
    adapter_files.read(tmp_path / kind)


def test_a_pipe_is_no_adapter(made, tmp_path):
    shutil.copytree(made / "peft", tmp_path / "peft")
    for name in (adapter_files.WEIGHTS_FILE, adapter_files.CONFIG_FILE):  # to open it would wait for ever
        (tmp_path / "peft" / name).unlink()
        os.mkfifo(tmp_path / "peft" / name)
        with pytest.raises(ValueError, match="is no adapter"):
            adapter_files.read(tmp_path / "peft")


def test_gguf_tensors_lie_one_after_the_other(made, tmp_path):
    whole = (made / "gguf" / "model.gguf").read_bytes()
    at = whole.index(b"blk.0.ffn_norm.weight") + len(b"blk.0.ffn_norm.weight") + 4 + 8 + 4
    (tmp_path / "a.gguf").write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])  # its data: another tensor's
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_norm\.weight"):
        gguf_file.read_gguf(tmp_path / "a.gguf")
    twice = whole.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight")
    (tmp_path / "b.gguf").write_bytes(twice)
    with pytest.raises(ValueError, match="twice"):
        gguf_file.read_gguf(tmp_path / "b.gguf")


def test_gguf_names_are_whole_names(made, tmp_path):
    whole = (made / "gguf" / "model.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(whole.replace(b"blk.0.attn_norm", b"xlk.0.attn_norm"))
    with pytest.raises(ValueError, match=r"attn_norm|input_layernorm"):
        open_trunk(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'\xff{"kv"',
        b"[]",
        b"{}",
        b'{"kv":"shared"}',
        b'{"kv":"shared","trunk":5}',
        b'{"kv":["shared"],"trunk":"t"}',
    ],
)
def test_a_broken_mark_of_a_full_head(content, made, tmp_path):
    (tmp_path / full_heads.MARK).write_bytes(content)
    with pytest.raises(ValueError, match=full_heads.MARK) as error:
        full_heads.load_full_head(str(tmp_path), "shared", open_trunk(str(made / "folder")), "float32")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_whole_keeps_a_message_that_names_the_file():
    with pytest.raises(ValueError, match=r"^here: two lines$"), reading.whole("here", "is broken"):
        raise ValueError("here: two\n lines")
    with pytest.raises(ValueError, match=r"^here is broken \(KeyError: 'x'\)$"), reading.whole("here", "is broken"):
        raise KeyError("x")
