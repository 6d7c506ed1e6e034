"""The differences between servers: how a request names an adapter, and what the metrics are called."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one kind of server is asked, and how its metrics are read.

    Our words for metrics are `prefill` (prompt tokens computed), `evictions` (pages), `preemptions`, `steps`, `busy`
    (seconds spent in steps), and the gauges `pages_used` and `pages_cached`. A server that does not count the computed
    prompt tokens has `all` (all prompt tokens) and `cached` (those found in the cache) instead of `prefill`.

    Attributes:
        metrics: our word -> the server's names for it. The values of all names and labels are added up.
        numbered: whether the server knows its adapters by numbers rather than names, as llama.cpp does.
        sessions: whether a request can name the conversation that it belongs to, for a router of several replicas.
    """

    metrics: Mapping[str, tuple[str, ...]]
    numbered: bool = False
    sessions: bool = False

    def body(self, model: str, session: str = "") -> dict[str, Any]:
        """Returns the fields of a request that choose a model, and name the conversation.

        Args:
            model: the model's name. A server with numbered adapters takes 'adapterN', and any other name as its base
                model.
            session: the conversation; '' if it has no name.
        """
        if not self.numbered:
            return {"model": model} | ({"session": {"id": session}} if session and self.sessions else {})
        number = re.fullmatch(r"adapter(\d+)", model)  # llama.cpp gives adapters that are not listed a scale of 0
        chosen = {"id": int(number[1]), "scale": 1.0} if number else {"id": 0, "scale": 0.0}
        return {"model": model, "lora": [chosen]}

    def read(self, text: str) -> dict[str, float]:
        """Reads a page of metrics in Prometheus's text format.

        Args:
            text: the page.

        Returns:
            Our word -> its value. Words whose metric is not on the page are left out.
        """
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
        },
        sessions=True,
    ),
    "vllm": Dialect(
        {
            "all": ("vllm:prompt_tokens_total",),
            "cached": ("vllm:prefix_cache_hits_total",),
            "preemptions": ("vllm:num_preemptions_total",),
            "pages_used": ("vllm:kv_cache_usage_perc",),  # a share of all pages, not a number of pages
        }
    ),
    "llama.cpp": Dialect({"prefill": ("llamacpp:prompt_tokens_total",)}, numbered=True),
}
