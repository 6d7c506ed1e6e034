"""Simulates how many chips a fleet needs: ICaRus heads beside isolated adapters. All figures of it are SIMULATED.

    python launch/bench.py fleet --config=fleet.py                 a million sessions a day, 8 heads, 8B on H100s:
                                                                   chips for a P95 time to first token of 1 s
    python launch/bench.py fleet --config=fleet.py:day             a whole day of 1,000 replicas, some of which fail

The traffic is that of simulate.py's workloads, with more sessions at noon than at night. The router is the real one;
replicas are simulated from event to event (icarus_jax/simulator/replica.py), not from step to step.

config.systems: 'shared' (ICaRus: routed by conversation), 'isolated' (each model has K/V of its own: routed by model
and conversation), each also '+store', with a page store. config.fleet.replicas: numbers, separated by commas, or
'auto': the least with which config.target_ttft_s is kept. '2:6' are 2 replicas that only compute prompts, and 6 that
load them from the store and answer. Other models, chips, meshes, precisions and assumptions are as in simulate.py.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import simulate
from icarus_jax.fleet.routing import RoutingConfig

ARGUMENTS = ("chips", "day")


def get_config(arg: str = "chips") -> ConfigDict:
    """Makes the config.

    Args:
        arg: One of ARGUMENTS.

    Raises:
        ValueError: There is no such argument.
    """
    if arg not in ARGUMENTS:
        raise ValueError(f"no argument {arg!r}; the arguments are {', '.join(ARGUMENTS)}")
    day = arg == "day"
    config = simulate.get_config("llama8b_a100" if day else "llama8b_a100_long")
    with config.unlocked():
        del config["rates"]
        config.chip, config.models, config.out = "h100", "8", f"results/fleet-{arg}"
        config.workload.sessions = 1000  # different ones; the traffic repeats them
        del config.workload["arrivals"]
        config.workload.tool_s = 5.0
        config.systems = "shared" if day else "shared,isolated,shared+store,isolated+store"
        config.target_ttft_s = 1.0
        # A day of sessions, of which those from begin_h to end_h are simulated; depth: of the swing around the mean
        config.traffic = ConfigDict({"sessions": 1_000_000, "depth": 0.6, "begin_h": 11.85, "end_h": 12.15})
        config.fleet = ConfigDict(
            {
                "replicas": "auto",
                "mean_up_h": float("inf"),  # hours until a replica fails
                "down_s": 60.0,
                "store_tb": 100.0,  # of '+store'
                "store_gb_s": 10.0,  # from the store to a replica, and from a prefill replica to the store
                "max_local_prefill_tokens": 512,  # prompts of which more are to be computed go to a prefill replica
            }
        )
        if day:
            config.traffic.begin_h, config.traffic.end_h = 0.0, 24.0
            config.fleet.replicas, config.fleet.mean_up_h = "1000", 100.0
        routing = dataclasses.asdict(RoutingConfig())
        config.routing = ConfigDict({key: routing[key] for key in routing if key not in ("per_model", "seed")})
    return config.lock()
