"""A fully fine-tuned head: a decoder of its own, which still reads the trunk's K/V (the paper's other variant).

It is no adapter, so that the head bank cannot hold it: an engine serves one such head beside the trunk. The rows are
the same as ever: writers run through the trunk's weights, a head's readers through its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icarus_jax.config import HeadConfig, ModelConfig
from icarus_jax.models.head_bank import Adapters, Factors
from icarus_jax.models.layers import Tables, rms_norm
from icarus_jax.models.sharding import Weight
from icarus_jax.models.trunk import BLOCK_PARAMS, Block, Pin, Trunk
from icarus_jax.weights.checkpoint import TrunkCheckpoint, load_trunk, save_orbax
from pallas_kernels.paged_attention.work import Array

OWN_PARAMS = (*BLOCK_PARAMS, "final_norm")  # what such a head has of its own; it embeds and unembeds as the trunk does
MARK = "icarus_head.json"  # beside the weights: their kv and their trunk


@dataclasses.dataclass(frozen=True, eq=False)
class FullHead:
    """The head's own weights: OWN_PARAMS in checkpoint.py's shapes, of which qkv's key and value parts go unused."""

    params: Mapping[str, np.ndarray]


def is_full_head(folder: str) -> bool:
    return (pathlib.Path(folder).expanduser() / MARK).is_file()


def save_full_head(folder: str, head: FullHead, kv: str, trunk: TrunkCheckpoint) -> None:
    """Writes the head with the rest of the trunk as an Orbax checkpoint, marked with its kv and its trunk."""
    params = {**trunk.params, **head.params}
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(params[name]).tobytes() for name in sorted(params)))
    save_orbax(TrunkCheckpoint(trunk.config, params, digest.hexdigest, trunk.path), folder)
    (pathlib.Path(folder) / MARK).write_text(json.dumps({"kv": kv, "trunk": trunk.identity}) + "\n")


def load_full_head(folder: str, kv: str, trunk: TrunkCheckpoint, dtype: str) -> FullHead:
    """Loads what save_full_head wrote. Raises ValueError if it cannot be served as `kv` on the trunk."""
    mark = json.loads((pathlib.Path(folder).expanduser() / MARK).read_text())
    if mark["kv"] != "shared":
        raise ValueError(
            f"{folder} makes K/V of its own: it is a model by itself, served with --config.trunk.source={folder}"
        )
    if kv != "shared":
        raise ValueError(f"{folder} was trained to read the trunk's K/V: it can be served as kv='shared' alone")
    if mark["trunk"] != trunk.identity:
        raise ValueError(
            f"{folder} was trained on the trunk {mark['trunk'][:12]}, not on the one loaded, {trunk.identity[:12]}"
        )
    stored = load_trunk(folder, dtype).params
    return FullHead({name: stored[name] for name in OWN_PARAMS if name in stored})


def make_trunk(
    config: ModelConfig,
    params: Mapping[str, Weight],
    heads: Sequence[tuple[HeadConfig, Factors | FullHead]],
    place: Callable[[Mapping[str, Weight]], dict[str, Any]],
) -> tuple[Trunk, list[tuple[HeadConfig, Factors]]]:
    """(The trunk, its weights where `place` puts them; what is left for adapter slots). A fully fine-tuned head lies
    beside the trunk, and has an empty adapter. Raises ValueError if it is not the only head."""
    adapters: list[tuple[HeadConfig, Factors]] = []
    for head, weights in heads:
        if not isinstance(weights, FullHead):
            adapters.append((head, weights))
        elif len(heads) == 1:
            return PairedTrunk(config, place(params), place(weights.params)), [(head, {})]
        else:
            raise ValueError(
                f"the head {head.name!r} is fully fine-tuned: an engine holds one such head, and no others with it; "
                f"--config.models (evaluate.py) or --config=single.py leaves the others out"
            )
    return Trunk(config, place(params)), adapters


class PairedBlock(Block):
    """A layer's weights of the trunk and of the head. Every row runs through the trunk's, and those from `first` on
    through the head's too; of these a row keeps what its slot says (a reader can be the trunk's: slot 0)."""

    def __init__(self, trunk: Block, own: Block):
        self.trunk, self.own = trunk, own

    def at(self, layer: Array, kernels: str) -> PairedBlock:
        return PairedBlock(self.trunk.at(layer, kernels), self.own.at(layer, kernels))

    def attention_inputs(
        self,
        config: ModelConfig,
        bank: Adapters | None,
        x: Array,
        slots: Array,
        first: int,
        tables: Tables,
        pin: Pin = lambda x: x,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = self.trunk.attention_inputs(config, bank, x, slots, first, tables, pin)
        cos, sin = tables
        own, _, _ = self.own.attention_inputs(config, bank, x[first:], slots[first:], 0, (cos[first:], sin[first:]))
        return _by_slot(q, own, slots, first), k, v

    def attention_output(self, bank: Adapters | None, attended: jax.Array, slots: Array, first: int) -> jax.Array:
        out = self.trunk.attention_output(bank, attended, slots, first)
        return _by_slot(out, self.own.attention_output(bank, attended[first:], slots[first:], 0), slots, first)

    def mlp(self, config: ModelConfig, bank: Adapters | None, x: jax.Array, slots: Array, first: int) -> jax.Array:
        out = self.trunk.mlp(config, bank, x, slots, first)
        return _by_slot(out, self.own.mlp(config, bank, x[first:], slots[first:], 0), slots, first)


def _by_slot(trunks: jax.Array, own: jax.Array, slots: Array, first: int) -> jax.Array:
    """trunks [B, ..], but own [B - first, ..] in the rows from `first` on that have a slot."""
    chosen = jnp.where(slots[first:].reshape(-1, *[1] * (own.ndim - 1)) > 0, own, trunks[first:])
    return jnp.concatenate([trunks[:first], chosen])


class PairedTrunk(Trunk):
    """The trunk and one fully fine-tuned head."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], own: Mapping[str, Any]):
        super().__init__(config, dict(params))
        self.blocks = PairedBlock(self.blocks, Block(dict(own)))
        self.own_final_norm = nnx.Param(own["final_norm"])

    def normed(self, x: jax.Array, slots: Array) -> jax.Array:
        own = rms_norm(x, self.own_final_norm[...], self.config.rms_norm_eps)
        return _by_slot(super().normed(x, slots), own, slots, 0)
