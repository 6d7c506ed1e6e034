"""Simulates the gain of one shared KV cache on other chips. All figures of it are SIMULATED.

    python launch/bench.py simulate --config=simulate.py:llama8b_a100        the paper's table: ReAct, 2, 4, 8 models
    python launch/bench.py simulate --config=simulate.py:llama8b_a100_long   the same model, 4k prompts and 20 calls
    python launch/bench.py simulate --config=simulate.py:qwen14b_a100        Qwen3-14B, ReAct; ...:qwen14b_reflexion
    python launch/bench.py simulate --config=simulate.py:llama70b_v5p32      70B, 32 and 256 models, 16 chips
    python launch/bench.py simulate --config=simulate.py:llama70b_v6e64      the same on 64 chips

The scheduler, the page pool and the prefix cache are the real ones. The time of a step is a roofline estimate: its
bytes and FLOPs, divided by the chip's published peak rates times the shares of them that config.assumed assumes. Those
are not measured: it assumes 80% of the bandwidth for K/V and 2 ms of overhead a step, and on an H100 an earlier version
of this engine reached 26%, and took 10 to 12 ms for a step whose bytes take 0.1 ms (docs/kernels.md). Any chip, mesh,
model and workload can be given:

    ... --config.chip=h100 --config.model=qwen3-8b --config.mesh.model=2 --config.workload.name=coding

config.rates: sessions per second, separated by commas; or 'auto': 0.5 to 4.5 times the largest rate of the baseline.
"""

import dataclasses

from ml_collections import ConfigDict

from icarus_jax.simulator.roofline import Assumptions

# name -> (model, chip, replicas, chips per replica, workload, sessions per replica, numbers of models)
VARIANTS = {
    "llama8b_a100": ("llama-3.1-8b", "a100", 1, 1, "react", 400, "2,4,8"),
    "llama8b_a100_long": ("llama-3.1-8b", "a100", 1, 1, "long_react", 100, "2,4,8"),
    "qwen14b_a100": ("qwen3-14b", "a100", 1, 1, "react", 400, "2,4,8"),
    "qwen14b_reflexion": ("qwen3-14b", "a100", 1, 1, "reflexion", 150, "2,4,8"),
    "llama70b_v5p32": ("llama-3.1-70b", "v5p", 2, 8, "long_react", 60, "8,32,256"),
    "llama70b_v6e64": ("llama-3.1-70b", "v6e", 4, 16, "long_react", 60, "8,32,256"),
}


def get_config(arg: str = "llama8b_a100") -> ConfigDict:
    """Makes the config.

    Args:
        arg: One of VARIANTS.

    Raises:
        ValueError: There is no such variant.
    """
    if arg not in VARIANTS:
        raise ValueError(f"no argument {arg!r}; the arguments are {', '.join(VARIANTS)}")
    model, chip, data, shards, workload, sessions, models = VARIANTS[arg]
    config = ConfigDict()
    config.model, config.chip = model, chip
    config.mesh = ConfigDict({"data": data, "model": shards})  # replicas, and the chips of each
    config.models = models
    config.rank = 16  # the adapters' rank
    config.rates = "auto"
    config.workload = ConfigDict(
        {
            "name": workload,  # file, react, reflexion, long_react, coding, conversation
            "path": "",
            "sessions": sessions,
            "common_len": 640,
            "tool_s": 0.0,
            "seed": 0,
            "assign": "round_robin",
            "arrivals": "poisson",
        }
    )
    # num_pages = 0: as many as fit into memory
    engine = {
        "page_size": 16,
        "num_pages": 0,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "max_model_len": 65536,
        "dtype": "bfloat16",
        "weights": "",  # or int8, fp8
        "kv_dtype": "bfloat16",  # or int8, fp8
    }
    config.engine = ConfigDict(engine)
    config.assumed = ConfigDict(dataclasses.asdict(Assumptions()))
    config.out = f"results/simulate-{arg}"
    return config.lock()
