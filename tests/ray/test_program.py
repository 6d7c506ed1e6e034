"""launch/serve_ray.py up to its cluster: values that make no sense, and the arguments of `serve run`."""

from __future__ import annotations

import pytest

pytest.importorskip("ray")

from icarus_jax import cli
from icarus_jax.errors import UsageError
from icarus_jax.on_ray import application
from launch import serve_ray

LOCAL = {"server.host": "127.0.0.1"}


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ({}, "no API keys"),  # where the proxy listens is not known
        ({"config": "ray.py:0"}, "number of replicas"),
        ({"config": "multi.py", **LOCAL}, "--config=ray.py"),
        ({**LOCAL, "ray.nothing": "1"}, "ray.nothing: no such key"),
        ({**LOCAL, "nothing.at.all": "1"}, "nothing.at.all: no such key"),
        ({**LOCAL, "trunk.name.x": "1"}, "trunk.name.x: no such key"),
        ({**LOCAL, "engine.num_pages": "many"}, "engine.num_pages"),
        ({**LOCAL, "ray.replicas": "0"}, "at least 1"),
        ({**LOCAL, "ray.max_replicas": "1"}, "ray.replicas or more"),
        ({**LOCAL, "ray.prefill_replicas": "1"}, "engine.page_store: a folder"),
        ({**LOCAL, "ray.prefill_replicas": "-1"}, "prefill_replicas is -1"),
        ({**LOCAL, "ray.max_local_prefill_tokens": "-1"}, "max_local_prefill_tokens is -1"),
        ({**LOCAL, "ray.resources": "TPU"}, "NAME=NUMBER"),
        ({**LOCAL, "routing.queue_factor": "0.5"}, "config.routing: queue_factor"),
        ({**LOCAL, "server.batch_folder": "x"}, "batch_folder"),
        ({**LOCAL, "distributed.coordinator": "auto"}, "one process"),
    ],
)
def test_wrong_arguments_of_serve_run(args, error, monkeypatch):
    monkeypatch.delenv("ICARUS_API_KEYS", raising=False)
    with pytest.raises(UsageError, match=error):
        serve_ray.application(args)


def test_arguments_of_serve_run_are_those_of_the_config(monkeypatch):
    seen = []
    monkeypatch.setattr(application, "application", seen.append)
    serve_ray.application({**LOCAL, "config": "ray.py:3", "engine.num_pages": "512", "ray.resources": "TPU=4"})
    (config,) = seen
    assert (config.ray.replicas, config.engine.num_pages, config.ray.resources) == (3, 512, "TPU=4")


def test_what_an_actor_asks_for():
    config = cli.load_config("ray.py:3")
    config.ray.resources = "TPU=4, disk=0.5"
    assert application.needs(config.ray) == {"num_cpus": 1.0, "num_gpus": 0.0, "resources": {"TPU": 4.0, "disk": 0.5}}


def test_why_an_application_does_not_start():
    class Status:
        message = (
            "Traceback\n  raise UsageError(x) from error\nicarus_jax.errors.UsageError: head 'a': no such folder\n"
        )

    assert serve_ray.why_not({"replica": Status()}, RuntimeError("failed")) == "head 'a': no such folder"
