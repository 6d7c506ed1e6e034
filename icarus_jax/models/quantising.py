"""Weights in 8 bits on the mesh. They are quantised on the host, as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec

from icarus_jax.models.sharding import MeshLayout, Restorable, Weight, device_parts
from pallas_kernels.linear import Quantised, quantise
from pallas_kernels.linear.quantised import KINDS

SLAB = 1 << 24  # weights that are quantised at once, if one layer has no more


def abstract_quantised(name: str, shape: tuple[int, ...], layout: MeshLayout, kind: str) -> Quantised:
    """Returns shapes and shardings of a parameter in 8 bits, as programs are compiled for them.

    Args:
        name: The parameter's name.
        shape: Its shape.
        layout: The mesh.
        kind: 'int8' or 'fp8'.
    """
    values = jax.ShapeDtypeStruct(shape, KINDS[kind][0], sharding=layout.held(name, shape))
    scales = (*shape[:1], *shape[2:])
    return Quantised(values, jax.ShapeDtypeStruct(scales, np.float32, sharding=_of_scales(layout.param(name, shape))))


def place_quantised(name: str, weight: Weight, layout: MeshLayout, kind: str) -> Quantised:
    """Quantises a parameter, and puts it on the mesh.

    A scale needs all inputs of its output channel. Where devices split the inputs, each part is read with all of them.
    The host holds one device's part in 8 bits, and of what it was read from a layer or SLAB weights.

    Args:
        name: The parameter's name.
        weight: The parameter.
        layout: The mesh.
        kind: 'int8' or 'fp8'.

    Returns:
        The values, split like the parameter itself, and the scales, split like its output channels.
    """
    if isinstance(weight, Restorable):
        weight = weight[(slice(None),) * len(weight.shape)]  # its storage has no use for small parts
    shape, sharding = tuple(weight.shape), layout.param(name, weight.shape)
    values, scales, last, piece = [], [], None, None
    for device, index in device_parts(sharding, shape):
        if piece is None or index != last:
            piece, last = None, index  # this part is freed before the next one is read
            piece = _quantised_part(weight, index, kind)
        values.append(jax.block_until_ready(jax.device_put(piece.values, device)))
        scales.append(jax.block_until_ready(jax.device_put(piece.scales, device)))
    make, held = jax.make_array_from_single_device_arrays, layout.held(name, shape)
    placed = make(shape, sharding, values)
    if isinstance(held, Format):
        placed = jax.device_put(placed, held)
    return Quantised(placed, make((*shape[:1], *shape[2:]), _of_scales(sharding), scales))


def _of_scales(sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding of the scales of a parameter with this sharding: that of all of its axes but axis 1."""
    first, _, *rest = sharding.spec
    return NamedSharding(sharding.mesh, PartitionSpec(first, *rest))


def _quantised_part(weight: Weight, index: tuple[slice, ...], kind: str) -> Quantised:
    """Quantises a part of a parameter. Its scales are those of all inputs, also where the part has only some of them.

    Args:
        weight: The parameter.
        index: The part: a slice for each axis, with a start and a stop.
        kind: 'int8' or 'fp8'.
    """
    size = [part.stop - part.start for part in index]
    values, scales = np.empty(size, KINDS[kind][0]), np.empty([*size[:1], *size[2:]], np.float32)
    for slab in _slabs(index[0], math.prod(weight.shape[1:])):
        read = quantise(weight[(slab, slice(None), *index[2:])], kind)
        at = slice(slab.start - index[0].start, slab.stop - index[0].start)
        values[at], scales[at] = read.values[:, index[1]], read.scales
    return Quantised(values, scales)


def _slabs(whole: slice, weights: int) -> Iterator[slice]:
    """Cuts the first axis of a parameter into slabs.

    Args:
        whole: The part of the axis.
        weights: The weights of one index of it.
    """
    step = max(1, SLAB // weights)
    for first in range(whole.start, whole.stop, step):
        yield slice(first, min(first + step, whole.stop))
