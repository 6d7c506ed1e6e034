"""The dashboard and the alerts: every metric and label that they name is in /metrics."""

from __future__ import annotations

import concurrent.futures
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from icarus_jax.server.limits import Limits
from tests.deploy.promql import Labels, labels_of, read_page
from tests.server.served import GOOD, serving, wait_for

DEPLOY = Path(__file__).resolve().parents[2] / "docs" / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
ALERTS = [rule for group in yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


@pytest.fixture(scope="module")
def samples() -> Iterator[dict[str, Labels]]:
    """What /metrics of a server has that has answered, refused and failed some requests."""
    with serving(step_seconds=0.05, limits=Limits(1)) as served, concurrent.futures.ThreadPoolExecutor(4) as pool:
        served.complete(prompt=[5], max_tokens=3)
        served.http.post("/v1/completions", json={"model": "broken", "prompt": [1], "max_tokens": 3})

        def refused() -> bool:
            posts = [pool.submit(served.http.post, "/v1/completions", json=GOOD) for _ in range(4)]
            return 429 in [post.result().status_code for post in posts]

        wait_for(refused)
        yield read_page(served.http.get("/metrics").text)


def with_values(expr: str) -> str:
    """An expression as Grafana sends it."""
    names = {*VARIABLES, "__rate_interval"}
    assert set(re.findall(r"\$(\w+)", expr)) <= names, expr
    return expr.replace("$__rate_interval", "1m").replace("$pod", ".*").replace("$model", ".*")


def targets() -> Iterator[Any]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield pytest.param(target["expr"], target["legendFormat"], id=f"{panel['title']}-{target['refId']}")


@pytest.mark.parametrize("expr, legend", list(targets()))
def test_every_query_is_answered(samples, expr, legend):
    labels = labels_of(with_values(expr), samples)
    assert set(re.findall(r"{{(\w+)}}", legend)) <= labels


def test_every_variable_is_answered(samples):
    for name, variable in VARIABLES.items():
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert match and match[2] in labels_of(match[1], samples), name


def test_panels_are_shown_once_and_lie_beside_each_other():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_can_fire(samples, rule):
    labels = labels_of(rule["expr"], samples)
    shown = rule["annotations"]["summary"]
    assert set(re.findall(r"\$labels\.(\w+)", shown)) <= labels
    assert rule["labels"]["severity"] in ("warning", "critical")


@pytest.mark.parametrize(
    "wrong",
    [
        "icarus_num_request_running",
        'icarus_requests_total{model="a"}',
        "sum by (model) (rate(icarus_requests_total[1m]))",
        "histogram_quantile(0.95, sum by (model_name) (rate(icarus_time_to_first_token_seconds_bucket[1m])))",
        "sum by (source) (icarus_prefix_cache_hit_tokens_total) / sum(icarus_engine_prompt_tokens_total)",
        "sum by (pod) (icarus_sessions) / on (state) sum by (pod) (icarus_kv_pages)",
        "icarus_requests",
    ],
)
def test_a_misspelt_query_is_noticed(samples, wrong):
    with pytest.raises(ValueError, match=r"no such metric|no label|joins series"):
        labels_of(wrong, samples)
