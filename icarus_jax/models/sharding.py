"""The device mesh, and how arrays are split over it.

The user gives a mesh of data x model devices. Of the axis `model`, gcd(K, model) devices split the KV heads. The other
factor of `model` is an axis of its own, `page`. It splits the tokens of every page, together with `data`. So every
device uses the same page lists, no K/V is stored twice, and the page pool need not know of devices. The axis letters
are those of config.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as DimensionOrder
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from icarus_jax.config import TARGETS, EngineConfig

AXES = ("data", "model", "page")
KERNELS_OF = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}  # platform -> the kernels written for it


@dataclasses.dataclass(frozen=True)
class Rules:
    """For each logical axis of an array, the mesh axes that split it, the major one first.

    A logical axis that is not here is not split. If its size is not divisible by the number of devices, mesh axes are
    left out from the right until it is.

    Attributes:
        rows: B, outside of attention.
        vocab: V.
        mlp: F.
        experts: E.
        kv_heads: K.
        query_lanes: N * H, as attention takes them: each `page` device of a KV head needs all of its queries.
        attended_lanes: N * H, as the output projection takes them.
        qkv_inputs: D of the q, k, v projection, which `query_lanes` does not split over `page`.
        kv_tokens: The tokens of every page.
    """

    rows: tuple[str, ...] = ("data",)
    vocab: tuple[str, ...] = ("model", "page")
    mlp: tuple[str, ...] = ("model", "page")
    experts: tuple[str, ...] = ("model", "page")
    kv_heads: tuple[str, ...] = ("model",)
    query_lanes: tuple[str, ...] = ("model",)
    attended_lanes: tuple[str, ...] = ("model", "page")
    qkv_inputs: tuple[str, ...] = ("page",)
    kv_tokens: tuple[str, ...] = ("data", "page")


# The logical axes of a trunk's weights, for serving and for training.
PARAM_AXES = {
    "embed": ("vocab", "embed"),
    "lm_head": ("vocab", "embed"),
    "final_norm": ("embed",),
    **dict.fromkeys(("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm", "o_bias"), ("layers", "embed")),
    **dict.fromkeys(("q_norm", "k_norm"), ("layers", "head_dim")),
    "qkv": ("layers", "qkv_inputs", "kv_heads", "group", "head_dim"),
    "qkv_bias": ("layers", "kv_heads", "group", "head_dim"),
    "sinks": ("layers", "query_heads"),
    "o": ("layers", "attended_lanes", "embed"),
    "gate_up": ("layers", "embed", "two", "mlp"),
    "down": ("layers", "mlp", "embed"),
    "router": ("layers", "embed", "choices"),
    "router_bias": ("layers", "choices"),
    **dict.fromkeys(("experts_gate", "experts_up"), ("layers", "experts", "embed", "expert_mlp")),
    "experts_down": ("layers", "experts", "expert_mlp", "embed"),
    **dict.fromkeys(("experts_gate_bias", "experts_up_bias"), ("layers", "experts", "expert_mlp")),
    "experts_down_bias": ("layers", "experts", "embed"),
}
# For each platform, the orders in which a weight's dimensions may lie in a device's memory, the outermost first. The
# runtime chooses the order of weights and platforms that are not here. A TPU stores the last two dimensions in tiles of
# 8 x 128, and reads a layer fast if these are the dimensions that a product contracts or makes; so 2, K and G + 2 go
# outside. XLA chooses the same orders on v5e, v6e and v7x if it is free to; its default looks only at the shape
# (docs/kernels.md). Of several orders, the first one whose last dimension fills tiles on every device counts, else the
# last one.
LANES = 128  # the columns of a tile
ORDERS: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "tpu": {
        "qkv": ((0, 2, 3, 4, 1),),
        "o": ((0, 1, 2),),
        "gate_up": ((0, 2, 1, 3), (0, 2, 3, 1)),
        "down": ((0, 1, 2),),
    }
}
# The logical axes of each projection's din and dout. The heads' factors a [L, A, r, din] and b [L, A, r, dout] are
# split in the same way.
FACTOR_AXES = {
    "q_proj": ("embed", "query_lanes"),
    "k_proj": ("embed", "query_lanes"),
    "v_proj": ("embed", "query_lanes"),
    "o_proj": ("attended_lanes", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}
KV_PAGES_AXES = ("layers", "pages", "kv_heads", "kv_tokens", "head_dim")
KV_SCALES_AXES = ("layers", "kv_heads", "two", "head_dim")


Bank = TypeVar("Bank", bound=nnx.Module)


class Weight(Protocol):
    """A NumPy array, or something that is indexed like one and reads only that part from disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole weight."""

    def __getitem__(self, index: Any) -> np.ndarray: ...


@runtime_checkable
class Restorable(Protocol):
    """A weight that its storage can load onto devices, each device its own part."""

    def restore(self, sharding: NamedSharding, dtype: DTypeLike) -> jax.Array:
        """Loads the weight with this sharding and dtype."""


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """A mesh and the rules for it. Serving's mesh has the axes AXES; training has a mesh and rules of its own."""

    mesh: Mesh
    rules: Rules = Rules()

    @property
    def token_shards(self) -> int:
        """The number of devices that share the tokens of a page."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.kv_tokens)

    def kernels(self, wanted: str = "auto") -> str:
        """Returns the implementation of the ops: `wanted`, or for 'auto' the one written for these devices."""
        return KERNELS_OF.get(self.platform, "xla") if wanted == "auto" else wanted

    @property
    def platform(self) -> str:
        """The platform of the devices, for example 'cpu' or 'tpu'."""
        return self.mesh.devices.flat[0].platform

    @property
    def rows_are_split(self) -> bool:
        """Whether the rows of a step are split over devices, outside of attention."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.rows) > 1

    def spec(self, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
        """Returns how an array with these logical axes and this shape is split."""

        def fit(axis: str, size: int) -> tuple[str, ...] | None:
            mesh_axes = getattr(self.rules, axis, ())
            while size % math.prod(self.mesh.shape[a] for a in mesh_axes):
                mesh_axes = mesh_axes[:-1]
            return mesh_axes or None

        return PartitionSpec(*map(fit, axes, shape))

    def named(self, axes: Sequence[str] = (), shape: Sequence[int] = ()) -> NamedSharding:
        """Returns the sharding of an array with these logical axes and this shape; without axes: replicated."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def param(self, name: str, shape: Sequence[int]) -> NamedSharding:
        """Returns the sharding of a trunk's parameter; weights/checkpoint.py has the names and shapes."""
        return self.named(PARAM_AXES[name], shape)

    def held(self, name: str, shape: Sequence[int]) -> NamedSharding | Format:
        """Returns the sharding of a trunk's parameter, with the order of its dimensions in memory if ORDERS has one."""
        sharding, orders = self.param(name, shape), ORDERS.get(self.platform, {}).get(name)
        if orders is None:
            return sharding
        part = sharding.shard_shape(tuple(shape))
        order = next((order for order in orders if part[order[-1]] % LANES == 0), orders[-1])
        return Format(DimensionOrder(order), sharding)

    def as_held(self, x: Any) -> NamedSharding | Format:
        """Returns the sharding and memory order that an array or a jax.ShapeDtypeStruct has.

        A program that takes `x` without a copy must be compiled for these.
        """
        layout = x.format.layout if self.platform in ORDERS else None
        return x.sharding if layout is None else Format(DimensionOrder(layout.major_to_minor), x.sharding)

    def factors(self, target: str, a: Sequence[int], b: Sequence[int]) -> tuple[NamedSharding, NamedSharding]:
        """Returns the shardings of a projection's factors with the shapes a [L, A, r, din] and b [L, A, r, dout]."""
        din, dout = FACTOR_AXES[target]
        whole = ("layers", "slots", "rank")
        return self.named((*whole, din), a), self.named((*whole, dout), b)

    def constrain(self, x: jax.Array, *axes: str) -> jax.Array:
        """Splits an array by its logical axes at this point of a traced program."""
        return jax.lax.with_sharding_constraint(x, self.named(axes, x.shape))

    def place_params(self, params: Mapping[str, Weight], dtype: DTypeLike) -> dict[str, jax.Array]:
        """Puts a trunk's canonical parameters on the mesh, one device's part at a time.

        Weights of ORDERS are reordered on the devices, which hold one such weight twice while that takes.
        """

        def put(name: str, values: Weight) -> jax.Array:
            placed, held = place(values, self.param(name, values.shape), dtype), self.held(name, values.shape)
            return jax.device_put(placed, held) if isinstance(held, Format) else placed

        return {name: put(name, values) for name, values in params.items()}

    def place_bank(self, bank: Bank) -> Bank:
        """Puts the heads' factors on the mesh, and returns the bank."""
        for target in TARGETS:
            if (lora := getattr(bank, target)) is not None:
                for side, sharding in zip("ab", self.factors(target, lora.a.shape, lora.b.shape), strict=True):
                    values = getattr(lora, side)[...]
                    setattr(lora, side, nnx.Param(place(np.asarray(values), sharding, values.dtype)))
        return bank


def make_mesh_layout(
    config: EngineConfig, num_kv_heads: int, devices: Sequence[jax.Device] | None = None
) -> MeshLayout:
    """Makes the mesh of an engine.

    Args:
        config: The engine's sizes; `mesh` is DATAxMODEL.
        num_kv_heads: K, the model's KV heads.
        devices: The devices, of which the first are used. None: all devices of this run.

    Raises:
        ValueError: There are too few devices, a process would have none, or the devices cannot share a page evenly.
    """
    devices = jax.devices() if devices is None else devices
    data, model = config.mesh_shape
    size = data * model
    if size > len(devices):
        raise ValueError(f"engine.mesh={config.mesh} needs {size} devices; there are {len(devices)}")
    if size < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"engine.mesh={config.mesh} has {size} devices; with {jax.process_count()} processes it has to have all "
            f"{len(devices)}"
        )
    kv = math.gcd(num_kv_heads, model)
    shape = (data, kv, model // kv)
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size])
    layout = MeshLayout(mesh)
    shards = layout.token_shards
    if config.page_size % shards:
        raise ValueError(
            f"engine.page_size={config.page_size}: with engine.mesh={config.mesh} and {num_kv_heads} KV heads, "
            f"{shards} devices share the tokens of a page, so that engine.page_size has to be a multiple of {shards}, "
            f"for example {-(-max(config.page_size, 8 * shards) // shards) * shards}"
        )
    return layout


def device_parts(sharding: NamedSharding, shape: tuple[int, ...]) -> list[tuple[jax.Device, tuple[slice, ...]]]:
    """Lists the parts of an array that the devices of this process hold.

    Args:
        sharding: How the array is split.
        shape: Its shape.

    Returns:
        Devices and their parts, a slice with a start and a stop for each axis. Equal parts are neighbours.
    """

    def bounded(index: Any) -> tuple[slice, ...]:
        return tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, shape, strict=True))

    parts = sharding.addressable_devices_indices_map(shape).items()
    return sorted(((d, bounded(index)) for d, index in parts), key=lambda item: [part.start for part in item[1]])


def place(values: Weight | Restorable, sharding: NamedSharding, dtype: DTypeLike) -> jax.Array:
    """Puts a weight on its devices.

    The host holds one device's part at a time. jax.make_array_from_callback would hold the parts of all its devices.

    Args:
        values: The weight.
        sharding: How it is split.
        dtype: The dtype on the devices.
    """
    if isinstance(values, Restorable):
        return values.restore(sharding, dtype)
    shape = tuple(values.shape)
    shards, last, piece = [], None, None
    for device, index in device_parts(sharding, shape):
        if piece is None or index != last:
            piece, last = None, index  # this part is freed before the next one is read
            piece = np.asarray(values[index], dtype)
        shards.append(jax.block_until_ready(jax.device_put(piece, device)))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)
