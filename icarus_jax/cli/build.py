"""The composition root: a config made into an engine with its tokenizer and heads.

JAX and the engine are imported inside the functions alone, so that a misspelt flag is answered at once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax.cli.flags import hint
from icarus_jax.cli.paths import home_path
from icarus_jax.config import KV_KINDS, EngineConfig, HeadConfig
from icarus_jax.errors import UsageError, usage_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from icarus_jax.engine.engine import Engine
    from icarus_jax.server.head_loader import HeadLoader

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class App:
    """A config, built: the engine is not started yet."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    loader: HeadLoader

    def start(self) -> None:
        """Compiles the engine's programs, with a progress bar on a terminal, and lets it run.

        In a run of several processes only process 0 returns: the others work for it until it ends, then exit.
        """
        from icarus_jax.engine.multihost import Worker

        if isinstance(self.engine.runner, Worker):
            self.engine.runner.work()
            sys.exit(0)
        bar = functools.partial(tqdm, desc="compiling", unit="program", file=sys.stderr, disable=None, leave=False)
        self.engine.start(bar)


def served_names(config: ConfigDict) -> list[str]:
    """The names of the models that `build(config)` serves, the trunk first."""
    return [config.trunk.name, *config.heads]


def build(config: ConfigDict) -> App:
    """Loads the trunk, its tokenizer and the heads, and puts an engine on them.

    A relative path of a head counts from paths.HOME, one of config.server from the working directory. Raises
    UsageError.
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
    from icarus_jax.weights import checkpoint, peft, tokenizer

    with usage_errors("config.distributed"):
        multihost.initialize(**config.distributed)
    enable_compilation_cache()
    with usage_errors():
        trunk = checkpoint.open_trunk(config.trunk.source, engine.dtype)
        text = tokenizer.load_tokenizer(trunk.path)
    heads: dict = {}
    for name, head in config.heads.items():
        with usage_errors(f"head {name!r}"):
            path = home_path(head.path)
            if full_heads.is_full_head(path):
                own = full_heads.load_full_head(path, head.kv, trunk, engine.dtype)
                heads[name] = HeadConfig(name, path, head.kv), own
            else:
                heads[name] = peft.read_head(name, path, head.kv, trunk.config, trunk_identity=trunk.identity)
    eos_ids = frozenset(tokenizer.eos_token_ids(text, trunk.path))
    with usage_errors():
        made = Engine.create(engine, trunk.config, trunk.params, heads, eos_ids, config.trunk.name)
    sources = {config.trunk.name: config.trunk.source} | {name: head.path for name, (head, _) in heads.items()}
    folders = [Path(folder).expanduser() for folder in config.server.head_folders.split(",") if folder]
    return App(made, text, eos_ids, HeadLoader(made, config.trunk.name, trunk.identity, sources, folders))


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start is quick."""
    import jax

    from icarus_jax.weights import sources

    jax.config.update("jax_compilation_cache_dir", str(sources.cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def engine_config(section: ConfigDict) -> EngineConfig:
    """config.engine, checked. Raises UsageError."""
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    for key in section:
        if key not in known:
            raise UsageError(f"config.engine.{key}: no such key{hint(key, known)}; the keys are {', '.join(known)}")
    with usage_errors("config.engine"):
        return EngineConfig(**section)


def check_head(name: str, head: ConfigDict, trunk_name: str) -> None:
    """Raises UsageError if one of config.heads makes no sense."""
    if name == trunk_name:
        raise UsageError(f"head {name!r} has the trunk's name; give one of them another")
    if head.kv not in KV_KINDS[1:]:
        raise UsageError(f"config.heads: head {name!r}: kv={head.kv!r}; it is one of {', '.join(KV_KINDS[1:])}")
