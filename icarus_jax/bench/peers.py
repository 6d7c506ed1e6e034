"""What differs between servers: how an adapter is named, and what their metrics are called."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Dialect:
    """metrics: our word -> the server's names, whose values are added up over names and labels. Our words:

    prefill: prompt tokens computed (or, where the server counts so, all: all prompt tokens, and cached: those found in
    the cache); evictions in pages; preemptions; steps, and busy: seconds in them; pages_used and pages_cached: gauges.
    numbered: the server knows its adapters by numbers, not by names: llama.cpp's way.
    """

    metrics: Mapping[str, tuple[str, ...]]
    numbered: bool = False

    def body(self, model: str) -> dict[str, Any]:
        """The fields of a request that choose a model."""
        if not self.numbered:
            return {"model": model}
        number = re.fullmatch(r"adapter(\d+)", model)  # those that a request does not name have no weight in it
        chosen = {"id": int(number[1]), "scale": 1.0} if number else {"id": 0, "scale": 0.0}
        return {"model": model, "lora": [chosen]}

    def read(self, text: str) -> dict[str, float]:
        """The values on a metrics page, by our words; those that it does not have are left out."""
        found = {}
        for word, names in self.metrics.items():
            patterns = [re.escape(name) + ("" if "{" in name else r"(?:\{[^}]*\})?") for name in names]
            values = re.findall(rf"^(?:{'|'.join(patterns)}) (\S+)", text, re.M)
            if values:
                found[word] = sum(map(float, values))
        if "all" in found:
            found["prefill"] = found.pop("all") - found.get("cached", 0.0)
        return found


DIALECTS = {
    "icarus": Dialect(
        {
            "prefill": ("icarus_prefill_tokens_total",),
            "evictions": ("icarus_page_evictions_total",),
            "preemptions": ("icarus_num_preemptions_total",),
            "busy": ("icarus_engine_device_seconds_total", "icarus_engine_host_seconds_total"),
            "steps": ("icarus_engine_steps_total",),
            "pages_used": ('icarus_kv_pages{state="used"}',),
            "pages_cached": ('icarus_kv_pages{state="cached"}',),
        }
    ),
    "vllm": Dialect(
        {
            "all": ("vllm:prompt_tokens_total",),
            "cached": ("vllm:prefix_cache_hits_total",),
            "preemptions": ("vllm:num_preemptions_total",),
            "pages_used": ("vllm:kv_cache_usage_perc",),  # a share of all
        }
    ),
    "llama.cpp": Dialect({"prefill": ("llamacpp:prompt_tokens_total",)}, numbered=True),
}
