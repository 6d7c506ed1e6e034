"""Serves several replicas of the trunk and its trained heads on a Ray cluster.

    python launch/serve_ray.py --config=ray.py        two replicas on a cluster of this machine
    python launch/serve_ray.py --config=ray.py:8 --config.ray.address=auto --config.ray.resources=TPU=4
    serve run launch.serve_ray:application config=ray.py:8 ray.num_gpus=1

Every replica serves every head, and conversations stay where their pages are. The other keys are those of multi.py;
config.server.host and .port are the address of Ray Serve's proxy.
"""

import dataclasses

from ml_collections import ConfigDict

from icarus_jax.cli import serving_config, trained_heads
from icarus_jax.fleet.routing import RoutingConfig


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config.

    Args:
        arg: The number of replicas ('': 2).

    Raises:
        ValueError: It is no number above 0.
    """
    if arg and not (arg.isdecimal() and int(arg)):
        raise ValueError(f"no argument {arg!r}; the argument is the number of replicas, 1 or more")
    config = serving_config()
    config.heads.update(trained_heads())
    # address: of a cluster that runs ('auto': as Ray finds it); '': one on this machine, for as long as the program.
    config.ray = ConfigDict({"address": "", "replicas": int(arg or 2)})
    # What a replica asks the cluster for. resources: NAME=NUMBER,NAME=NUMBER, such as TPU=4.
    config.ray.update(num_cpus=1.0, num_gpus=0.0, resources="")
    # With max_replicas (0: replicas, always) Ray Serve starts more when each has more than target_requests, or when
    # their pages are in use.
    config.ray.update(max_replicas=0, target_requests=16.0)
    # prefill_replicas: more replicas, which compute long prompts for the others and hand the pages over through
    # engine.page_store, so that streams go on meanwhile. Prompts with at most max_local_prefill_tokens that are neither
    # cached nor stored are computed where they are answered.
    config.ray.update(prefill_replicas=0, max_local_prefill_tokens=512)
    # How long a request waits for a replica that takes it, before it gets a 503.
    config.ray.accept_seconds = 60.0
    config.routing = ConfigDict(dataclasses.asdict(RoutingConfig()))
    return config.lock()
