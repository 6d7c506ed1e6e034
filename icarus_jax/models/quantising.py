"""Quantised weights on the mesh: quantised on the host, as they are read, or kept as their checkpoint has them."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec

from icarus_jax.config import AS_STORED, INT4
from icarus_jax.models.sharding import MeshLayout, Restorable, Weight, device_parts
from icarus_jax.weights.as_stored import BLOCKS, CHANNELS, Channels, read_blocks, read_channels, stored_form
from icarus_jax.weights.blocks import BLOCK, Blocks
from icarus_jax.weights.gguf_blocks import quantise_rows
from icarus_jax.weights.params import TENSORS, StoredParam
from pallas_kernels.linear import Panels, Quantised, pack_blocks, quantise
from pallas_kernels.linear.panels import WIDTH
from pallas_kernels.linear.quantised import KINDS

log = logging.getLogger(__name__)

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


def in_blocks(params: Mapping[str, Any], kind: str) -> bool:
    """Returns whether parameters would be kept in blocks, which only the kernels for a single CPU device multiply.

    Args:
        params: The weights of matrix products, by name.
        kind: How they are to be kept, one of config.WEIGHTS.
    """
    return kind == INT4 or (kind == AS_STORED and any(stored_form(param) == BLOCKS for param in params.values()))


def place_quantised(name: str, weight: Weight, layout: MeshLayout, kind: str) -> Quantised | Panels | None:
    """Puts a parameter on the mesh in fewer bits.

    Args:
        name: The parameter's name.
        weight: The parameter.
        layout: The mesh.
        kind: How it is to be kept, one of config.WEIGHTS but ''.

    Returns:
        `Quantised` if it has a scale for each output channel, `Panels` if it is kept in blocks. None: it cannot be kept
        so.
    """
    shape, form = tuple(weight.shape), stored_form(weight) if kind == AS_STORED else ""
    if isinstance(weight, Restorable) and kind != AS_STORED:
        weight = weight[(slice(None),) * len(shape)]  # its storage has no use for small parts
    if kind in KINDS:
        return _place_channels(name, shape, layout, functools.partial(_quantised_part, weight, kind))
    if isinstance(weight, StoredParam) and form == CHANNELS:
        return _place_channels(name, shape, layout, functools.partial(_stored_part, read_channels(weight)))
    blocks = None
    # pack_blocks pads with columns of zeros. `Trunk` cuts them off the logits; a Block expects none.
    if name in TENSORS or math.prod(shape[2:]) % WIDTH == 0:
        if kind == INT4:
            blocks = _quantised_blocks(name, weight)
        elif isinstance(weight, StoredParam) and form == BLOCKS:
            blocks = read_blocks(weight)
    if blocks is None:
        log.info("%s: kept in engine.dtype; engine.weights=%s cannot hold it", name, kind)
        return None
    return jax.block_until_ready(pack_blocks(blocks.values, blocks.scales, blocks.minima))


def _quantised_blocks(name: str, weight: Weight) -> Blocks | None:
    """Quantises a parameter to blocks of 4 bits, a layer at a time. None: its inputs are no multiple of 32."""
    shape = weight.shape
    if shape[1] % BLOCK:
        return None
    if name in TENSORS:
        layers = [quantise_rows(weight[:, :])]
    else:
        stacks = (weight[(slice(i, i + 1), *[slice(None)] * (len(shape) - 1))] for i in range(shape[0]))
        layers = [quantise_rows(stack.reshape(shape[1], -1).T) for stack in stacks]
    return Blocks(*(np.stack([getattr(layer, field.name) for layer in layers]) for field in dataclasses.fields(Blocks)))


def _place_channels(
    name: str, shape: tuple[int, ...], layout: MeshLayout, read: Callable[[tuple[slice, ...]], Quantised]
) -> Quantised:
    """Puts a parameter with one scale for each output channel on the mesh. The host holds one device's part of it.

    Args:
        name: The parameter's name.
        shape: Its shape.
        layout: The mesh.
        read: Reads a part: a slice for each axis, with a start and a stop.

    Returns:
        The values, split like the parameter itself, and the scales, split like its output channels.
    """
    sharding = layout.param(name, shape)
    values, scales, last, piece = [], [], None, None
    for device, index in device_parts(sharding, shape):
        if piece is None or index != last:
            piece, last = None, index  # this part is freed before the next one is read
            piece = read(index)
        values.append(jax.block_until_ready(jax.device_put(piece.values, device)))
        scales.append(jax.block_until_ready(jax.device_put(piece.scales, device)))
    make, held = jax.make_array_from_single_device_arrays, layout.held(name, shape)
    placed = make(shape, sharding, values)
    if isinstance(held, Format):
        placed = jax.device_put(placed, held)
    return Quantised(placed, make((*shape[:1], *shape[2:]), _of_scales(sharding), scales))


def _stored_part(weight: Channels, index: tuple[slice, ...]) -> Quantised:
    """Reads a part of a parameter as it is stored; see `_quantised_part`."""
    scales = weight.scales[(index[0], slice(0, 1), *index[2:])]
    return Quantised(weight.values[index], scales.squeeze(1))


def _of_scales(sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding of the scales of a parameter with this sharding: that of all of its axes but axis 1."""
    first, _, *rest = sharding.spec
    return NamedSharding(sharding.mesh, PartitionSpec(first, *rest))


def _quantised_part(weight: Weight, kind: str, index: tuple[slice, ...]) -> Quantised:
    """Quantises a part of a parameter. Its scales are those of all inputs, also where the part has only some of them.

    It is read with all inputs, a layer or SLAB weights at a time.

    Args:
        weight: The parameter.
        kind: 'int8' or 'fp8'.
        index: The part: a slice for each axis, with a start and a stop.
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
