"""An adapter goes from PEFT to Orbax and back bit for bit, and both forms are the same adapter."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from icarus_jax.weights import adapter_files
from icarus_jax.weights.checkpoint import load_trunk
from icarus_jax.weights.peft import load_adapter
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def adapter(request, tmp_path_factory):
    """(the trunk's config, a marked PEFT folder): ranks and scales differ, so that a scale folded in would show."""
    path = tmp_path_factory.mktemp("adapter")
    trunk = load_trunk(tiny.tiny_model("llama", path))
    options = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"o_proj": 5}, "use_rslora": True}
    folder = pathlib.Path(tiny.tiny_adapter(str(trunk.path), path, rank=7, alpha=9, **options))
    file = folder / adapter_files.CONFIG_FILE
    mark = {"icarus": {"kv": "shared", "trunk": trunk.identity}}
    file.write_text(json.dumps(json.loads(file.read_text()) | mark))
    weights = load_file(folder / adapter_files.WEIGHTS_FILE)
    dtype = np.dtype(ml_dtypes.bfloat16 if request.param == "bfloat16" else np.float32)
    save_file({name: values.astype(dtype) for name, values in weights.items()}, folder / adapter_files.WEIGHTS_FILE)
    return trunk.config, folder


def convert(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/convert.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_there_and_back_is_bit_equal(adapter, tmp_path):
    config, folder = adapter
    there, back = tmp_path / "orbax", tmp_path / "peft"
    for source, target, form in ((folder, there, "Orbax checkpoint"), (there, back, "PEFT folder")):
        done = convert(f"--adapter={source}", f"--output={target}")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{target} holds {source} as {form}\n"
    assert not (there / adapter_files.WEIGHTS_FILE).exists()
    want, got = (load_file(path / adapter_files.WEIGHTS_FILE) for path in (folder, back))
    assert want.keys() == got.keys()
    for name, values in want.items():
        assert got[name].dtype == values.dtype and got[name].shape == values.shape
        assert got[name].tobytes() == values.tobytes(), name
    settings = [json.loads((path / adapter_files.CONFIG_FILE).read_text()) for path in (folder, there, back)]
    assert settings[0] == settings[1] == settings[2] and settings[0]["icarus"]["kv"] == "shared"

    adapters = [load_adapter(str(path), config) for path in (folder, there, back)]
    for other in adapters[1:]:
        assert (other.kv_trained, other.trunk_identity) == ("shared", adapters[0].trunk_identity)
        assert other.rank == adapters[0].rank and other.weights.keys() == adapters[0].weights.keys()
        for target, pair in adapters[0].weights.items():
            for mine, theirs in zip(pair, other.weights[target], strict=True):
                np.testing.assert_array_equal(theirs, mine)


def test_a_lower_rank_is_the_nearest_one(adapter, tmp_path):
    config, folder = adapter
    whole = load_adapter(str(folder), config)
    trunk = f"--config.trunk.source={tiny.tiny_model('llama', tmp_path)}"
    done = convert(f"--adapter={folder}", f"--output={tmp_path / 'low'}", "--rank=3", trunk)
    assert done.returncode == 0, done.stderr
    low = load_adapter(str(tmp_path / "low"), config)
    assert (low.rank, low.kv_trained, low.trunk_identity) == (3, whole.kv_trained, whole.trunk_identity)
    for target, (a, b) in whole.weights.items():
        values = np.linalg.svd(a @ b, compute_uv=False)
        lost = np.linalg.norm(a @ b - low.weights[target][0] @ low.weights[target][1], axis=(1, 2))
        np.testing.assert_allclose(lost, np.linalg.norm(values[:, 3:], axis=1), rtol=1e-3, atol=1e-5)
    for rank in (7, 0):
        done = convert(f"--adapter={folder}", f"--output={tmp_path / 'other'}", trunk, f"--rank={rank}")
        words = f"convert.py: --rank: {rank} is no lower rank, of 1 or more, than that of adapter {folder}, 7\n"
        assert (done.returncode, done.stderr) == (2, words) and not (tmp_path / "other").exists()
    assert "--adapter=FOLDER is missing" in convert(f"--output={tmp_path / 'other'}", "--rank=2").stderr


def test_only_with_its_own_trunk_is_an_adapter_truncated(adapter, tmp_path):
    """The new adapter would name the other one as its base model."""
    _, folder = adapter
    other = tiny.tiny_model("llama", tmp_path, seed=1)
    done = convert(f"--adapter={folder}", f"--output={tmp_path / 'low'}", "--rank=3", f"--config.trunk.source={other}")
    assert done.returncode == 2 and "serve it with its own trunk" in done.stderr and not (tmp_path / "low").exists()


def test_mistakes_are_one_line(adapter, tmp_path, monkeypatch):
    _, folder = adapter
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # not installed
    for source, target, words in (
        (folder, tmp_path, "exists already"),
        (tmp_path, tmp_path / "new", "is no adapter: it has no adapter_config.json"),
        (folder, "memory://bucket/new", "the new folder is local or in a bucket"),
        (folder, "gs://bucket/new", "needs another package"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            adapter_files.convert(source, target)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
    done = convert("--adapter=memory://none", f"--output={tmp_path / 'new'}")
    assert done.returncode == 2 and "memory://none is no adapter: it has no adapter_config.json" in done.stderr
    done = convert(f"--adapter={folder}")
    assert (done.returncode, done.stderr) == (2, "convert.py: --output=NEW_FOLDER is missing\n")
