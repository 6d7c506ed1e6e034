"""Serves the trunk and many heads on one KV cache.

    python launch/serve.py --config=multi.py             the trunk and every adapter in heads/
    python launch/serve.py --config=multi.py:8           the trunk and 8 untrained heads, h0 to h7, for load tests
    python launch/serve.py --config=multi.py:8,isolated  the same heads as ordinary LoRA models: the baseline, which
                                                         shares nothing and fills the cache once per model
    python launch/serve.py --config=multi.py:qwen3-8b,4 --config.trunk.source=Qwen/Qwen3-8B
                                                         another trunk, on eight chips
    python launch/compile_check.py --config=multi.py:llama8b --topology=v5e:2x4
                                                         the sizes of a trunk are enough for this program

The trunks are llama8b, llama70b (Llama 3.1), qwen3-8b, qwen3-14b, qwen3-30b-a3b, granite8b (Granite 3.3), mistral-small
(24B), gemma27b (Gemma 3) and smollm2, with 8 untrained heads unless N says otherwise. GET /v1/models lists what
is served. One more head: --heads=NAME=PATH.
"""

import re

from ml_collections import ConfigDict

from icarus_jax.cli import random_heads, serving_config, trained_heads

# bfloat16 on eight chips, one KV head on each (SmolLM2: on one chip). A page of 64 tokens of one KV head with H = 128
# has 32 KiB, large enough for a DMA of its own.
CHIPS = {"dtype": "bfloat16", "kv_dtype": "bfloat16", "page_size": 64, "max_num_seqs": 64, "max_model_len": 8192}
MODELS = {
    "llama8b": ("llama-3.1-8b", {**CHIPS, "mesh": "1x8", "num_pages": 8192}),
    "llama70b": ("llama-3.1-70b", {**CHIPS, "mesh": "1x8", "num_pages": 4096}),
    "qwen3-8b": ("qwen3-8b", {**CHIPS, "mesh": "1x8", "num_pages": 8192}),
    "qwen3-14b": ("qwen3-14b", {**CHIPS, "mesh": "1x8", "num_pages": 4096}),
    "qwen3-30b-a3b": ("qwen3-30b-a3b", {**CHIPS, "mesh": "1x8", "num_pages": 4096}),
    "granite8b": ("granite-3.3-8b", {**CHIPS, "mesh": "1x8", "num_pages": 8192}),
    "mistral-small": ("mistral-small-24b", {**CHIPS, "mesh": "1x8", "num_pages": 4096}),
    "gemma27b": ("gemma-3-27b", {**CHIPS, "mesh": "1x8", "num_pages": 1792}),
    "smollm2": ("smollm2-135m", {**CHIPS, "num_pages": 4096}),
}
ARGUMENTS = f"N (1 to 999 random heads), N,isolated, MODEL, MODEL,N and MODEL,N,isolated (MODEL: {', '.join(MODELS)})"


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config.

    Args:
        arg: '' (the adapters in heads/), or one of ARGUMENTS.

    Raises:
        ValueError: There is no such argument.
    """
    config = serving_config()
    if not arg:
        heads = trained_heads()
    else:
        match = re.fullmatch(rf"({'|'.join(MODELS)})?(?:(?:^|,)([1-9]\d{{0,2}}))?(,isolated)?", arg)
        if not match or arg == ",isolated":
            raise ValueError(f"no argument {arg!r}; the arguments are {ARGUMENTS}")
        model, count, isolated = match.groups()
        heads = random_heads(int(count or 8), "isolated" if isolated else "shared")
        if model:
            name, engine = MODELS[model]
            config.trunk.update(source=f"sizes:{name}", name=name)
            config.engine.update(engine)
    config.heads.update(heads)
    return config.lock()
