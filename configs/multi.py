"""The trunk and many heads on one KV cache.

    python launch/serve.py --config=multi.py             the trunk and every adapter in heads/
    python launch/serve.py --config=multi.py:8           the trunk and 8 untrained heads, h0 to h7, for load tests
    python launch/serve.py --config=multi.py:8,isolated  the same as ordinary LoRA models: the baseline, which shares
                                                         nothing and fills the cache once per model

GET /v1/models lists what is served. One more head: --heads=NAME=PATH.
"""

import re
from pathlib import Path

from ml_collections import ConfigDict

from configs import single

HEADS = Path(__file__).resolve().parents[1] / "heads"


def get_config(arg: str = "") -> ConfigDict:
    """arg: '' (the adapters in heads/), 'N' or 'N,isolated' (N random ones). Raises ValueError."""
    config = single.get_config()
    with config.unlocked():
        config.heads.update(_random_heads(arg) if arg else _trained_heads())
    return config


def _trained_heads() -> dict[str, dict[str, str]]:
    folders = sorted(file.parent.name for file in HEADS.glob("*/adapter_config.json"))
    return {name: {"path": f"{HEADS.name}/{name}", "kv": "shared"} for name in folders}


def _random_heads(arg: str) -> dict[str, dict[str, str]]:
    match = re.fullmatch(r"([1-9]\d{0,2})(,isolated)?", arg)
    if not match:
        raise ValueError(f"no argument {arg!r}; the arguments are N (1 to 999 random heads) and N,isolated")
    kv = "isolated" if match[2] else "shared"
    return {f"h{i}": {"path": f"random:{i}", "kv": kv} for i in range(int(match[1]))}
