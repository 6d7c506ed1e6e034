"""A training run, from a config to saved heads. Killed at any moment, it goes on from its last checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from icarus_jax.config import KV_TARGETS, LORA_TARGETS, TARGETS
from icarus_jax.models.full_heads import FullHead, save_full_head
from icarus_jax.tasks import TASKS
from icarus_jax.training import data as train_data
from icarus_jax.training.log import RECORD, TrainLog, plot_losses
from icarus_jax.training.step import (
    Optimiser,
    State,
    batch_sharding,
    init_state,
    make_mesh,
    place_params,
    train_step,
    validate,
)
from icarus_jax.training.two_stream import Method, init_heads
from icarus_jax.weights.checkpoint import TrunkCheckpoint, load_trunk
from icarus_jax.weights.peft import Adapter, save_adapter
from icarus_jax.weights.tokenizer import eos_token_ids, load_tokenizer

METHODS = ("lora", "full")
TRAINED_KINDS = ("shared", "isolated")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """The examples of all heads, split."""

    training: list[train_data.Example]
    validation: list[train_data.Example]
    prefix: np.ndarray  # i32[P]
    shape: train_data.RowShape


def run(config: ConfigDict) -> list[Path]:
    """Trains (or goes on training) the heads of a config; returns the folders they were saved to. Raises ValueError."""
    names = [name for name in config.head.names.split(",") if name]
    method = head_method(config.head, len(names))
    optimiser = Optimiser(**config.optimiser)
    trunk = load_trunk(config.trunk.source, config.train.dtype)
    data = load_data(config, names, trunk)
    folder = output_folder(config, names)
    check_record(folder, config, trunk.identity, data)
    state = _train(config, names, method, optimiser, trunk, data, folder)
    log.info("the loss is drawn in %s", plot_losses(folder, names))
    heads = [jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), state.heads) for i in range(len(names))]
    paths = [folder / "heads" / name for name in names]
    for path, head in zip(paths, heads, strict=True):
        _save_head(path, head, config, method, trunk)
        log.info("saved %s", path)
    return paths


def head_method(section: ConfigDict, num_heads: int) -> Method:
    """The section `head` of a config. Raises ValueError."""
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
    known = LORA_TARGETS if section.kv == "shared" else TARGETS
    targets = tuple(section.targets.split(",")) if section.targets else known
    if wrong := [target for target in targets if target not in known]:
        own_kv = " (a shared head makes no K/V)" if wrong[0] in KV_TARGETS else ""
        raise ValueError(f"config.head.targets: {wrong[0]!r} is none of {', '.join(known)}{own_kv}")
    scale = section.alpha / (math.sqrt(section.rank) if section.rslora else section.rank)
    full = section.method == "full"
    return Method(section.kv, full, () if full else targets, section.rank, scale, section.dropout, section.remat)


def load_data(config: ConfigDict, names: list[str], trunk: TrunkCheckpoint) -> Data:
    """Reads each head's file and prepares the rows. Raises ValueError naming the file and line at fault."""
    section = config.data
    paths = [path for path in section.path.split(",") if path]
    if len(paths) != len(names):
        raise ValueError(f"config.data.path names {len(paths)} files for {len(names)} heads ({', '.join(names)})")
    tokenizer = load_tokenizer(trunk.path)
    limit = min(section.length + 1, trunk.config.max_position_embeddings)  # the last token is no input
    encoder = train_data.Encoder(tokenizer, frozenset(eos_token_ids(tokenizer, trunk.path)), limit)
    training, validation = [], []
    for slot, (name, path) in enumerate(zip(names, paths, strict=True), 1):
        file = Path(path).expanduser()
        examples, skipped = train_data.read_examples(file, encoder, TASKS.get(name), slot, section.skip_long)
        train_part, held = train_data.split(examples, section.validation)
        log.info("%s: %d examples, %d more for validation, %d too long", file, len(train_part), len(held), skipped)
        training += train_part
        validation += held
    prefix = train_data.common_prefix(training + validation)
    shape = train_data.row_shape(training + validation, prefix, section.rows, section.length)
    return Data(training, validation, prefix, shape)


def output_folder(config: ConfigDict, names: list[str]) -> Path:
    """config.output, or if it is empty runs/NAMES-KIND-sSEED in the working directory."""
    kind = config.head.kv if config.head.method == "lora" else f"{config.head.method}-{config.head.kv}"
    return Path(config.output or f"runs/{'-'.join(names)}-{kind}-s{config.train.seed}").expanduser().absolute()


def check_record(folder: Path, config: ConfigDict, trunk_identity: str, data: Data) -> None:
    """Writes what a run depends on; raises ValueError if the folder holds a run of another kind."""
    digest = hashlib.sha256()
    for e in (*data.training, *data.validation):
        digest.update(np.array([len(e.tokens), e.num_prompt, e.slot], np.int32).tobytes() + e.tokens.tobytes())
    wanted = {"trunk": trunk_identity, "data": digest.hexdigest()}
    for section in ("head", "optimiser", "data", "train"):
        wanted |= {f"config.{section}.{key}": value for key, value in config[section].items()}
    for free in ("config.data.path", "config.head.dtype", "config.train.log_every", "config.train.checkpoint_every"):
        del wanted[free]
    file = folder / RECORD
    if file.exists():
        had = json.loads(file.read_text())
        if differ := [key for key in wanted if had.get(key) != wanted[key]]:
            key = differ[0]
            raise ValueError(
                f"{folder} holds a run with {key}={had.get(key)!r}, not {wanted[key]!r}: give that value to go on with "
                f"it, or another --config.output, or remove the folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=1) + "\n")


def _train(
    config: ConfigDict,
    names: list[str],
    method: Method,
    optimiser: Optimiser,
    trunk: TrunkCheckpoint,
    data: Data,
    folder: Path,
) -> State:
    """The loop."""
    section = config.train
    for key in ("accumulate", "validate_every", "checkpoint_every", "log_every"):
        if section[key] < 1:
            raise ValueError(f"config.train.{key}={section[key]}; it is at least 1")
    mesh = make_mesh(config.mesh.model)
    if data.shape.rows % mesh.shape["data"]:
        raise ValueError(
            f"config.data.rows={data.shape.rows} must be a multiple of the {mesh.shape['data']} data shards"
        )
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    seeds = [section.seed * 1000 + slot for slot in range(len(names))]
    params = place_params(trunk.params, mesh)
    state = jax.device_put(init_state(init_heads(trunk.config, method, params, seeds), optimiser), replicated)
    prefix = jax.device_put(data.prefix, replicated)
    iterator = train_data.train_batches(data.training, data.prefix, data.shape, section.seed, section.accumulate)
    held_out = train_data.validation_batches(data.validation, data.prefix, data.shape) if data.validation else []
    schedule = optimiser.schedule()

    with contextlib.closing(_Checkpoints(folder / "checkpoints")) as checkpoints, _stop_signals() as stopped:
        state, examples = checkpoints.restore(state, iterator)
        step = int(state.step)
        if step:
            log.info("going on from step %d", step)
        with contextlib.closing(TrainLog(folder, step, optimiser.steps, section.log_every)) as run_log:

            def check() -> None:
                if not held_out:
                    return
                loss, exact = validate(
                    trunk.config, method, state.heads, params, prefix, held_out, batch_sharding(mesh, stacked=False)
                )
                values = {f"{n}/val_loss": float(x) for n, x in zip(names, loss, strict=True) if not math.isnan(x)}
                values |= {f"{n}/val_exact": float(x) for n, x in zip(names, exact, strict=True) if not math.isnan(x)}
                run_log.write(step, values)
                run_log.say(f"step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))

            if step == 0:
                check()
            while step < optimiser.steps and not stopped:
                began = time.monotonic()
                batch = next(iterator)
                placed = jax.device_put(batch, batch_sharding(mesh, stacked=True))
                state, metrics = train_step(
                    trunk.config, method, optimiser, state, params, prefix, placed, jnp.uint32(section.seed)
                )
                there = [(names[slot - 1], slot - 1) for slot in np.unique(batch.slots) if slot]  # not all heads are
                loss, norm = map(np.asarray, metrics)
                values = {f"{name}/loss": float(loss[i]) for name, i in there}
                norms = {f"{name}/grad_norm": float(norm[i]) for name, i in there}
                seconds = time.monotonic() - began
                step, examples = step + 1, examples + train_data.num_examples(batch)
                speed = {
                    "tokens_per_s": float((batch.segments > 0).sum()) / seconds,
                    "examples_per_s": train_data.num_examples(batch) / seconds,
                }
                epoch = examples / len(data.training)
                rest = {"lr": float(schedule(step - 1)), "epoch": epoch, **speed}
                run_log.write(step, values | norms | rest)
                run_log.progress(step, values | rest)
                if not all(map(math.isfinite, (values | norms).values())):
                    raise ValueError(
                        f"the loss or gradient of step {step} is not finite; try a lower --config.optimiser.lr"
                    )
                if step % section.validate_every == 0 or step == optimiser.steps:
                    check()
                if step % section.checkpoint_every == 0:
                    checkpoints.save(step, state, iterator, examples)
            if checkpoints.newest != step:
                checkpoints.save(step, state, iterator, examples)
    if stopped:
        log.warning("stopped at step %d of %d, saved; the same command goes on from there", step, optimiser.steps)
        raise SystemExit(128 + stopped[0])
    return state


class _Checkpoints:
    """State and data position of a run, through Orbax: written aside and renamed, so that a kill never leaves half."""

    def __init__(self, folder: Path):
        self._manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    @property
    def newest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: State, iterator: Any, examples: int) -> None:
        position = {"iterator": iterator.get_state(), "examples": examples}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position))
        self._manager.save(step, args=items)

    def restore(self, state: State, iterator: Any) -> tuple[State, int]:
        """The newest state and count of examples, the iterator moved there; without a checkpoint, `state` and 0."""
        step = self.newest
        if step is None:
            return state, 0
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        iterator.set_state(restored.data["iterator"])
        return State(*restored.state), restored.data["examples"]

    def close(self) -> None:
        self._manager.close()  # waits for what is being written


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM or Ctrl-C puts its number in; the step under way ends first."""
    stopped: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: stopped.append(n)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save_head(path: Path, head: dict[str, Any], config: ConfigDict, method: Method, trunk: TrunkCheckpoint) -> None:
    """A LoRA head as a PEFT folder; a fully trained one as an Orbax checkpoint of its decoder's weights."""
    if path.exists():
        shutil.rmtree(path)  # this run's own, of an earlier end
    if not method.full:
        weights = {target: (a, b * np.float32(method.scale)) for target, (a, b) in head.items()}
        adapter = Adapter(path.name, method.rank, weights, method.kv, trunk.identity)
        base = config.trunk.source
        save_adapter(
            str(path), adapter, base_model_name=base, alpha=config.head.alpha, dtype=jnp.dtype(config.head.dtype)
        )
        return
    save_full_head(str(path), FullHead(head), method.kv, trunk)
