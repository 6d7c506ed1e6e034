"""The application that Ray Serve runs: a front, replicas of the engine, some for prefill, and the log of heads."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from icarus_jax.errors import UsageError, usage_errors
from icarus_jax.fleet.routing import RoutingConfig
from icarus_jax.on_ray.cluster import needs
from icarus_jax.on_ray.front import FrontDeployment
from icarus_jax.on_ray.head_log import HeadLog
from icarus_jax.on_ray.prefill_replica import PROMPTS, PrefillReplica
from icarus_jax.on_ray.replica import Replica
from icarus_jax.on_ray.router import ConversationRouter
from icarus_jax.on_ray.scaling import desired_replicas

MAX_REQUESTS = 4096  # at a time, of a replica: its server says when too many wait (server.max_waiting_requests)
STATS_SECONDS = 1.0  # how often the router learns how busy a replica is
HEALTH_SECONDS = 2.0  # how often Ray Serve looks whether a replica is alive
START_SECONDS = 3600.0  # how long a replica may load and compile


def application(config: ConfigDict) -> Application:
    """Makes the application of a config.

    Args:
        config: a config like that of configs/ray.py.

    Raises:
        UsageError: a value makes no sense.
    """
    check(config)
    health: dict[str, Any] = {"health_check_period_s": HEALTH_SECONDS}
    light = {"ray_actor_options": {"num_cpus": 0}, **health}
    many: dict[str, Any] = {
        "max_ongoing_requests": MAX_REQUESTS,
        "graceful_shutdown_timeout_s": config.server.drain_seconds,
    }
    with_engine = {**health, **_engine_options(config)}
    head_log = serve.deployment(name="heads", **light)(HeadLog).bind()
    prefill = None
    if number := config.ray.prefill_replicas:
        few = {"max_ongoing_requests": PROMPTS, "num_replicas": number}
        prefill = serve.deployment(name="prefill", **few, **with_engine)(PrefillReplica).bind(config)
    number_of = _number_of_replicas(config)
    replicas = serve.deployment(name="replica", **many, **with_engine, **number_of)(Replica)
    front = serve.deployment(name="front", **many, **light)(FrontDeployment)
    return front.bind(
        config.server.body_timeout,
        replicas=replicas.bind(config, head_log, prefill),
        head_log=head_log,
        accept_seconds=config.ray.accept_seconds,
        prefill=prefill,
    )


def check(config: ConfigDict) -> None:
    """Checks what the replicas would refuse later, and what several replicas cannot do.

    Args:
        config: the config.

    Raises:
        UsageError: a value makes no sense.
    """
    ray = config.ray
    if ray.replicas < 1:
        raise UsageError(f"config.ray.replicas is {ray.replicas}; it must be at least 1")
    if ray.max_replicas and ray.max_replicas < ray.replicas:
        raise UsageError(f"config.ray.max_replicas is {ray.max_replicas}; it must be 0, or ray.replicas or more")
    for name in ("prefill_replicas", "max_local_prefill_tokens"):
        if ray[name] < 0:
            raise UsageError(f"config.ray.{name} is {ray[name]}; it must be 0 or more")
    if ray.prefill_replicas and not config.engine.page_store:
        raise UsageError(
            "config.ray.prefill_replicas needs config.engine.page_store: a folder or bucket that all replicas share"
        )
    if config.server.batch_folder:
        raise UsageError("config.server.batch_folder is for one server; run batches with launch/evaluate.py")
    if config.distributed.coordinator:
        raise UsageError("config.distributed.coordinator is for one server; a replica is one process")
    with usage_errors("config.routing"):
        RoutingConfig(**config.routing)
    needs(ray)


def _number_of_replicas(config: ConfigDict) -> dict[str, Any]:
    ray = config.ray
    if not ray.max_replicas:
        return {"num_replicas": ray.replicas}
    scaling = AutoscalingConfig(
        min_replicas=ray.replicas,
        max_replicas=ray.max_replicas,
        target_ongoing_requests=ray.target_requests,
        policy=AutoscalingPolicy(policy_function=desired_replicas),
    )
    return {"autoscaling_config": scaling}


def _engine_options(config: ConfigDict) -> dict[str, Any]:
    router: dict[str, Any] = {
        "request_router_class": ConversationRouter,
        "request_router_kwargs": config.routing.to_dict(),
        "request_routing_stats_period_s": STATS_SECONDS,
    }
    return {"ray_actor_options": needs(config.ray), "request_router_config": RequestRouterConfig(**router)}
