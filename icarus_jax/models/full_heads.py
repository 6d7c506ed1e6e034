"""A fully fine-tuned head: it has weights of its own instead of an adapter, and still reads the trunk's K/V.

It is the variant of ICaRus (arXiv 2603.13281) that trains all weights of the logical decoder. The head bank cannot hold
it, so an engine serves one such head beside the trunk. Rows are the same as for adapters: writers run through the
trunk's weights, and the head's readers through its own.
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
from icarus_jax.models.block import BLOCK_PARAMS, Block, Pin
from icarus_jax.models.head_bank import Adapters, Factors
from icarus_jax.models.layers import Tables, rms_norm
from icarus_jax.models.products import MeshLinear
from icarus_jax.models.sharding import Weight
from icarus_jax.models.trunk import Trunk
from icarus_jax.weights.checkpoint import TrunkCheckpoint, load_trunk, save_orbax
from icarus_jax.weights.reading import read_json, whole
from pallas_kernels.paged_attention.work import Array

OWN_PARAMS = (*BLOCK_PARAMS, "final_norm")  # the head's own parameters; it shares the trunk's embed and lm_head
MARK = "icarus_head.json"  # the file that marks a folder as such a head; holds its kind and its trunk's identity


@dataclasses.dataclass(frozen=True, eq=False)
class FullHead:
    """The weights of a fully fine-tuned head.

    Attributes:
        params: The parameters of OWN_PARAMS that the family has, in the shapes of weights/checkpoint.py. The key and
            value parts of `qkv` are not used.
    """

    params: Mapping[str, np.ndarray]


def is_full_head(folder: str) -> bool:
    """Returns whether a folder holds a fully fine-tuned head that `save_full_head` wrote."""
    return (pathlib.Path(folder).expanduser() / MARK).is_file()


def save_full_head(folder: str, head: FullHead, kv: str, trunk: TrunkCheckpoint) -> None:
    """Writes a head as an Orbax checkpoint of a whole trunk, with a file that marks it as a head.

    Args:
        folder: The folder to write.
        head: The head.
        kv: How it was trained: 'shared' (it reads the trunk's K/V) or 'isolated' (it makes K/V of its own).
        trunk: The trunk that it was trained on, which gives the other parameters.
    """
    params = {**trunk.params, **head.params}
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(params[name]).tobytes() for name in sorted(params)))
    save_orbax(TrunkCheckpoint(trunk.config, params, digest.hexdigest, trunk.path), folder)
    (pathlib.Path(folder) / MARK).write_text(json.dumps({"kv": kv, "trunk": trunk.identity}) + "\n")


def load_full_head(folder: str, kv: str, trunk: TrunkCheckpoint, dtype: str) -> FullHead:
    """Loads a head that `save_full_head` wrote.

    Args:
        folder: Its folder.
        kv: How it is to be served.
        trunk: The trunk that it is to be served on.
        dtype: The dtype of the weights: 'float32' or 'bfloat16'.

    Raises:
        ValueError: A file of it is broken, it was trained to make K/V of its own or on another trunk, or `kv` is not
            'shared'.
    """
    trained, identity = _read_mark(pathlib.Path(folder).expanduser() / MARK)
    if trained != "shared":
        raise ValueError(
            f"{folder} makes K/V of its own: it is a model by itself, served with --config.trunk.source={folder}"
        )
    if kv != "shared":
        raise ValueError(f"{folder} was trained to read the trunk's K/V: it can be served as kv='shared' alone")
    if identity != trunk.identity:
        raise ValueError(
            f"{folder} was trained on the trunk {identity[:12]}, not on the one loaded, {trunk.identity[:12]}"
        )
    stored = load_trunk(folder, dtype).params
    return FullHead({name: stored[name] for name in OWN_PARAMS if name in stored})


def _read_mark(file: pathlib.Path) -> tuple[str, str]:
    """Returns how a head was trained, and the identity of its trunk."""
    with whole(file, "is no mark of a head"):
        mark = read_json(file)
        if mark["kv"] not in ("shared", "isolated") or not isinstance(mark["trunk"], str):
            raise ValueError("kv is 'shared' or 'isolated', and trunk the identity of a trunk")
        return mark["kv"], mark["trunk"]


def make_trunk(
    config: ModelConfig,
    params: Mapping[str, Weight],
    heads: Sequence[tuple[HeadConfig, Factors | FullHead]],
    place: Callable[[Mapping[str, Weight]], dict[str, Any]],
) -> tuple[Trunk, list[tuple[HeadConfig, Factors]]]:
    """Makes the trunk, with a fully fine-tuned head beside it if there is one.

    Args:
        config: The trunk's sizes and options.
        params: The trunk's canonical parameters (weights/checkpoint.py).
        heads: The heads and their weights.
        place: Puts parameters on the mesh.

    Returns:
        The trunk, and the heads with the adapters that are to be loaded into slots. That of a fully fine-tuned head is
        empty.

    Raises:
        ValueError: A fully fine-tuned head is not the only head.
    """
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
    """The weights of the trunk and of the head, of one layer or of all.

    Its methods are those of Block. Every row runs through the trunk's weights. The rows from `first` on run through the
    head's weights too, and each of them keeps the result that its slot asks for. A reader row can be the trunk's (slot
    0): its result is then that of the trunk.
    """

    def __init__(self, trunk: Block, own: Block):
        """Pairs the trunk's weights with the head's."""
        self.trunk, self.own = trunk, own

    def at(self, layer: Array, linear: MeshLinear) -> PairedBlock:
        """Returns the pair of one layer; see `Block.at`."""
        return PairedBlock(self.trunk.at(layer, linear), self.own.at(layer, linear))

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
        """Computes q by slot, and the trunk's k and v; see `Block.attention_inputs`."""
        q, k, v = self.trunk.attention_inputs(config, bank, x, slots, first, tables, pin)
        cos, sin = tables
        own, _, _ = self.own.attention_inputs(config, bank, x[first:], slots[first:], 0, (cos[first:], sin[first:]))
        return _by_slot(q, own, slots, first), k, v

    def attention_sinks(self, slots: Array, first: int) -> jax.Array | None:
        """Returns the sinks by slot; see `Block.attention_sinks`."""
        trunks, own = self.trunk.attention_sinks(slots, first), self.own.attention_sinks(slots, first)
        if trunks is None or own is None:
            return None
        per_row = jnp.broadcast_to(trunks, (len(slots), trunks.shape[1]))
        return _by_slot(per_row, jnp.broadcast_to(own, per_row[first:].shape), slots, first)

    def attention_output(
        self, config: ModelConfig, bank: Adapters | None, attended: jax.Array, slots: Array, first: int
    ) -> jax.Array:
        """Computes by slot what attention adds to the residual stream; see `Block.attention_output`."""
        out = self.trunk.attention_output(config, bank, attended, slots, first)
        own = self.own.attention_output(config, bank, attended[first:], slots[first:], 0)
        return _by_slot(out, own, slots, first)

    def mlp(self, config: ModelConfig, bank: Adapters | None, x: jax.Array, slots: Array, first: int) -> jax.Array:
        """Computes by slot what the MLP adds to the residual stream; see `Block.mlp`."""
        out = self.trunk.mlp(config, bank, x, slots, first)
        return _by_slot(out, self.own.mlp(config, bank, x[first:], slots[first:], 0), slots, first)


def _by_slot(trunks: jax.Array, own: jax.Array, slots: Array, first: int) -> jax.Array:
    """Chooses each row's result by its slot.

    Args:
        trunks: [B, ..], the trunk's results.
        own: [B - first, ..], the head's results of the rows from `first` on.
        slots: i32[B], the rows' slots.
        first: The first row that may be the head's.

    Returns:
        [B, ..]: the head's result in the rows from `first` on that have a slot, else the trunk's.
    """
    ones = (1,) * (own.ndim - 1)
    slot = slots[first:].reshape(-1, *ones)  # broadcasts over the other axes
    chosen = jnp.where(slot > 0, own, trunks[first:])
    return jnp.concatenate([trunks[:first], chosen])


class PairedTrunk(Trunk):
    """The trunk and one fully fine-tuned head.

    Attributes:
        own_final_norm: [D], the head's weights of the last RMSNorm.
    """

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], own: Mapping[str, Any]):
        """Makes the pair of weights that lie on the mesh.

        Args:
            config: The trunk's sizes and options.
            params: The trunk's parameters.
            own: The head's parameters, OWN_PARAMS.
        """
        super().__init__(config, dict(params))
        self.blocks = PairedBlock(self.blocks, Block(dict(own)))
        self.own_final_norm = nnx.Param(own["final_norm"])

    def normed(self, x: jax.Array, slots: Array) -> jax.Array:
        """Applies the final RMSNorm of the trunk or of the head; see `Trunk.normed`."""
        own = rms_norm(x, self.own_final_norm[...], self.config.rms_norm_eps)
        return _by_slot(super().normed(x, slots), own, slots, 0)
