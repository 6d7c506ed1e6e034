"""How many replicas there should be, for Ray Serve's autoscaler."""

from __future__ import annotations

from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

TARGET_PAGES = 0.8  # the share of its pages that a replica should have in use


def desired_replicas(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Chooses the number of replicas: enough for the requests and for the pages that they hold.

    Args:
        ctx: what Ray Serve knows of the deployment.

    Returns:
        The number, to which Ray Serve applies the delays and bounds of the config; and the policy's state.
    """
    by_queue, state = replica_queue_length_autoscaling_policy(ctx)
    shares = list((ctx.aggregated_metrics or {}).get("pages", {}).values())
    by_pages = sum(shares) / TARGET_PAGES if shares else 0.0
    return max(by_queue, by_pages), state
