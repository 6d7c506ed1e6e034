"""How much memory loading takes, measured in a process of its own: python -m tests.weights.measure_loading FOLDER HOW.

Eight virtual devices hold the model's shards in the same process, so that the staging memory is what is above them:
anonymous memory (RssAnon: the mapped file's pages are the kernel's to drop) minus the bytes of the shards placed so
far, sampled every millisecond, as a multiple of one device's shards. glibc is told to return freed blocks at once
(MALLOC_MMAP_THRESHOLD_), as it does by itself with blocks of real models' size.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from icarus_jax.config import EngineConfig
from icarus_jax.models.sharding import Weight, make_mesh_layout, place
from icarus_jax.weights.checkpoint import open_trunk
from icarus_jax.weights.huggingface import config_from_hf
from icarus_jax.weights.params import StoredParam, param_shapes

SIZES = {  # Llama-3.1-70B's proportions, at 1/5.33 of its width, with two layers
    "vocab_size": 24064,
    "hidden_size": 1536,
    "intermediate_size": 5376,
    "num_hidden_layers": 2,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def write_model(folder: pathlib.Path) -> None:
    """A random bfloat16 model, 257 MiB."""
    config = {"model_type": "llama", **SIZES}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in param_shapes(config_from_hf(config, "")).items():
        for tensor, size in StoredParam(name, shape, "bfloat16", None).tensor_shapes().items():
            tensors[tensor] = rng.integers(0x3C00, 0x3D00, size, dtype=np.uint16).view(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")


def measure(folder: pathlib.Path, how: str) -> float:
    """The staging memory, in shards. how: 'place' (ours) or 'callback' (jax.make_array_from_callback)."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.weights.measure_loading", str(folder), how]
    root = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


class Counted:
    """A weight that knows how many bytes of it have been read."""

    def __init__(self, weight: Weight):
        self.weight, self.shape, self.bytes, self.last = weight, weight.shape, 0, 0

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        self.bytes += self.last  # what was read before this lies on its device by now
        piece = self.weight[index]
        self.last = piece.nbytes
        return piece


def main(folder: str, how: str) -> None:
    layout = make_mesh_layout(EngineConfig(mesh="1x8"), SIZES["num_key_value_heads"])
    params = {name: Counted(weight) for name, weight in open_trunk(folder, "bfloat16").params.items()}
    jax.block_until_ready(jax.device_put(np.ones(1000), jax.devices()[7]))
    base, peak, done = anonymous_bytes(), 0, threading.Event()
    arrays: dict[str, jax.Array] = {}

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            placed = sum(array.nbytes for array in list(arrays.values()))
            placed += sum(w.bytes for name, w in params.items() if name not in arrays) if how == "place" else 0
            peak = max(peak, anonymous_bytes() - base - placed)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for name, weight in params.items():
        sharding = layout.param(name, weight.shape)
        if how == "place":
            arrays[name] = place(weight, sharding, "bfloat16")
        else:
            arrays[name] = jax.make_array_from_callback(weight.shape, sharding, weight.__getitem__)
    done.set()
    watcher.join()
    print(peak / sum(array.addressable_shards[0].data.nbytes for array in arrays.values()))


def anonymous_bytes() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
