"""The mesh of training: how the trunk's weights and the rows of a batch lie on the devices."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from icarus_jax.models.sharding import MeshLayout, Rules

# How logical axes (models/sharding.py) are split on training's mesh, whose axes are 'data' and 'model': `model` splits
# the trunk's weights, `data` the rows of a batch.
RULES = Rules(
    rows=("data",),
    vocab=("model",),
    mlp=("model",),
    experts=("model",),
    kv_heads=("model",),
    query_lanes=("model",),
    attended_lanes=("model",),
    qkv_inputs=(),
    kv_tokens=(),
)


def make_mesh(model: int = 1) -> Mesh:
    """Makes the mesh of training, over all devices.

    Args:
        model: The number of devices that split the trunk's weights. The rest split the rows of a batch.

    Returns:
        A mesh with the axes 'data' and 'model'.

    Raises:
        ValueError: `model` does not divide the number of devices.
    """
    if model < 1 or jax.device_count() % model:
        raise ValueError(f"config.mesh.model={model} does not divide the {jax.device_count()} devices")
    return jax.make_mesh(
        (jax.device_count() // model, model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto)
    )


def place_params(params: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a trunk's weights on training's mesh, split as PARAM_AXES and RULES say.

    Args:
        params: The canonical parameters by name.
        mesh: A mesh with the axes 'data' and 'model'.

    Returns:
        The parameters on the devices. An axis that `model` does not divide is not split.
    """
    layout = MeshLayout(mesh, RULES)
    return {name: jax.device_put(values, layout.param(name, values.shape)) for name, values in params.items()}


def batch_sharding(mesh: Mesh, *, stacked: bool) -> NamedSharding:
    """Returns the sharding that splits the rows of a batch over the mesh's axis 'data'.

    Args:
        mesh: Training's mesh.
        stacked: Whether the arrays are [accumulate, B, ..]. Otherwise they are [B, ..].

    Returns:
        The sharding of every array of the batch.
    """
    return NamedSharding(mesh, PartitionSpec(None, RULES.rows) if stacked else PartitionSpec(RULES.rows))
