r"""Trains a head on the frozen trunk's K/V.

    python launch/train.py --config=train.py:intent    77 banking intents      44 minutes on two CPU cores
    python launch/train.py --config=train.py:slots     slots as JSON (snips)   about 85 minutes
    python launch/train.py --config=train.py:sql       text to SQL (GeoQuery)  about 25 minutes
    python launch/train.py --config=train.py:math      GSM8K, worked answers   about 55 minutes

The time of intent was measured, on older code; the others are estimates from the speed of their first steps. Where the
processor has products of bfloat16 (AVX512_BF16), this takes 8 minutes (docs/heads.md):

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python launch/train.py --config=train.py:intent \
        --config.train.products=bfloat16 --config.train.kv_store=FOLDER

On one H100, 26 such runs, eight at a time, took five minutes (docs/kernels.md).

    --config.head.kv=isolated          a conventional LoRA instead (k and v too): the baseline
    --config.head.method=full          all weights of the head instead of LoRA (it is then served as the only head)
    --config=train.py:intent,sql       two heads in one pass
    --config.trunk.tune=True           a trunk tuned for these heads (docs/heads.md)
    --config=train.py:NAME --config.data.path=FILE.jsonl
                                       a head for your own data: {"messages": [..]} or {"prompt": .., "completion": ..}

The data are in ../shared/data; its README tells where to get them. A run writes to runs/NAME-KIND-sSEED (or
--config.output): heads/NAME is the adapter to serve (--heads=NAME=PATH), loss.png the curve. If a run was stopped or
killed, the same command continues it.
"""

from ml_collections import ConfigDict

from icarus_jax.cli import DATA, serving_config
from icarus_jax.tasks import TASKS

# name -> (steps, learning rate, rows of a packed batch, tokens per row, whether longer examples may be left out)
SIZES = {
    "intent": (600, 4e-3, 6, 144, False),
    "slots": (1000, 2e-3, 5, 168, False),
    "sql": (300, 2e-3, 3, 352, False),
    "math": (400, 1e-3, 3, 512, True),
    "tools": (450, 2e-3, 3, 1664, False),
}
OWN_DATA = (500, 1e-3, 4, 512, False)


def get_config(arg: str = "intent") -> ConfigDict:
    """Makes the config.

    Args:
        arg: The head's name, or several names separated by commas. The five tasks have their own data and sizes.

    Raises:
        ValueError: A name has other characters than letters, digits, - and _.
    """
    names = arg.split(",")
    if not all(name.replace("-", "").replace("_", "").isalnum() for name in names):
        raise ValueError(f"{arg!r}: a head's name has letters, digits, - and _; several are separated by commas")
    sizes = [SIZES.get(name, OWN_DATA) for name in names]
    config = ConfigDict()
    config.trunk = serving_config().trunk
    # tune: a LoRA on the trunk is trained together with the heads, from `adapter` on if it is given. It is saved beside
    # them, and then served and trained on with --config.trunk.adapter=RUN/trunk. text: a JSONL file of general text in
    # the forms of your own data, on which KL (its weight: kl) holds the trunk near the original; text_rows: packed rows
    # of it in a step.
    config.trunk.update(tune=False, rank=8, alpha=16.0, targets="", lr=1e-3, text="", kl=1.0, text_rows=2)
    config.output = ""  # the folder of the run; empty: runs/NAME-KIND-sSEED
    config.head = ConfigDict(
        {
            "names": arg,
            "kv": "shared",  # 'shared' | 'isolated'
            "method": "lora",  # 'lora' | 'full'
            "init": "",  # adapters to go on from, one for each head, separated by commas; empty: untrained ones
            "targets": "",  # projections, separated by commas; empty: all that its kv allows
            "rank": 8,
            "alpha": 16.0,
            "rslora": False,  # scale by alpha / sqrt(rank), not alpha / rank
            "dropout": 0.0,
            "remat": False,  # recompute activations in the backward pass: less memory, an eighth slower on a CPU
            "dtype": "float32",  # the dtype in which a LoRA is saved; bfloat16 halves the file
        }
    )
    config.data = ConfigDict(
        {
            # One JSONL file for each head, separated by commas.
            "path": ",".join(str(DATA / TASKS[name].train_file) if name in TASKS else "" for name in names),
            "repeat": "",  # how often each head's examples are taken in a pass, separated by commas; empty: once
            "rows": max(rows for _, _, rows, _, _ in sizes),
            "length": max(length for _, _, _, length, _ in sizes),
            "skip_long": any(
                skip for *_, skip in sizes
            ),  # leave out examples longer than a row; else they are an error
            "validation": 128,  # validation examples per head, at most; they are held out of its training file (5%)
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
            "dtype": "float32",  # of the trunk and of all arithmetic; trained weights are kept in float32
            # Of the operands of products with the trunk's weights; sums are in float32. bfloat16 is faster where the
            # processor has it (AVX512_BF16).
            "products": "float32",
            # A folder: the trunk's K/V of all examples are computed once and kept there, in float16 (SmolLM2: 23 KB a
            # token), also for other runs on the same data. Empty: each step computes them.
            "kv_store": "",
            "accumulate": 1,  # batches per update
            "validate_every": 100,
            "checkpoint_every": 50,
            "log_every": 10,
        }
    )
    config.mesh = ConfigDict({"model": 1})  # devices that split the trunk's weights; the rest split the batch
    return config.lock()
