"""Prometheus metrics: the engine's counters, and the latencies that the server measures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from icarus_jax.engine.stats import EngineStats
from icarus_jax.page_store.stats import StoreStats
from icarus_jax.scheduling.registry import NO_SLOT, Model
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.server.timeline import Timeline, between

MAX_MODELS = 100  # with series of their own: a scrape of thousands would hold up the server for seconds
OTHERS = "others"  # the model_name of all the others
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class HasStats(Protocol):
    """Anything with counters, models and a scheduler like an engine's."""

    scheduler: Scheduler

    @property
    def stats(self) -> EngineStats:
        """The counters as of now."""
        ...

    @property
    def models(self) -> Mapping[str, Model]:
        """The served models by name."""
        ...


# (name, attribute of EngineStats, help)
_COUNTERS = (
    ("icarus_sequences", "requests", "Sequences admitted by the engine (n counts n times)."),
    ("icarus_engine_prompt_tokens", "prompt_tokens", "Prompt tokens of the sequences admitted."),
    ("icarus_engine_generation_tokens", "generated_tokens", "Tokens that the engine generated."),
    ("icarus_prefill_tokens", "prefill_tokens", "Prompt tokens computed by the trunk, recomputation included."),
    ("icarus_num_preemptions", "preemptions", "Sequences preempted for want of pages."),
    ("icarus_page_evictions", "evictions", "Cached pages given up for others."),
    ("icarus_fan_out_requests", "fan_out_requests", "Requests for several models at once."),
    ("icarus_handoffs", "handoffs", "Sequences that went over to another model."),
    ("icarus_head_loads", "head_loads", "Heads loaded while the server runs, new versions included."),
    ("icarus_head_unloads", "head_unloads", "Heads unloaded."),
    ("icarus_slot_loads", "slot_loads", "Adapters copied into a slot on the device."),
    ("icarus_slot_evictions", "slot_evictions", "Adapters that gave their slot to another."),
    ("icarus_reuse_pages_checked", "reuse_pages_checked", "Reused pages computed again (engine.check_reuse)."),
    ("icarus_reuse_pages_identical", "reuse_pages_identical", "... with the same bits."),
    ("icarus_reuse_pages_different", "reuse_pages_different", "... with a difference beyond rounding: a fault."),
    ("icarus_engine_step_failures", "step_failures", "Steps that failed and ended the requests that they ran."),
    ("icarus_engine_steps", "steps", "Engine steps."),
    ("icarus_engine_host_seconds", "host_seconds", "Seconds in which the device waited for the host."),
    ("icarus_engine_device_seconds", "device_seconds", "Other seconds while there was work."),
)
_GAUGES = (
    ("icarus_num_requests_running", "running", "Sequences running."),
    ("icarus_num_requests_waiting", "waiting", "Sequences waiting."),
    ("icarus_sessions", "sessions", "Sessions that hold pages."),
    ("icarus_parked_sessions", "parked_sessions", "Sessions whose pages the page store has."),
)
# Of the tiers below the device's pages: (name, attribute of StoreStats, help)
_STORE_COUNTERS = (
    ("icarus_page_store_saved_pages", "saved_pages", "KV pages saved in host memory, a folder or a bucket."),
    ("icarus_page_store_saved_bytes", "saved_bytes", "... their bytes."),
    ("icarus_page_store_lost_pages", "lost_pages", "KV pages that could not be saved, or not in time."),
    ("icarus_page_store_misses", "misses", "KV pages looked for that were nowhere."),
    (
        "icarus_page_store_invalid_pages",
        "invalid_pages",
        "Stored KV pages that were torn, altered or foreign: removed.",
    ),
    ("icarus_page_store_loads", "loads", "Loads of KV pages for waiting sequences."),
    ("icarus_page_store_loads_not_paid", "loads_not_paid", "Loads left out: computing is faster, or no answer."),
    ("icarus_page_store_loaded_pages", "loaded_pages", "KV pages copied to the device."),
    ("icarus_page_store_loaded_bytes", "loaded_bytes", "... their bytes."),
    ("icarus_page_store_load_seconds", "load_seconds", "Seconds that these loads took."),
)


class _EngineCollector(Collector):
    """Reads the engine's counters at the moment of a scrape."""

    def __init__(self, engine: HasStats):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for name, attribute, text in _COUNTERS:
            yield CounterMetricFamily(name, text, value=getattr(stats, attribute))
        for name, attribute, text in _GAUGES:
            yield GaugeMetricFamily(name, text, value=getattr(stats, attribute))
        hits = CounterMetricFamily(
            "icarus_prefix_cache_hit_tokens", "Prompt tokens found in the cache, by who wrote them.", labels=["source"]
        )
        hits.add_metric(["same_model"], stats.cached_tokens_same_model)
        hits.add_metric(["cross_model"], stats.cached_tokens_cross_model)
        yield hits
        pages = GaugeMetricFamily(
            "icarus_kv_pages", "KV pages: held by sequences, or kept for reuse.", labels=["state"]
        )
        pages.add_metric(["used"], stats.pages_used)
        pages.add_metric(["cached"], stats.pages_cached)
        yield pages
        yield GaugeMetricFamily("icarus_kv_pages_capacity", "KV pages in all.", value=stats.pages_total)
        usage = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        yield GaugeMetricFamily("icarus_kv_cache_usage_perc", "KV pages held by sequences, of all.", value=usage)
        yield self._adapters()
        yield from _page_store(stats.page_store)

    def _adapters(self) -> Metric:
        """Returns which adapters are on the device and which wait for a slot, in the labels that vLLM has."""
        scheduler = self._engine.scheduler
        heads = [model for model in self._engine.models.values() if model.kind != "base"]
        loaded = {head.name for head in heads if head.slot != NO_SLOT}
        # The engine's thread changes the queue meanwhile; copying it into a tuple is one step of the interpreter.
        wanted = {seq.model.name for seq in tuple(scheduler.waiting) if seq.model.slot == NO_SLOT}
        gauge = GaugeMetricFamily(
            "icarus_lora_requests_info",
            "Adapters on the device, and those that wait for a slot; the value is the time.",
            labels=["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
        )
        slots = str(scheduler.slots.num_slots)
        gauge.add_metric([",".join(sorted(loaded)), ",".join(sorted(wanted)), slots], time.time())
        return gauge


def _page_store(stats: StoreStats) -> Iterator[Metric]:
    for name, attribute, text in _STORE_COUNTERS:
        yield CounterMetricFamily(name, text, value=getattr(stats, attribute))
    hits = CounterMetricFamily("icarus_page_store_hits", "KV pages found, by where they were.", labels=["tier"])
    pages = GaugeMetricFamily("icarus_page_store_pages", "KV pages stored, as far as is known.", labels=["tier"])
    size = GaugeMetricFamily("icarus_page_store_bytes", "... their bytes.", labels=["tier"])
    for tier in ("host", "folder"):
        hits.add_metric([tier], getattr(stats, f"{tier}_hits"))
        pages.add_metric([tier], getattr(stats, f"{tier}_pages"))
        size.add_metric([tier], getattr(stats, f"{tier}_bytes"))
    yield from (hits, pages, size)


class Metrics:
    """The counters and histograms of one server. Thread-safe. Times are in seconds.

    Attributes:
        registry: Prometheus's registry of these metrics. Every instance has its own.
    """

    def __init__(self, engine: HasStats):
        """Registers the metrics.

        Args:
            engine: its counters are read at every scrape.
        """
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_EngineCollector(engine))
        self._names: set[str] = set()  # of the models with series of their own
        model = ["model_name"]

        def counter(name: str, text: str, labels: list[str]) -> Counter:
            return Counter(f"icarus_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"icarus_{name}", text, model, buckets=buckets, registry=self.registry)

        self._requests = counter("requests", "Streams ended.", [*model, "finished_reason"])
        self._prompt = counter("prompt_tokens", "Prompt tokens of the requests taken.", model)
        self._generated = counter("generation_tokens", "Tokens sent to clients.", model)
        self._rejected = counter("requests_rejected", "Requests answered 429, by the name of the API key.", ["key"])
        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _LONG)
        self._itl = histogram("inter_token_latency_seconds", "Between two tokens of a stream.", _SHORT)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to a stream's end.", _LONG)
        self._queue = histogram("request_queue_time_seconds", "From submission to admission by the engine.", _LONG)
        self._prefill = histogram("request_prefill_time_seconds", "From admission to the first output.", _LONG)
        self._decode = histogram("request_decode_time_seconds", "From the first output to the last token.", _LONG)

    def _name(self, model: str) -> str:
        """Returns the label of a model: its name, if it is one of the first MAX_MODELS."""
        if len(self._names) < MAX_MODELS:
            self._names.add(model)
        return model if model in self._names else OTHERS

    def prompt(self, model: str, num_tokens: int) -> None:
        """Counts the tokens of a prompt that a model was asked to continue."""
        self._prompt.labels(self._name(model)).inc(num_tokens)

    def rejected(self, key: str) -> None:
        """Counts a request that was refused because too many wait.

        Args:
            key: the name of its API key.
        """
        self._rejected.labels(key).inc()

    def tokens(self, model: str, num_tokens: int, since: float, first: bool) -> None:
        """Counts generated tokens of a choice.

        Args:
            model: the model that generated them.
            num_tokens: how many tokens there are.
            since: seconds since the choice's last tokens, or since the request's arrival if `first`.
            first: whether these are the choice's first tokens.
        """
        self._generated.labels(self._name(model)).inc(num_tokens)
        histogram = self._ttft if first else self._itl
        histogram.labels(self._name(model)).observe(since)

    def finished(self, model: str, timeline: Timeline) -> None:
        """Counts a choice that has ended. A phase that it has not reached is not counted.

        Args:
            model: the model that generated its last tokens.
            timeline: when what happened to it.
        """
        assert timeline.finish_reason is not None
        self._requests.labels(self._name(model), timeline.finish_reason).inc()
        for histogram, seconds in (
            (self._e2e, between(timeline.arrival, timeline.ended)),
            (self._queue, timeline.queue_seconds),
            (self._prefill, timeline.prefill_seconds),
            (self._decode, timeline.decode_seconds),
        ):
            if seconds is not None:
                histogram.labels(self._name(model)).observe(seconds)

    def render(self) -> bytes:
        """Returns all metrics in Prometheus's text exposition format."""
        return generate_latest(self.registry)
