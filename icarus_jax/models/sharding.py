"""The device mesh, and what lies where on it.

The user's mesh is data x model. gcd(K, model) devices of `model` split the KV heads; the rest of them, the inner axis
`page`, and `data` split the tokens of every page. So every device walks the same page lists, no K/V is stored twice,
and the page pool knows nothing of devices. Letters: config.py.
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
KERNELS_OF = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}  # by platform: the kernels written for it


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> the mesh axes that split it, the major one first. () and names that are not here: not split.

    Where an axis does not divide evenly, mesh axes are left out from the right until it does.
    """

    rows: tuple[str, ...] = ("data",)  # B, outside attention
    vocab: tuple[str, ...] = ("model", "page")
    mlp: tuple[str, ...] = ("model", "page")
    kv_heads: tuple[str, ...] = ("model",)
    query_lanes: tuple[str, ...] = ("model",)  # N * H; the `page` devices of a KV head all need all of its queries
    attended_lanes: tuple[str, ...] = ("model", "page")  # N * H, as the output projection takes them
    qkv_inputs: tuple[str, ...] = ("page",)  # D of the q, k, v projection: what `query_lanes` leaves undivided
    kv_tokens: tuple[str, ...] = ("data", "page")  # of every page


PARAM_AXES = {
    "embed": ("vocab", "embed"),
    "lm_head": ("vocab", "embed"),
    "final_norm": ("embed",),
    "attn_norm": ("layers", "embed"),
    "mlp_norm": ("layers", "embed"),
    "q_norm": ("layers", "head_dim"),
    "k_norm": ("layers", "head_dim"),
    "qkv": ("layers", "qkv_inputs", "kv_heads", "group", "head_dim"),
    "qkv_bias": ("layers", "kv_heads", "group", "head_dim"),
    "o": ("layers", "attended_lanes", "embed"),
    "gate_up": ("layers", "embed", "two", "mlp"),
    "down": ("layers", "mlp", "embed"),
}
# By platform: the orders in which a weight's dimensions may lie in a device's memory, the outermost first; elsewhere,
# and for what is not here, it is the runtime's choice. A TPU keeps the last two in tiles of 8 x 128, and reads a layer
# well if a product contracts or makes them: 2, K and G + 2 go outside. That is what XLA itself asks for on v5e, v6e and
# v7x, if it may; its default knows the shape alone (docs/kernels.md). Of several orders the first one counts whose last
# dimension fills tiles on every device, else the last.
LANES = 128
ORDERS: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "tpu": {
        "qkv": ((0, 2, 3, 4, 1),),
        "o": ((0, 1, 2),),
        "gate_up": ((0, 2, 1, 3), (0, 2, 3, 1)),
        "down": ((0, 1, 2),),
    }
}
# A head's factors a [L, A, r, din] and b [L, A, r, dout] are split as the projection's own din or dout is.
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


Bank = TypeVar("Bank", bound=nnx.Module)


class Weight(Protocol):
    """A NumPy array, or something that reads like one: only what is indexed need ever be in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> np.ndarray: ...


@runtime_checkable
class Restorable(Protocol):
    """A weight whose storage brings every device its own part."""

    def restore(self, sharding: NamedSharding, dtype: DTypeLike) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """A mesh with the axes AXES, and the rules for it."""

    mesh: Mesh
    rules: Rules = Rules()

    @property
    def token_shards(self) -> int:
        """How many devices share the tokens of a page."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules.kv_tokens)

    def kernels(self, wanted: str = "auto") -> str:
        """The implementation of the ops: the one wanted (engine.kernels), or the one made for these devices."""
        return KERNELS_OF.get(self.platform, "xla") if wanted == "auto" else wanted

    @property
    def platform(self) -> str:
        """Of the devices."""
        return self.mesh.devices.flat[0].platform

    @property
    def rows_are_split(self) -> bool:
        return math.prod(self.mesh.shape[axis] for axis in self.rules.rows) > 1

    def spec(self, axes: Sequence[str], shape: Sequence[int]) -> PartitionSpec:
        """How an array with these logical axes is split."""

        def fit(axis: str, size: int) -> tuple[str, ...] | None:
            mesh_axes = getattr(self.rules, axis, ())
            while size % math.prod(self.mesh.shape[a] for a in mesh_axes):
                mesh_axes = mesh_axes[:-1]
            return mesh_axes or None

        return PartitionSpec(*map(fit, axes, shape))

    def named(self, axes: Sequence[str] = (), shape: Sequence[int] = ()) -> NamedSharding:
        """The sharding of an array with these logical axes; none: replicated."""
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def param(self, name: str, shape: Sequence[int]) -> NamedSharding:
        """Where a trunk's weight lies (names and shapes: checkpoint.py)."""
        return self.named(PARAM_AXES[name], shape)

    def held(self, name: str, shape: Sequence[int]) -> NamedSharding | Format:
        """param, and the order of the weight's dimensions in memory where that is ours to say."""
        sharding, orders = self.param(name, shape), ORDERS.get(self.platform, {}).get(name)
        if orders is None:
            return sharding
        part = sharding.shard_shape(tuple(shape))
        order = next((order for order in orders if part[order[-1]] % LANES == 0), orders[-1])
        return Format(DimensionOrder(order), sharding)

    def as_held(self, x: Any) -> NamedSharding | Format:
        """What `held` says of x (an array, or a jax.ShapeDtypeStruct), read from x: what a program that takes x as it
        lies has to be told."""
        layout = x.format.layout if self.platform in ORDERS else None
        return x.sharding if layout is None else Format(DimensionOrder(layout.major_to_minor), x.sharding)

    def factors(self, target: str, a: Sequence[int], b: Sequence[int]) -> tuple[NamedSharding, NamedSharding]:
        """Where the heads' factors a and b of a projection, of these shapes, lie."""
        din, dout = FACTOR_AXES[target]
        whole = ("layers", "slots", "rank")
        return self.named((*whole, din), a), self.named((*whole, dout), b)

    def constrain(self, x: jax.Array, *axes: str) -> jax.Array:
        """x, split by its logical axes at this point of a traced program."""
        return jax.lax.with_sharding_constraint(x, self.named(axes, x.shape))

    def place_params(self, params: Mapping[str, Weight], dtype: DTypeLike) -> dict[str, jax.Array]:
        """A trunk's weights on the mesh, shard by shard. Where ORDERS has a word, a weight is turned around on the
        devices: they hold one weight twice for a moment."""

        def put(name: str, values: Weight) -> jax.Array:
            placed, held = place(values, self.param(name, values.shape), dtype), self.held(name, values.shape)
            return jax.device_put(placed, held) if isinstance(held, Format) else placed

        return {name: put(name, values) for name, values in params.items()}

    def place_bank(self, bank: Bank) -> Bank:
        """Moves the heads' factors to where they belong on the mesh; returns the bank."""
        for target in TARGETS:
            if (lora := getattr(bank, target)) is not None:
                for side, sharding in zip("ab", self.factors(target, lora.a.shape, lora.b.shape), strict=True):
                    values = getattr(lora, side)[...]
                    setattr(lora, side, nnx.Param(place(np.asarray(values), sharding, values.dtype)))
        return bank


def make_mesh_layout(
    config: EngineConfig, num_kv_heads: int, devices: Sequence[jax.Device] | None = None
) -> MeshLayout:
    """The mesh of engine.mesh for a model with K KV heads, over the first of `devices` (all of this run's).

    Raises ValueError: too few devices, processes without one, or a page that they cannot share.
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


def place(values: Weight | Restorable, sharding: NamedSharding, dtype: DTypeLike) -> jax.Array:
    """Puts a weight on its devices. The host holds one device's part at a time (jax.make_array_from_callback would
    hold those of all its devices)."""
    if isinstance(values, Restorable):
        return values.restore(sharding, dtype)
    shape = tuple(values.shape)
    parts = sharding.addressable_devices_indices_map(shape)
    begin = lambda index: [part.indices(n)[0] for part, n in zip(index, shape, strict=True)]  # noqa: E731
    shards, last, piece = [], None, None
    for device, index in sorted(parts.items(), key=lambda item: begin(item[1])):
        if piece is None or begin(index) != last:
            piece, last = None, begin(index)  # given up before the next is read
            piece = np.asarray(values[index], dtype)
        shards.append(jax.block_until_ready(jax.device_put(piece, device)))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)
