"""A training run, from a config to saved heads. A run that was killed goes on from its last checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from icarus_jax.config import DTYPES, KV_TARGETS, LORA_TARGETS, TARGETS, ModelConfig
from icarus_jax.models.full_heads import FullHead, save_full_head
from icarus_jax.training.corpus import Data, load_data
from icarus_jax.training.heads import Method, TrunkLora
from icarus_jax.training.log import RECORD, plot_losses
from icarus_jax.training.step import Optimiser, Tuning
from icarus_jax.training.trainer import Trainer
from icarus_jax.weights.checkpoint import TrunkCheckpoint, load_trunk, open_trunk
from icarus_jax.weights.peft import Adapter, save_adapter

METHODS = ("lora", "full")  # values of config.head.method
TRAINED_KINDS = ("shared", "isolated")  # values of config.head.kv
# Settings that may differ when a run goes on: they do not change what is trained.
FREE_SETTINGS = (
    "config.data.path",
    "config.head.dtype",
    "config.train.kv_store",
    "config.train.log_every",
    "config.train.checkpoint_every",
)

TUNING_SETTINGS = ("tune", "adapter", "rank", "alpha", "targets", "lr", "kl", "text_rows")

Lora = TypeVar("Lora", Method, TrunkLora)

log = logging.getLogger(__name__)


def run(config: ConfigDict) -> list[Path]:
    """Trains the heads of a config and saves them. A run that was stopped goes on from its last checkpoint.

    Args:
        config: A config of configs/train.py.

    Returns:
        The folder of each head; before them that of the trunk's adapter, if the trunk is tuned.

    Raises:
        ValueError: A setting or a row of the data is wrong, the run's folder holds another run, or the loss diverges.
        SystemExit: SIGTERM or SIGINT has stopped the run.
    """
    names = [name for name in config.head.names.split(",") if name]
    if len(set(names)) < len(names):
        raise ValueError(f"config.head.names={config.head.names}: every head has a name of its own")
    method = head_method(config.head, len(names))
    optimiser = Optimiser(**config.optimiser)
    tuning = trunk_tuning(config.trunk, method, optimiser)
    trunk = load_trunk(config.trunk.source, config.train.dtype, "" if tuning else config.trunk.adapter)
    method = fit_targets(method, config.head, trunk.config)
    if tuning:
        tuning = dataclasses.replace(tuning, lora=fit_targets(tuning.lora, config.trunk, trunk.config))
    data = load_data(config, names, trunk)
    folder = output_folder(config, names)
    check_record(folder, config, trunk.identity, data)
    state = Trainer(config, names, method, optimiser, trunk, data, tuning).train(folder)
    log.info("the loss is drawn in %s", plot_losses(folder, names))
    heads = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), state.heads) for i in range(len(names))]
    paths = [folder / "heads" / name for name in names]
    tuned = []
    if tuning:
        tuned = [folder / "trunk"]
        _save_lora(tuned[0], jax.tree.map(lambda leaf: np.asarray(leaf[0]), state.trunk), config, tuning.lora, trunk)
        log.info("saved %s: heads are served and trained with --config.trunk.adapter=%s", tuned[0], tuned[0])
        trunk = open_trunk(config.trunk.source, config.train.dtype, str(tuned[0]))
    for path, head in zip(paths, heads, strict=True):
        _save_head(path, head, config, method, trunk)
        log.info("saved %s", path)
    return tuned + paths


def head_method(section: ConfigDict, num_heads: int) -> Method:
    """Reads the section `head` of a config.

    Args:
        section: The section.
        num_heads: The number of heads that are trained together.

    Returns:
        How the heads are trained.

    Raises:
        ValueError: A setting is wrong, or the settings do not go together.
    """
    if not num_heads:
        raise ValueError("config.head.names is empty: it names the head to train, or several, separated by commas")
    if section.kv not in TRAINED_KINDS:
        raise ValueError(f"config.head.kv={section.kv!r}; it is one of {', '.join(TRAINED_KINDS)}")
    if section.method not in METHODS:
        raise ValueError(f"config.head.method={section.method!r}; it is one of {', '.join(METHODS)}")
    if num_heads > 1 and (section.method == "full" or section.kv == "isolated"):
        raise ValueError("several heads in one pass must be LoRA heads with kv='shared': others share no forward")
    if section.method == "full" and (section.targets or section.dropout):
        raise ValueError(
            "config.head.targets and .dropout are LoRA's; a fully trained head (method='full') has neither"
        )
    if section.rank < 1:
        raise ValueError(f"config.head.rank={section.rank}; it is at least 1")
    if not 0 <= section.dropout < 1:
        raise ValueError(f"config.head.dropout={section.dropout}; it is at least 0 and less than 1")
    if section.dtype not in DTYPES:
        raise ValueError(f"config.head.dtype={section.dtype!r}; it is one of {', '.join(DTYPES)}")
    if section.init and (section.method == "full" or len(section.init.split(",")) != num_heads):
        raise ValueError(f"config.head.init={section.init!r}; it names {num_heads} LoRA adapters, separated by commas")
    known = LORA_TARGETS if section.kv == "shared" else TARGETS
    targets = tuple(section.targets.split(",")) if section.targets else known
    if wrong := [target for target in targets if target not in known]:
        own_kv = " (a shared head makes no K/V)" if wrong[0] in KV_TARGETS else ""
        raise ValueError(f"config.head.targets: {wrong[0]!r} is none of {', '.join(known)}{own_kv}")
    scale = section.alpha / (math.sqrt(section.rank) if section.rslora else section.rank)
    full = section.method == "full"
    return Method(section.kv, full, () if full else targets, section.rank, scale, section.dropout, section.remat)


def fit_targets(lora: Lora, section: ConfigDict, model: ModelConfig) -> Lora:
    """Leaves out the targets that a trunk does not have: experts take no adapters.

    Args:
        lora: How the heads are trained, or the LoRA of the trunk itself.
        section: The section of a config that it was read from, `head` or `trunk`.
        model: The trunk's configuration.

    Returns:
        The same, with those of its targets that the trunk has.

    Raises:
        ValueError: The config names a target that the trunk does not have.
    """
    targets = tuple(target for target in lora.targets if target in model.target_shapes)
    if section.targets and (missing := [target for target in lora.targets if target not in targets]):
        name = "head" if isinstance(lora, Method) else "trunk"
        raise ValueError(
            f"config.{name}.targets: this trunk has no {missing[0]}, but experts, which take no adapters; it has "
            f"{', '.join(model.target_shapes)}"
        )
    return dataclasses.replace(lora, targets=targets)


def trunk_tuning(section: ConfigDict, method: Method, optimiser: Optimiser) -> Tuning | None:
    """Reads how the trunk is tuned from the section `trunk` of a config.

    Args:
        section: The section.
        method: How the heads are trained.
        optimiser: The heads' optimiser, which the trunk's differs from in its rate.

    Returns:
        How the trunk is tuned; None if it is frozen.

    Raises:
        ValueError: A setting is wrong, or does not go with the method.
    """
    if not section.tune:
        if section.text:
            raise ValueError("config.trunk.text holds a trunk that is tuned near the original: set config.trunk.tune")
        return None
    if method.full or method.kv != "shared":
        raise ValueError("config.trunk.tune: a trunk is tuned with LoRA heads that read its K/V (kv='shared')")
    if section.rank < 1 or section.kl < 0:
        raise ValueError(
            f"config.trunk.rank={section.rank}, kl={section.kl}: a rank is at least 1, a weight at least 0"
        )
    targets = tuple(section.targets.split(",")) if section.targets else TARGETS
    if wrong := [target for target in targets if target not in TARGETS]:
        raise ValueError(f"config.trunk.targets: {wrong[0]!r} is none of {', '.join(TARGETS)}")
    lora = TrunkLora(targets, section.rank, section.alpha / section.rank)
    return Tuning(lora, dataclasses.replace(optimiser, lr=section.lr), section.kl)


def output_folder(config: ConfigDict, names: list[str]) -> Path:
    """Returns the run's folder: config.output, or if it is empty runs/NAMES-KIND-sSEED in the working directory."""
    kind = config.head.kv if config.head.method == "lora" else f"{config.head.method}-{config.head.kv}"
    return Path(config.output or f"runs/{'-'.join(names)}-{kind}-s{config.train.seed}").expanduser().absolute()


def check_record(folder: Path, config: ConfigDict, trunk_identity: str, data: Data) -> None:
    """Writes down what the result of a run depends on, and compares it with what is in its folder.

    These are the trunk's identity, a SHA-256 hash of the data and most settings. They are written to the file RECORD.

    Args:
        folder: The run's folder. It is made if necessary.
        config: The run's config.
        trunk_identity: The trunk's identity.
        data: The examples of all heads.

    Raises:
        ValueError: The folder holds a run with another trunk, other data or other settings.
    """
    digest = hashlib.sha256()
    for e in (*data.training, *data.validation):
        digest.update(np.array([len(e.tokens), e.num_prompt, e.slot], np.int32).tobytes() + e.tokens.tobytes())
    wanted = {"trunk": trunk_identity, "data": digest.hexdigest()}
    for section in ("head", "optimiser", "data", "train"):
        wanted |= {f"config.{section}.{key}": value for key, value in config[section].items()}
    for free in FREE_SETTINGS:
        del wanted[free]
    if config.trunk.tune:
        wanted |= {f"config.trunk.{key}": config.trunk[key] for key in TUNING_SETTINGS}
        wanted["text"] = hashlib.sha256(b"".join(batch.tokens.tobytes() for batch in data.texts)).hexdigest()
    file = folder / RECORD
    if file.exists():
        had = json.loads(file.read_text())
        # What one of them lacks is newer than the run, or a setting of a trunk that is tuned.
        keys = [key for key in {**wanted, **had} if key not in FREE_SETTINGS]
        if differ := [key for key in keys if (had.get(key) or "") != (wanted.get(key) or "")]:
            key = differ[0]
            raise ValueError(
                f"{folder} holds a run with {key}={had.get(key)!r}, not {wanted.get(key)!r}: give that value "
                f"to go on with it, or another --config.output, or remove the folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=1) + "\n")


def _save_head(path: Path, head: dict[str, Any], config: ConfigDict, method: Method, trunk: TrunkCheckpoint) -> None:
    """Saves a LoRA head as a PEFT folder, a fully trained head as an Orbax checkpoint of its decoder's weights."""
    if path.exists():
        shutil.rmtree(path)  # saved when the same run ended before
    if method.full:
        save_full_head(str(path), FullHead(head), method.kv, trunk)
    else:
        _save_lora(path, head, config, method, trunk)


def _save_lora(
    path: Path, weights: dict[str, Any], config: ConfigDict, lora: Method | TrunkLora, trunk: TrunkCheckpoint
) -> None:
    """Saves the LoRA of a head, or of the trunk itself, as a PEFT folder."""
    kv = lora.kv if isinstance(lora, Method) else "isolated"  # the trunk's own is an ordinary LoRA
    scaled = {target: (a, b * np.float32(lora.scale)) for target, (a, b) in weights.items()}
    adapter = Adapter(path.name, lora.rank, scaled, kv, trunk.identity)
    alpha = config.head.alpha if isinstance(lora, Method) else config.trunk.alpha
    dtype = jnp.dtype(config.head.dtype)
    save_adapter(str(path), adapter, base_model_name=config.trunk.source, alpha=alpha, dtype=dtype)
