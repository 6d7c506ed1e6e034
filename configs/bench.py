"""Agent sessions against servers: one KV cache for all models (`shared`) against one a model (`isolated`).

    python launch/bench.py serve                               1, 2 and 8 models, ReAct trajectories, two rates
    python launch/bench.py serve --config=bench.py:once        24 sessions at once, 8 models
    python launch/bench.py prefix                              one conversation of 16 turns handed around 8 models

A peer (vLLM, llama.cpp's server) that runs already, with the same sessions; docs/benchmarks.md says how to start it:

    python launch/bench.py serve --config=bench.py:once --config.url=http://127.0.0.1:8001 --config.peer=vllm \\
        --config.system=vllm --config.models=0,8

Prompts go out as token ids, so every system computes the same tokens. models=0 is the base model alone. Our own server
is started anew for each run; of a peer, each run's prompts start with another token, so that it finds nothing cached.
The trajectories are those of noahshinn/reflexion (HotpotQA), in ../shared/data or --config.workload.path=FILE.
"""

import dataclasses

from ml_collections import ConfigDict

from icarus_jax.cli import DATA, serving_config
from icarus_jax.config import EngineConfig

ARGS = ("", "once", "prefix")
# Of float32 K/V on the CPU. 20,480 tokens: the sessions that run at once fit, once; eight copies of them do not.
ENGINE = EngineConfig(num_pages=1280, max_num_seqs=24, max_model_len=2560)


def get_config(arg: str = "") -> ConfigDict:
    """arg: '', 'once' or 'prefix'. Raises ValueError."""
    if arg not in ARGS:
        raise ValueError(f"no argument {arg!r}; the arguments are {', '.join(ARGS[1:])}")
    config = ConfigDict()
    config.url = ""  # a server that runs already; empty: our own is started for each run
    config.peer = "icarus"  # what answers at url: icarus, vllm, llama.cpp
    config.system = "peer"  # its name in the report
    config.systems = "shared,isolated"  # without url: which of ours
    config.models = "8" if arg else "8,1,2"  # numbers of models
    # sessions a second; inf: all at once; 1.25x, after inf: 1.25 times what the last of the systems did at inf
    config.rates = "inf" if arg else "inf,1.25x"
    config.workload = ConfigDict(
        {
            "name": "replay",  # replay, file (path: JSON lines of workload.py), react, reflexion, long_react, coding
            "path": str(DATA / "react_hotpotqa.jsonl"),
            "sessions": 24 if arg == "once" else 61,
            "common_len": 640,  # tokens of the instruction that every session starts with
            "tool_s": 0.0,  # mean wait before a call (not for replay and file)
            "seed": 0,
            "assign": "round_robin",  # round_robin, role, zipf
            "arrivals": "poisson",  # poisson, gamma (cv 4)
        }
    )
    if arg == "prefix":
        config.workload.update({"name": "conversation", "sessions": 1, "common_len": 1010})
    config.trunk = ConfigDict({"source": serving_config().trunk.source})
    config.engine = ConfigDict(dataclasses.asdict(ENGINE))
    config.out = f"results/serve{'-' + arg if arg else ''}"
    return config.lock()
