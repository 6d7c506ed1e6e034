"""The training loop: steps, validation and checkpoints, from the first step or from where a run was stopped."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from icarus_jax.config import DTYPES
from icarus_jax.models.block import PROJECTIONS
from icarus_jax.training.checkpoints import Checkpoints, stop_signals
from icarus_jax.training.corpus import Data
from icarus_jax.training.heads import Method, init_heads, init_tuning, trained_before
from icarus_jax.training.kv_store import KvStore
from icarus_jax.training.log import TrainLog
from icarus_jax.training.mesh import batch_sharding, make_mesh, place_params
from icarus_jax.training.packing import Batch, num_examples, train_batches, trunk_batches, validation_batches
from icarus_jax.training.step import Optimiser, State, StepMetrics, Tuning, init_state, train_step, validate
from icarus_jax.training.two_stream import trunk_kv
from icarus_jax.weights.checkpoint import TrunkCheckpoint

INTERVALS = ("accumulate", "validate_every", "checkpoint_every", "log_every")  # settings that are at least 1

log = logging.getLogger(__name__)


class Trainer:
    """A training run: what it trains, what it trains on, and how far it has come.

    Args:
        config: The run's config, of which `train`, `mesh`, `head.init` and `trunk.adapter` are read.
        names: The heads' names. Head i has the slot i + 1 in the data.
        method: How the heads are trained.
        optimiser: The optimiser's settings.
        trunk: The trunk.
        data: The examples of all heads.
        tuning: How the trunk is tuned for the heads; None: it is frozen.

    Raises:
        ValueError: A setting is out of range, or the mesh does not fit the devices or the batch.
    """

    def __init__(
        self,
        config: ConfigDict,
        names: Sequence[str],
        method: Method,
        optimiser: Optimiser,
        trunk: TrunkCheckpoint,
        data: Data,
        tuning: Tuning | None = None,
    ):
        self._settings = section = config.train
        for key in INTERVALS:
            if section[key] < 1:
                raise ValueError(f"config.train.{key}={section[key]}; it is at least 1")
        self._mesh = make_mesh(config.mesh.model)
        shards = self._mesh.shape["data"]
        for key, rows in {
            "data.rows": data.shape.rows,
            "trunk.text_rows": len(data.texts and data.texts[0].tokens),
        }.items():
            if rows % shards:
                raise ValueError(f"config.{key}={rows} must be a multiple of the {shards} data shards")
        self._names, self._method, self._optimiser, self._tuning = names, method, optimiser, tuning
        self._model, self._num_training, self._texts = trunk.config, len(data.training), data.texts
        replicated = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        seeds = [section.seed * 1000 + slot for slot in range(len(names))]
        self._params = place_params(_narrowed(trunk, section.products, method), self._mesh)
        if config.head.init:
            heads = trained_before(trunk, method, config.head.init.split(","))
        else:
            heads = init_heads(trunk.config, method, self._params, seeds)
        lora = None
        if tuning and config.trunk.adapter:
            lora = trained_before(trunk, tuning.lora, [config.trunk.adapter])
        elif tuning:
            lora = init_tuning(trunk.config, tuning.lora, section.seed * 1000 + len(names))
        self._state = jax.device_put(init_state(heads, optimiser, lora, tuning), replicated)
        self._prefix = jax.device_put(data.prefix, replicated)
        self._batches = train_batches(data.training, data.prefix, data.shape, section.seed, section.accumulate)
        self._held_out = validation_batches(data.validation, data.prefix, data.shape) if data.validation else []
        self._store = self._open_store(trunk, data) if section.kv_store else None
        self._schedule = optimiser.schedule()
        self._step, self._examples = 0, 0  # done so far

    def _open_store(self, trunk: TrunkCheckpoint, data: Data) -> KvStore:
        """Returns the file of the trunk's K/V, complete."""
        if self._method.kv != "shared":
            raise ValueError("config.train.kv_store keeps the trunk's K/V: kv='isolated' has no use for them")
        if self._tuning:
            raise ValueError("config.train.kv_store keeps the trunk's K/V: a trunk that is tuned changes them")
        examples = list(dict.fromkeys([*data.training, *data.validation]))  # those that are repeated once
        folder = Path(self._settings.kv_store).expanduser()
        shards, dtypes = self._mesh.shape["data"], {self._settings.dtype, self._settings.products} - {"float32"}
        identity = " ".join([trunk.identity, *sorted(dtypes), *([f"{shards} shards"] if shards > 1 else [])])
        store = KvStore(folder, trunk.config, identity, examples, data.prefix)
        sharding = batch_sharding(self._mesh, stacked=False)
        made = jax.jit(functools.partial(trunk_kv, trunk.config))
        compute = lambda batch: np.asarray(made(self._params, self._prefix, jax.device_put(batch, sharding)))  # noqa: E731
        store.fill(trunk_batches(examples, data.prefix, shards), compute)
        self._held_out = [store.attach(batch) for batch in self._held_out]
        return store

    def train(self, folder: Path) -> State:
        """Trains up to the last step. A run whose folder has checkpoints goes on from the newest one.

        SIGTERM or SIGINT stops the run after the step under way, with a checkpoint.

        Args:
            folder: The run's folder. The log and the checkpoints are written to it.

        Returns:
            The final state.

        Raises:
            ValueError: A loss or a gradient is not finite.
            SystemExit: A signal has stopped the run. The exit status is 128 plus the signal's number.
        """
        with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints, stop_signals() as stopped:
            self._state, self._examples = checkpoints.restore(self._state, self._batches)
            self._step = int(self._state.step)
            if self._step:
                log.info("going on from step %d", self._step)
            self._run(folder, checkpoints, stopped)
        if stopped:
            steps = self._optimiser.steps
            log.warning("stopped at step %d of %d, saved; the same command goes on from there", self._step, steps)
            raise SystemExit(128 + stopped[0])
        return self._state

    def _run(self, folder: Path, checkpoints: Checkpoints, stopped: list[int]) -> None:
        """Runs the steps that are left, until a signal's number is in `stopped`."""
        section, steps = self._settings, self._optimiser.steps
        with contextlib.closing(TrainLog(folder, self._step, steps, section.log_every)) as run_log:
            if self._step == 0:
                self._validate(run_log)
            while self._step < steps and not stopped:
                self._advance(run_log)
                if self._step % section.validate_every == 0 or self._step == steps:
                    self._validate(run_log)
                if self._step % section.checkpoint_every == 0:
                    checkpoints.save(self._step, self._state, self._batches, self._examples)
            if checkpoints.newest != self._step:
                checkpoints.save(self._step, self._state, self._batches, self._examples)

    def _advance(self, run_log: TrainLog) -> None:
        """Takes one step and logs it."""
        began = time.monotonic()
        batch = next(self._batches)
        losses, norms = self._by_head(batch, self._update(batch))
        seconds = time.monotonic() - began
        count = num_examples(batch)
        self._step, self._examples = self._step + 1, self._examples + count
        rest = {
            "lr": float(self._schedule(self._step - 1)),
            "epoch": self._examples / self._num_training,
            "tokens_per_s": float((batch.segments > 0).sum()) / seconds,
            "examples_per_s": count / seconds,
        }
        run_log.write(self._step, losses | norms | rest)
        run_log.progress(self._step, losses | rest)
        if not all(map(math.isfinite, (losses | norms).values())):
            raise ValueError(
                f"the loss or gradient of step {self._step} is not finite; try a lower --config.optimiser.lr"
            )

    def _update(self, batch: Batch) -> StepMetrics:
        """Updates the state with batches [accumulate, B, ..]."""
        batch = self._store.attach(batch) if self._store else batch
        placed = jax.device_put(batch, batch_sharding(self._mesh, stacked=True))
        seed = jnp.uint32(self._settings.seed)
        text = self._texts[self._step % len(self._texts)] if self._texts else None
        text = jax.device_put(text, batch_sharding(self._mesh, stacked=False))
        self._state, metrics = train_step(
            self._model,
            self._method,
            self._optimiser,
            self._state,
            self._params,
            self._prefix,
            placed,
            seed,
            self._tuning,
            text,
        )
        return metrics

    def _by_head(self, batch: Batch, metrics: StepMetrics) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the losses and the gradients' norms under their names in the log, of the heads in the batch."""
        heads = [slot - 1 for slot in np.unique(batch.slots) if slot]
        loss, norm = np.asarray(metrics.loss), np.asarray(metrics.grad_norm)
        losses = {f"{self._names[i]}/loss": float(loss[i]) for i in heads}
        losses |= {"trunk/drift": float(metrics.drift)} if self._texts else {}
        return losses, {f"{self._names[i]}/grad_norm": float(norm[i]) for i in heads}

    def _validate(self, run_log: TrainLog) -> None:
        """Validates the heads and logs the result, if there are validation examples."""
        if not self._held_out:
            return
        sharding = batch_sharding(self._mesh, stacked=False)
        loss, exact = validate(
            self._model,
            self._method,
            self._state.heads,
            self._params,
            self._prefix,
            self._held_out,
            sharding,
            self._state.trunk,
            self._tuning,
        )
        values = {f"{n}/val_loss": float(x) for n, x in zip(self._names, loss, strict=True) if not math.isnan(x)}
        values |= {f"{n}/val_exact": float(x) for n, x in zip(self._names, exact, strict=True) if not math.isnan(x)}
        run_log.write(self._step, values)
        run_log.say(f"step {self._step}: " + "  ".join(f"{name} {value:.4f}" for name, value in values.items()))


def _narrowed(trunk: TrunkCheckpoint, products: str, method: Method) -> Mapping[str, np.ndarray]:
    """Returns the trunk's weights, those of the layers' products in the dtype `products`.

    Raises:
        ValueError: There is no such dtype, or these weights are trained.
    """
    if products not in DTYPES:
        raise ValueError(f"config.train.products={products!r}; it is one of {', '.join(DTYPES)}")
    if products == "float32":
        return trunk.params
    if method.full:
        raise ValueError("config.train.products rounds frozen weights; a fully trained head (method='full') has others")
    return {name: w.astype(products) if name in PROJECTIONS else w for name, w in trunk.params.items()}
