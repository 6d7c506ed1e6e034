"""Makes the runner of an engine: the weights on the mesh, and room for adapters beside them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from flax import nnx

from icarus_jax.config import EngineConfig, HeadConfig, ModelConfig
from icarus_jax.engine.kv_scales import calibrate, needs_scales
from icarus_jax.engine.runner import Runner
from icarus_jax.models.full_heads import FullHead, PairedTrunk, make_trunk
from icarus_jax.models.head_bank import Factors, make_bank
from icarus_jax.models.sharding import Weight, make_mesh_layout
from icarus_jax.models.trunk import place_weights


def make_runner(
    config: EngineConfig,
    model_config: ModelConfig,
    params: Mapping[str, Weight],
    heads: Sequence[tuple[HeadConfig, Factors | FullHead]],
) -> tuple[Runner, list[tuple[HeadConfig, Factors]]]:
    """Puts the trunk's weights on the mesh, and makes room for the heads' adapters beside them.

    Args:
        config: The engine's sizes.
        model_config: The trunk's sizes and options.
        params: The trunk's canonical parameters (weights/checkpoint.py).
        heads: The heads that the engine starts with.

    Returns:
        The runner, and the heads whose adapters are still to be loaded. A fully fine-tuned head is loaded already and
        comes with an empty adapter.

    Raises:
        ValueError: The mesh does not fit the devices, or a fully fine-tuned head is not the only head.
    """
    layout = make_mesh_layout(config, model_config.num_kv_heads)
    place = functools.partial(place_weights, layout=layout, config=config)
    trunk, adapters = make_trunk(model_config.serving(config.max_model_len), params, heads, place)
    if needs_scales(config):
        trunk.kv_scales = nnx.Param(calibrate(trunk, config, layout))
    adapt_writers = config.writer_adapters or any(head.kv != "shared" for head, _ in adapters)
    ranks = [a.shape[-1] for _, factors in adapters for a, _ in factors.values()]
    num_heads = 0 if isinstance(trunk, PairedTrunk) else len(adapters)
    bank = make_bank(model_config, config, num_heads, ranks, adapt_writers)
    if bank is not None:
        bank = layout.place_bank(bank)
    return Runner(trunk, bank, config, adapt_writers, layout), adapters
