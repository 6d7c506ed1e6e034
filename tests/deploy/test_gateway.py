"""What the Gateway API inference extension reads of a model server."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from icarus_jax.config import EngineConfig
from icarus_jax.engine.stats import EngineStats
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import Request, SamplingParams
from icarus_jax.scheduling.scheduler import Scheduler
from icarus_jax.scheduling.sequence import make_sequences
from icarus_jax.server.metrics import Metrics
from tests.server.served import serving

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text()
CONFIG = EngineConfig(page_size=4, num_pages=20, max_num_seqs=5, max_num_batched_tokens=12, max_model_len=48)


class Heads:
    """Heads 'a' and 'b' that share one adapter slot, scheduled by the real scheduler, without a device."""

    def __init__(self):
        self.models = {"trunk": Model("trunk", "base"), "a": Model("a", "shared"), "b": Model("b", "shared")}
        self.scheduler, self.stats = Scheduler(CONFIG, num_slots=1), EngineStats(pages_total=CONFIG.num_pages)
        self._ids = itertools.count()

    def ask(self, model: str) -> None:
        prompt = (next(self._ids), 1, 2)  # no two alike: one would wait for the pages of the other
        request = Request((model,), prompt, SamplingParams(max_tokens=4))
        for seq in make_sequences(request, self.models, self._ids, 48, frozenset(), lambda rule, token: None):
            self.scheduler.add(seq)

    def info(self) -> tuple[dict[str, str], float]:
        """The labels and the value of the one sample."""
        page = Metrics(self).render().decode()
        (family,) = (f for f in text_string_to_metric_families(page) if f.name == "icarus_lora_requests_info")
        (sample,) = family.samples
        assert family.type == "gauge"
        return sample.labels, sample.value


def labels(running: str, waiting: str) -> dict[str, str]:
    return {"running_lora_adapters": running, "waiting_lora_adapters": waiting, "max_lora": "1"}


def test_adapters_on_the_device_and_those_that_wait():
    heads = Heads()
    assert heads.info()[0] == labels("", "")
    for model in ("trunk", "a", "a", "b"):
        heads.ask(model)
    assert heads.info()[0] == labels("", "a,b")  # nothing is scheduled yet
    heads.scheduler.schedule()
    assert heads.info()[0] == labels("a", "b")  # one slot
    for seq in [*heads.scheduler.running, *heads.scheduler.waiting]:
        heads.scheduler.end(seq)
    assert heads.info()[0] == labels("a", "")  # idle, and still there
    heads.ask("b")
    heads.scheduler.schedule()
    assert heads.info()[0] == labels("b", "")


def test_the_value_is_the_time():
    before = time.time()
    assert before <= Heads().info()[1] <= time.time()


@pytest.mark.parametrize("name", ["queued", "running", "kv", "lora"])
def test_the_documented_names_are_in_metrics(name):
    found = re.findall(rf"(?:--(?:total-)?{name}\S*-metric=|{name}\w*Spec: )(\S+)", DOCUMENT)
    assert len(found) == 2 and len(set(found)) == 1, found
    with serving() as served:
        assert f"# TYPE {found[0]} gauge" in served.http.get("/metrics").text
