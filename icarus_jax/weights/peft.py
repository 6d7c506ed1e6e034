"""Adapters: the LoRA weights of one task model, read from PEFT folders or Orbax checkpoints, written to PEFT folders.

A projection with an adapter computes `x @ W + x @ A @ B` (LoRA, arXiv 2106.09685). PEFT multiplies A @ B by a scaling,
which is alpha / r or alpha / sqrt(r). Here B is stored with the scaling applied.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from icarus_jax.config import KV_KINDS, KV_TARGETS, LORA_TARGETS, HeadConfig, ModelConfig
from icarus_jax.weights import adapter_files, peft_format
from icarus_jax.weights.adapter_cache import AdapterCache
from icarus_jax.weights.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from icarus_jax.weights.peft_format import INVOCATION

MARK = "icarus"  # our key in adapter_config.json: {"kv": "shared", "trunk": identity}. PEFT ignores it with a warning
RANDOM_RANK = 16  # of 'random:SEED'
CACHE = AdapterCache()  # of adapters in stores, unless another one is given

# Warnings of Adapter.check.
_ON_FROM_THE_START = (
    "adapter %s was trained to come on at its invocation tokens; as kv='%s' it is on from the first token, "
    "and its outputs will differ from those of its training: serve it as kv='activated'"
)
_MAKES_ITS_OWN_KV = (
    "adapter %s was trained on the trunk's K/V; as kv='isolated' it makes its own, and its outputs will "
    "differ from those of its training: serve it as kv='shared'"
)
_READS_THE_TRUNKS_KV = (
    "adapter %s is not marked as trained for a shared trunk: it will attend to the trunk's K/V, whereas it "
    "was %s trained on K/V of its own, so its outputs will differ from those of its training and may "
    "be worse; serve it as kv='isolated' for its exact outputs, or train it with kv='shared'"
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """The LoRA weights of one task model.

    Attributes:
        name: The adapter's name in messages.
        rank: r, the rank of all its factors. Smaller ones are padded with zeros.
        weights: A f32[L, din, r] and B f32[L, r, dout] by target. A layer without an adapter is zeros. The outputs of
            q_proj are in the order of query heads n = k * G + g.
        kv_trained: How the adapter was trained: 'shared' if it read the trunk's K/V, 'isolated' if it made its own,
            'activated' if it is an aLoRA. None if it does not say so.
        trunk_identity: The identity of the trunk that it was trained on, if known.
        invocation_tokens: The token ids whose last occurrence switches on an aLoRA; empty for any other adapter.
    """

    name: str
    rank: int
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]]
    kv_trained: str | None = None
    trunk_identity: str | None = None
    invocation_tokens: tuple[int, ...] = ()

    def check(self, kv: str, trunk_identity: str | None = None) -> None:
        """Checks that the adapter can be served as `kv` on a trunk.

        It logs a warning if the adapter can be served so, but was trained in another way.

        Args:
            kv: How it is to use the KV cache: 'shared', 'activated' or 'isolated'.
            trunk_identity: The identity of the trunk that is loaded. None: do not compare it.

        Raises:
            ValueError: The adapter cannot be served so. The message says why and what would be right.
        """
        if kv not in KV_KINDS[1:]:
            raise ValueError(f"adapter {self.name}: kv={kv!r}; it is one of {', '.join(KV_KINDS[1:])}")
        if trunk_identity and self.trunk_identity and trunk_identity != self.trunk_identity:
            raise ValueError(
                f"adapter {self.name} was trained on the trunk {self.trunk_identity[:12]}, not on the one loaded, "
                f"{trunk_identity[:12]}: serve it with its own trunk, or train it again on this one"
            )
        if kv == "activated" and not self.invocation_tokens:
            raise ValueError(
                f"adapter {self.name} names no alora_invocation_tokens and cannot be kv='activated': nothing says "
                f"where it comes on; serve it as kv='shared' or kv='isolated'"
            )
        if kv != "activated" and self.invocation_tokens:
            log.warning(_ON_FROM_THE_START, self.name, kv)
        if kv == "isolated" and self.kv_trained == "shared" and self.trunk_identity:  # an untrained one names no trunk
            log.warning(_MAKES_ITS_OWN_KV, self.name)
        if kv != "shared":
            return
        if own_kv := [target for target in KV_TARGETS if target in self.weights]:
            raise ValueError(
                f"adapter {self.name} has {' and '.join(own_kv)} weights and cannot be kv='shared': its K/V would "
                f"differ from the trunk's, so that nothing could be shared; serve it as kv='isolated', or train an "
                f"adapter on {', '.join(LORA_TARGETS)} alone"
            )
        if self.kv_trained != "shared" and not self.invocation_tokens:
            log.warning(_READS_THE_TRUNKS_KV, self.name, "(says its mark)" if self.kv_trained else "probably")

    def truncated(self, rank: int) -> Adapter:
        """Returns the nearest adapter of this rank: each A @ B keeps its largest singular values (Eckart, Young 1936).

        Raises:
            ValueError: The adapter has no higher rank.
        """
        if not 1 <= rank < self.rank:
            raise ValueError(f"{rank} is no lower rank, of 1 or more, than that of adapter {self.name}, {self.rank}")
        weights = {}
        for target, (a, b) in self.weights.items():
            (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b.swapaxes(1, 2))
            u, values, vt = np.linalg.svd(ra @ rb.swapaxes(1, 2), full_matrices=False)
            root = np.sqrt(values[:, None, :rank])
            low = qa @ (u[..., :rank] * root), qb @ (vt[:, :rank].swapaxes(1, 2) * root)
            grow = ((0, 0), (0, 0), (0, rank - root.shape[2]))  # a projection may be narrower than the rank
            weights[target] = np.pad(low[0], grow), np.pad(low[1], grow).swapaxes(1, 2)
        return dataclasses.replace(self, rank=rank, weights=weights)


def load_adapter(source: str, model_config: ModelConfig, cache: AdapterCache = CACHE) -> Adapter:
    """Loads an adapter.

    Args:
        source: A PEFT folder or an Orbax checkpoint (see adapter_files.py), local or in a store (see adapter_cache.py),
            or 'random:SEED' or 'random:SEED:RANK' for an untrained adapter.
        model_config: The trunk's configuration.
        cache: Keeps copies of what lies in a store.

    Returns:
        The adapter, with PEFT's scaling applied to B.

    Raises:
        ValueError: There is no such adapter, it is not supported, or it does not fit the trunk; in one line.
        OSError: Its store has no such adapter, or does not answer.
    """
    if source.startswith("random:"):
        if not (match := re.fullmatch(r"random:(\d+)(?::([1-9]\d*))?", source)):
            raise ValueError(f"adapter {source!r}: a random adapter is written 'random:SEED' or 'random:SEED:RANK'")
        return random_adapter(int(match[1]), int(match[2] or RANDOM_RANK), model_config)
    with cache.local(source) as folder:
        return dataclasses.replace(_load(folder, model_config), name=source)


def _load(folder: pathlib.Path, model_config: ModelConfig) -> Adapter:
    config, tensors = adapter_files.read(folder)
    peft_format.check_config(config, folder)
    pieces = peft_format.read_pieces(tensors, folder, model_config)
    for (layer, target), (a, b) in pieces.items():
        b *= peft_format.read_scaling(config, layer, target, rank=a.shape[1], folder=folder)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            module = peft_format.module_name(layer, target)
            raise ValueError(f"adapter {folder}: {module} has weights that are no numbers")
    mark = _read_mark(config, folder)
    rank = max(a.shape[1] for a, _ in pieces.values())
    invocation = peft_format.read_invocation(config, folder, model_config.vocab_size)
    kv = "activated" if invocation else mark.get("kv")
    return Adapter(str(folder), rank, peft_format.stack(pieces, rank, model_config), kv, mark.get("trunk"), invocation)


def _read_mark(config: dict[str, Any], folder: pathlib.Path) -> dict[str, str | None]:
    mark = config.get(MARK) or {}
    if (
        isinstance(mark, dict)
        and mark.get("kv") in (None, *KV_KINDS[1:])
        and isinstance(mark.get("trunk", ""), str | None)
    ):
        return mark
    raise ValueError(
        f"adapter {folder}: {MARK}={repr(mark)[:80]} in {CONFIG_FILE}; it is a kv of {', '.join(KV_KINDS[1:])} or null "
        f"and the identity of a trunk or null"
    )


def read_head(
    name: str,
    source: str,
    kv: str | None,
    model_config: ModelConfig,
    *,
    trunk_identity: str | None = None,
    pinned: bool = False,
    cache: AdapterCache = CACHE,
) -> tuple[HeadConfig, Mapping[str, tuple[np.ndarray, np.ndarray]]]:
    """Loads an adapter as a head of the engine.

    Args:
        name: The head's name.
        source: What `load_adapter` takes.
        kv: How the head uses the KV cache: 'shared', 'activated' or 'isolated'. None: the way the adapter was trained
            for. If it does not say, 'isolated' is taken, which is right for every ordinary LoRA.
        model_config: The trunk's configuration.
        trunk_identity: The identity of the trunk that is loaded. None: do not compare it.
        pinned: Whether the head never leaves its adapter slot.
        cache: Keeps copies of what lies in a store.

    Returns:
        The head's configuration, and its weights by target: A f32[L, din, r] and B f32[L, r, dout].

    Raises:
        ValueError: The adapter cannot be loaded, or cannot be served as `kv`.
        OSError: Its store has no such adapter, or does not answer.
    """
    adapter = load_adapter(source, model_config, cache)
    kv = kv or adapter.kv_trained or "isolated"
    adapter.check(kv, trunk_identity)
    tokens = adapter.invocation_tokens if kv == "activated" else ()
    return HeadConfig(name, source, kv, tokens, pinned), adapter.weights


def adapter_rank(source: str) -> int:
    """Reads the rank of an adapter.

    Args:
        source: What `load_adapter` takes.

    Returns:
        r, the largest rank that its config gives any projection.

    Raises:
        ValueError: There is no such adapter, or it is not supported.
        OSError: Its store has no such adapter, or does not answer.
    """
    if match := re.fullmatch(r"random:\d+(?::([1-9]\d*))?", source):
        return int(match[1] or RANDOM_RANK)
    with CACHE.local(source) as folder:
        config, _ = adapter_files.read(folder)
        peft_format.check_config(config, folder)
    return peft_format.read_rank(config)


def random_adapter(seed: int, rank: int, model_config: ModelConfig) -> Adapter:
    """Makes an untrained adapter on the model's lora_targets, for load tests.

    Its weights are large enough that its text differs from the trunk's and from that of other seeds.

    Args:
        seed: The seed of the random weights.
        rank: r, the adapter's rank.
        model_config: The trunk's configuration.

    Returns:
        The adapter, marked as trained for kv='shared'. It can be served as 'isolated' just as well.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for target in model_config.lora_targets:
        din, dout = model_config.target_shapes[target]
        a = rng.standard_normal((model_config.num_layers, din, rank), np.float32) / math.sqrt(din)
        b = rng.standard_normal((model_config.num_layers, rank, dout), np.float32) * (0.45 / math.sqrt(rank))
        weights[target] = (a, b)
    return Adapter(f"random:{seed}:{rank}", rank, weights, kv_trained="shared")


def save_adapter(folder: str, adapter: Adapter, *, base_model_name: str, alpha: float, dtype: Any = "float32") -> None:
    """Writes an adapter as a PEFT folder, which PEFT can load too, but for families with fused modules (families.py).

    Our key `icarus` in adapter_config.json records the adapter's kv_trained and trunk_identity.

    Args:
        folder: The folder to write, local or in a bucket.
        adapter: The adapter.
        base_model_name: The name of the trunk, as PEFT's base_model_name_or_path.
        alpha: PEFT's lora_alpha. B is stored divided by alpha / rank.
        dtype: The dtype of the stored tensors.
    """
    path = epath.Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(adapter.weights),
        MARK: {"kv": adapter.kv_trained, "trunk": adapter.trunk_identity},
    }
    if adapter.invocation_tokens:
        config[INVOCATION] = list(adapter.invocation_tokens)
    tensors = {}
    for target, (a, b) in adapter.weights.items():
        for layer in range(len(a)):
            stem = f"base_model.model.{peft_format.module_name(layer, target)}"
            tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a[layer].T, dtype)
            tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b[layer].T * (adapter.rank / alpha), dtype)
    (path / WEIGHTS_FILE).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
