"""Builds an engine, its tokenizer and its heads from a config.

JAX and the engine are imported inside the functions only, so that a misspelt flag is reported at once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from typing import TYPE_CHECKING

from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax.cli.flags import hint
from icarus_jax.cli.paths import home_path
from icarus_jax.config import AS_STORED, KV_KINDS, EngineConfig, HeadConfig, ModelConfig
from icarus_jax.errors import UsageError, usage_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from icarus_jax.engine.engine import Engine
    from icarus_jax.server.head_loader import HeadLoader

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class App:
    """What a config describes, loaded. The engine is not started yet.

    Attributes:
        engine: The engine, with its heads.
        tokenizer: The trunk's tokenizer.
        eos_ids: The token ids that end the trunk's answers.
        loader: Loads and unloads heads while the engine runs.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    loader: HeadLoader

    def start(self) -> None:
        """Compiles programs as config.engine.warmup says, and starts the engine. On a terminal a progress bar is shown.

        In a run of several processes this returns only in process 0. The other processes run what process 0 tells them
        to, and exit when it ends.
        """
        from icarus_jax.engine.multihost import Worker

        if isinstance(self.engine.runner, Worker):
            self.engine.runner.work()
            self.engine.shutdown(drain=False)
            sys.exit(0)
        bar = functools.partial(tqdm, desc="compiling", unit="program", file=sys.stderr, disable=None, leave=False)
        self.engine.start(bar)


def served_names(config: ConfigDict) -> list[str]:
    """Returns the names of the models that `build(config)` would serve, the trunk first."""
    return [config.trunk.name, *config.heads]


def build(config: ConfigDict) -> App:
    """Loads the trunk, its tokenizer and the heads, and makes an engine.

    Args:
        config: A config as `defaults.serving_config` makes it. A relative path of a head is relative to paths.HOME; a
            relative path in config.server is relative to the working directory.

    Raises:
        UsageError: A source cannot be read, a head does not fit, or a value makes no sense.
    """
    engine = engine_config(config.engine)
    for name, head in config.heads.items():
        check_head(name, head, config.trunk.name)
    if not config.heads:
        log.warning(
            "no heads: heads/ is empty or not in this config, and --heads names none; the trunk is served alone"
        )

    from icarus_jax.engine import multihost
    from icarus_jax.engine.engine import Engine
    from icarus_jax.models import full_heads
    from icarus_jax.server.head_loader import HeadLoader
    from icarus_jax.weights import as_stored, checkpoint, peft, tokenizer
    from icarus_jax.weights.adapter_cache import AdapterCache

    enable_compilation_cache()  # before the first program: joining other hosts runs one
    with usage_errors("config.distributed"):
        multihost.initialize(**config.distributed)
    with usage_errors():
        if config.trunk.adapter and engine.weights == AS_STORED:
            raise ValueError("a trunk with an adapter in it is not as it is stored: set engine.weights=int8, or ''")
        stored = "float32" if engine.weights else engine.dtype  # quantised from the numbers as they are stored
        trunk = checkpoint.open_trunk(config.trunk.source, stored, config.trunk.adapter)
        if engine.weights == AS_STORED and not any(map(as_stored.stored_form, trunk.params.values())):
            raise ValueError(
                f"engine.weights={AS_STORED!r}: {trunk.path} has no weights in fewer bits that can be kept so "
                "(docs/quantisation.md lists the formats); engine.weights='int8' is for all checkpoints"
            )
        text = tokenizer.load_tokenizer(trunk.path)
    heads: dict = {}
    cache = AdapterCache(config.server.adapter_cache_bytes)
    for name, head in config.heads.items():
        with usage_errors(f"head {name!r}"):
            path = home_path(head.path)
            if full_heads.is_full_head(path):
                own = full_heads.load_full_head(path, head.kv, trunk, stored)
                heads[name] = HeadConfig(name, path, head.kv), own
            else:
                identity = trunk.identity
                heads[name] = peft.read_head(name, path, head.kv, trunk.config, trunk_identity=identity, cache=cache)
    if engine.weights and heads:
        log.warning(
            "engine.weights=%s: the heads (%s) were trained on weights of another precision, and may answer somewhat "
            "worse than with their own; launch/evaluate.py measures by how much",
            engine.weights,
            ", ".join(heads),
        )
    check_context(engine, trunk.config)
    eos_ids = frozenset(tokenizer.eos_token_ids(text, trunk.path))
    with usage_errors():
        made = Engine.create(engine, trunk.config, trunk.params, heads, eos_ids, config.trunk.name, trunk.identity)
    sources = {config.trunk.name: config.trunk.source} | {name: head.path for name, (head, _) in heads.items()}
    folders = [folder for folder in config.server.head_folders.split(",") if folder]
    with usage_errors("config.server.head_folders"):
        loader = HeadLoader(made, config.trunk.name, trunk.identity, sources, folders, cache)
    return App(made, text, eos_ids, loader)


def enable_compilation_cache() -> None:
    """Lets JAX keep compiled programs on disk, so that later starts are faster."""
    import jax

    from icarus_jax.weights import sources

    jax.config.update("jax_compilation_cache_dir", str(sources.cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def engine_config(section: ConfigDict) -> EngineConfig:
    """Makes the EngineConfig of a config.

    Args:
        section: config.engine.

    Raises:
        UsageError: A key does not exist, or a value makes no sense.
    """
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    for key in section:
        if key not in known:
            raise UsageError(f"config.engine.{key}: no such key{hint(key, known)}; the keys are {', '.join(known)}")
    with usage_errors("config.engine"):
        return EngineConfig(**section)


def check_context(engine: EngineConfig, model: ModelConfig) -> None:
    """Checks that the trunk was made for sequences as long as the engine's longest: beyond, its answers are noise.

    Args:
        engine: The engine's sizes.
        model: The trunk's.

    Raises:
        UsageError: The engine's are longer.
    """
    most = model.context_length
    if engine.max_model_len > most:
        raise UsageError(
            f"config.engine.max_model_len is {engine.max_model_len}, and the trunk was made for at most {most} tokens "
            f"(max_position_embeddings): set --config.engine.max_model_len={most} or less"
        )


def check_head(name: str, head: ConfigDict, trunk_name: str) -> None:
    """Checks one of config.heads.

    Args:
        name: The head's name.
        head: Its path and kv.
        trunk_name: The trunk's name as a model.

    Raises:
        UsageError: The name is the trunk's, or kv makes no sense.
    """
    if name == trunk_name:
        raise UsageError(f"head {name!r} has the trunk's name; give one of them another")
    if head.kv not in KV_KINDS[1:]:
        raise UsageError(f"config.heads: head {name!r}: kv={head.kv!r}; it is one of {', '.join(KV_KINDS[1:])}")
