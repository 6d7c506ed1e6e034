"""Makes the parts of an engine: the runner, with the weights on the mesh and room for adapters, and the page store."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from icarus_jax import __version__
from icarus_jax.config import EngineConfig, HeadConfig, ModelConfig
from icarus_jax.engine.kv_scales import calibrate, needs_scales
from icarus_jax.engine.runner import Runner
from icarus_jax.models.full_heads import FullHead, PairedTrunk, make_trunk
from icarus_jax.models.head_bank import Factors, make_bank
from icarus_jax.models.sharding import Weight, make_mesh_layout
from icarus_jax.models.trunk import place_weights
from icarus_jax.page_store.host_cache import HostCache
from icarus_jax.page_store.page_folder import PageFolder
from icarus_jax.page_store.store import PageStore


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


def make_store(config: EngineConfig, model: ModelConfig, runner: Runner, trunk: str) -> PageStore | None:
    """Makes the page store of an engine; None if its config names none.

    Args:
        config: The engine's sizes.
        model: The trunk's sizes and options, as its files say.
        runner: The engine's runner.
        trunk: The identity of the trunk's weights (TrunkCheckpoint.identity).

    Raises:
        ValueError: The config makes no sense, or nothing can be written to the store.
    """
    if not (config.page_store or config.host_cache_bytes):
        return None
    if jax.process_count() > 1:
        raise ValueError(
            "engine.page_store and engine.host_cache_bytes need an engine of a single process: each of several has "
            "only a part of a page; leave them out"
        )
    if not config.enable_prefix_caching:
        raise ValueError("engine.page_store and engine.host_cache_bytes need engine.enable_prefix_caching")
    if config.page_store and not trunk:
        raise ValueError("engine.page_store needs the identity of the trunk: pass it to Engine.create")
    identity = _identity(config, model, runner, trunk)
    pages = runner.kv_pages
    folder = PageFolder(config.page_store, identity, config.page_store_bytes) if config.page_store else None
    return PageStore(identity, pages.nbytes // pages.shape[1], HostCache(config.host_cache_bytes), folder)


def _identity(config: EngineConfig, model: ModelConfig, runner: Runner, trunk: str) -> bytes:
    """Returns a digest of all that K/V depends on beside tokens."""
    scaling = model.rope_scaling
    lengthens = scaling is not None and scaling.kind in ("dynamic", "longrope")  # by the length of the longest sequence
    known = (
        *(__version__, trunk, model, runner.kv_pages.dtype.name, config.page_size, config.dtype, config.weights),
        config.max_model_len if lengthens else None,
    )
    digest = hashlib.blake2b(repr(known).encode(), digest_size=16)
    scales = runner.weights[0].get("kv_scales")
    if scales is not None:
        digest.update(np.asarray(scales.get_value()).tobytes())
    return digest.digest()
