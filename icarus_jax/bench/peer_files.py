"""`bench.py peers`: writes the trunk and the heads of a config as files that vLLM and llama.cpp's server read.

All files hold the float32 numbers that our engine uses, so that every system computes the same thing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from icarus_jax import cli
from icarus_jax.config import ModelConfig
from icarus_jax.errors import usage_errors
from icarus_jax.weights import peft, sources, tokenizer
from icarus_jax.weights.gguf import MODULES, GgufTrunk

GGUF_TARGETS = {module.split(".")[-1]: name for module, name in MODULES.items() if "experts" not in module}


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """Returns the content of a Hugging Face config.json for a Llama model.

    Args:
        model: the model's configuration.

    Raises:
        ValueError: the model is of another family, or has rope scaling.
    """
    if model.family != "llama" or model.rope_scaling is not None:
        raise ValueError("peers' files are written for Llama models without rope scaling only")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.rms_norm_eps,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": "float32",
    }


def write_hf(source: Path, folder: Path) -> None:
    """Writes a GGUF trunk as a Hugging Face folder in float32.

    Args:
        source: the GGUF file.
        folder: the folder to write.

    Raises:
        ValueError: the model cannot be written; see `hf_config`.
    """
    trunk = GgufTrunk(source)
    config = hf_config(trunk.config)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tuple(slice(0, n) for n in trunk.shape(name)) for name in trunk.names}
    weights = {name: np.ascontiguousarray(trunk.read(name, whole[name]), np.float32) for name in trunk.names}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save_tokenizer(source, str(folder))


def write_gguf(source: Path, file: Path) -> None:
    """Writes a GGUF trunk with its tensors in float32. All its other fields are kept.

    Args:
        source: the GGUF file.
        file: the GGUF file to write.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(file, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    _finish(writer)


def write_lora(adapter: peft.Adapter, model: ModelConfig, file: Path) -> None:
    """Writes an adapter of a Llama model as a GGUF file for llama.cpp.

    llama.cpp has the rows of q and k in an order of its own.

    Args:
        adapter: the adapter.
        model: the trunk's configuration.
        file: the GGUF file to write.
    """
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))  # the scale is in the weights
    heads = {"q_proj": model.num_heads, "k_proj": model.num_kv_heads}
    for target, (a, b) in adapter.weights.items():
        for layer in range(model.num_layers):
            rows = np.ascontiguousarray(b[layer].T)  # [dout, r]
            if target in heads:
                halves = rows.reshape(heads[target], 2, model.head_dim // 2, -1)
                rows = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
            name = f"blk.{layer}.{GGUF_TARGETS[target]}.weight"
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a[layer].T))
            writer.add_tensor(f"{name}.lora_b", rows)
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(config: ConfigDict, out: Path) -> dict[str, Any]:
    """Runs the command: writes hf/ and trunk.gguf, and for every head a PEFT folder NAME/ and NAME.gguf.

    Args:
        config: a config for serving; its trunk is a GGUF file.
        out: the folder to write to.

    Returns:
        The folder, and the names of the heads.

    Raises:
        UsageError: the trunk or an adapter cannot be read, or cannot be written in these formats.
    """
    with usage_errors("config.trunk.source"):
        source = Path(str(sources.resolve(config.trunk.source)))
        if source.suffix != ".gguf":
            raise ValueError(f"{source}: peers' files are made of a GGUF trunk")
        write_hf(source, out / "hf")
        write_gguf(source, out / "trunk.gguf")
    model = GgufTrunk(source).config
    for name, head in config.heads.items():
        with usage_errors(f"head {name!r}"):
            adapter = peft.load_adapter(cli.home_path(head.path), model)
        peft.save_adapter(str(out / name), adapter, base_model_name=str(out / "hf"), alpha=adapter.rank)
        write_lora(adapter, model, out / f"{name}.gguf")
    print(f"written: {out}/hf, {out}/trunk.gguf, and of each head a PEFT folder and a .gguf: {', '.join(config.heads)}")
    return {"out": str(out), "heads": list(config.heads)}
