"""The metrics of all replicas in one answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

METRICS_SECONDS = 3.0  # how long a replica may take to answer; Prometheus waits for 10 s by default


def join_metrics(texts: Mapping[str, str], missing: int) -> bytes:
    """Joins metrics, and gives each sample a label `replica`.

    Args:
        texts: the id of each replica, and its metrics in Prometheus's text format.
        missing: how many more replicas there are; the metric `icarus_replicas_missing` says so.

    Returns:
        All metrics, in the same format.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Joined(texts, missing))
    return generate_latest(registry)


class _Joined(Collector):
    def __init__(self, texts: Mapping[str, str], missing: int):
        self._texts, self._missing = texts, missing

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = {**sample.labels, "replica": replica}
                    whole.add_sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)
        yield from families.values()
        text = "Replicas without metrics in this answer: they have failed, or not answered in time."
        yield GaugeMetricFamily("icarus_replicas_missing", text, value=self._missing)
