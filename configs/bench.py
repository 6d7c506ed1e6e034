"""Agent sessions against servers: one KV cache for all models (`shared`), or one for each model (`isolated`).

    python launch/bench.py serve                               1, 2 and 8 models, ReAct trajectories, two rates
    python launch/bench.py serve --config=bench.py:once        24 sessions at once, 8 models
    python launch/bench.py prefix                              a conversation of 16 turns, in which 8 models take turns
    python launch/bench.py replicas                            three replicas beside the simulated fleet (needs Ray)

The same sessions against a peer that is already running: vLLM, or llama.cpp's server. docs/benchmarks.md shows how to
start them:

    python launch/bench.py serve --config=bench.py:once --config.url=http://127.0.0.1:8001 --config.peer=vllm \\
        --config.system=vllm --config.models=0,8

Prompts are sent as token ids, so that every system computes the same tokens. models=0 is the base model alone. Our own
server is started anew for each run. For a peer, the prompts of each run start with a different token, so that it finds
nothing in its cache. The trajectories are those of noahshinn/reflexion (HotpotQA), in ../shared/data or
--config.workload.path=FILE.
"""

import dataclasses

from ml_collections import ConfigDict

from icarus_jax.cli import DATA, serving_config
from icarus_jax.config import EngineConfig

ARGS = ("", "once", "prefix", "replicas")
# 20,480 tokens of float32 K/V on the CPU. One copy of the sessions that run at once fits; eight copies do not.
ENGINE = EngineConfig(num_pages=1280, max_num_seqs=24, max_model_len=2560, warmup="all")


def get_config(arg: str = "") -> ConfigDict:
    """Makes the config.

    Args:
        arg: One of ARGS.

    Raises:
        ValueError: There is no such argument.
    """
    if arg not in ARGS:
        raise ValueError(f"no argument {arg!r}; the arguments are {', '.join(ARGS[1:])}")
    config = ConfigDict()
    config.url = ""  # a server that is already running; empty: our own is started for each run
    config.peer = "icarus"  # what the server at url is: icarus, vllm, llama.cpp
    config.system = "peer"  # its name in the report
    config.systems = "shared,isolated"  # without url: the kinds of heads that our own server gets
    config.models = "8" if arg else "8,1,2"  # numbers of models
    # Sessions per second. inf: all at once. 1.25x, after inf: 1.25 times the rate that the last of the systems reached
    # at inf.
    config.rates = "inf" if arg else "inf,1.25x"
    config.workload = ConfigDict(
        {
            # replay, file (path: JSON lines, see workloads/workload.py), react, reflexion, long_react, coding
            "name": "replay",
            "path": str(DATA / "react_hotpotqa.jsonl"),
            "sessions": 24 if arg == "once" else 61,
            "common_len": 640,  # tokens of the instruction that every session starts with
            "tool_s": 0.0,  # mean wait before a call, in seconds (not for replay and file)
            "seed": 0,
            "assign": "round_robin",  # round_robin, role, zipf
            "arrivals": "poisson",  # poisson, gamma (coefficient of variation 4)
        }
    )
    if arg == "prefix":
        config.workload.update({"name": "conversation", "sessions": 1, "common_len": 1010})
    config.trunk = ConfigDict({"source": serving_config().trunk.source})
    config.engine = ConfigDict(dataclasses.asdict(ENGINE))
    config.out = f"results/serve{'-' + arg if arg else ''}"
    if arg == "replicas":  # half of the sessions are for calibration
        config.replicas, config.systems, config.models, config.rates = 3, "shared", "4", "0.2,inf"
        config.workload.sessions, config.out = 60, "results/replicas"
        config.engine.update(num_pages=640, max_num_seqs=8)
    return config.lock()
