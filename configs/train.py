"""Trains a head, on the frozen trunk's K/V.

    python launch/train.py --config=train.py:intent    77 banking intents      44 minutes on two CPU cores
    python launch/train.py --config=train.py:slots     slots as JSON (snips)   about 85 minutes
    python launch/train.py --config=train.py:sql       text to SQL (GeoQuery)  about 25 minutes
    python launch/train.py --config=train.py:math      GSM8K, worked answers   about 55 minutes

intent was measured; the others are estimates from the speed of their first steps. On one H100, 26 such
runs, eight at a time, took five minutes (docs/kernels.md).

    --config.head.kv=isolated          a conventional LoRA instead (k and v too): the baseline
    --config.head.method=full          all weights of the head's decoder instead of LoRA (served alone beside the trunk)
    --config=train.py:intent,sql       two heads in one pass
    --config=train.py:NAME --config.data.path=FILE.jsonl
                                       a head for your own data: {"messages": [..]} or {"prompt": .., "completion": ..}

The data lie in ../shared/data; its README says where to get them. The run lies in runs/NAME-KIND-sSEED (or
--config.output): heads/NAME is the adapter to serve (--heads=NAME=PATH), loss.png the curve. A run that was stopped
or killed goes on by the same command.
"""

from ml_collections import ConfigDict

from icarus_jax.cli import DATA, serving_config
from icarus_jax.tasks import TASKS

# steps and learning rate; then what a packed batch holds: rows, tokens a row, whether longer examples may be left out
SIZES = {
    "intent": (600, 4e-3, 6, 144, False),
    "slots": (1000, 2e-3, 5, 168, False),
    "sql": (300, 2e-3, 3, 352, False),
    "math": (400, 1e-3, 3, 512, True),
}
OWN_DATA = (500, 1e-3, 4, 512, False)


def get_config(arg: str = "intent") -> ConfigDict:
    """arg: the head's name, or several, separated by commas; the four tasks have their own data and sizes."""
    names = arg.split(",")
    if not all(name.replace("-", "").replace("_", "").isalnum() for name in names):
        raise ValueError(f"{arg!r}: a head's name has letters, digits, - and _; several are separated by commas")
    sizes = [SIZES.get(name, OWN_DATA) for name in names]
    config = ConfigDict()
    config.trunk = serving_config().trunk
    config.output = ""  # the run's folder; empty: runs/NAME-KIND-sSEED
    config.head = ConfigDict(
        {
            "names": arg,
            "kv": "shared",  # 'shared' | 'isolated'
            "method": "lora",  # 'lora' | 'full'
            "targets": "",  # comma-separated; empty: every projection that its kv allows
            "rank": 8,
            "alpha": 16.0,
            "rslora": False,  # scale by alpha / sqrt(rank), not alpha / rank
            "dropout": 0.0,
            "remat": False,  # recompute activations in the backward pass: less memory, an eighth slower (CPU)
            "dtype": "float32",  # in which a LoRA is saved; bfloat16 halves the file
        }
    )
    config.data = ConfigDict(
        {
            # One JSONL file a head, comma-separated.
            "path": ",".join(str(DATA / TASKS[name].train_file) if name in TASKS else "" for name in names),
            "rows": max(rows for _, _, rows, _, _ in sizes),
            "length": max(length for _, _, _, length, _ in sizes),
            "skip_long": any(skip for *_, skip in sizes),  # leave out examples longer than a row: else an error
            "validation": 128,  # examples a head, of the 5% held out of its training file
        }
    )
    config.optimiser = ConfigDict(
        {
            "steps": max(steps for steps, *_ in sizes),
            "lr": min(lr for _, lr, *_ in sizes),
            "warmup": 20,
            "weight_decay": 0.0,
            "clip": 1.0,
        }
    )
    config.train = ConfigDict(
        {
            "seed": 0,
            "dtype": "float32",  # of the trunk and all arithmetic; what is trained is kept in float32
            "accumulate": 1,  # batches per update
            "validate_every": 100,
            "checkpoint_every": 50,
            "log_every": 10,
        }
    )
    config.mesh = ConfigDict({"model": 1})  # devices that split the trunk's weights; the rest split the batch
    return config.lock()
