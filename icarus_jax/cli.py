"""What the programs in launch/ share: configs and flags, one-line errors, and a config made into an App.

JAX and the engine are imported inside `build` alone, so that a misspelt flag is answered at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from icarus_jax import platforms
from icarus_jax.config import KV_KINDS, EngineConfig, HeadConfig
from icarus_jax.sequence import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from icarus_jax.engine import Engine
    from icarus_jax.head_loader import HeadLoader

log = logging.getLogger(__name__)
FLAGS = flags.FLAGS
REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "configs"
HELP_FLAGS = ("--help", "-help", "-h", "--helpshort")

flags.disclaim_key_flags()  # --heads belongs to the program that defines it, and to its --help


class UsageError(Exception):
    """What the user asked for cannot be done; `run` prints it as one line and exits with 2."""


@contextlib.contextmanager
def usage_errors(what: str = "") -> Iterator[None]:
    """Turns the ValueError or OSError of a user's input into a UsageError, which says first what it is about."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(f"{what}: {error}" if what else error) from error


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
        from icarus_jax.distributed import Follower

        if isinstance(self.engine.runner, Follower):
            self.engine.runner.follow()
            sys.exit(0)
        bar = functools.partial(tqdm, desc="compiling", unit="program", file=sys.stderr, disable=None, leave=False)
        self.engine.start(bar)


def run(main: Callable[[ConfigDict], None], default_config: str) -> None:
    """Runs a program: reads the flags, then calls `main(config)`.

    --config=FILE[:ARG] picks the config (else `default_config`), --config.KEY=VALUE overrides a value in it. A
    UsageError or RequestError, from `main` too, becomes one line on stderr and exit code 2.
    """
    platforms.leave_libtpu_alone()
    try:
        app.run(main, flags_parser=lambda argv: _parse_flags(argv, default_config))
    except (UsageError, RequestError) as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports SIGINT


def define_heads() -> flags.FlagHolder[list[str] | None]:
    """Defines --heads; its value goes to `add_heads`."""
    text = "NAME=PATH[:KV],...: PATH: a PEFT folder, or random:SEED; KV: shared (default), activated or isolated"
    return flags.DEFINE_list("heads", None, text)


def add_heads(config: ConfigDict, items: Iterable[str]) -> None:
    """Puts heads, each 'NAME=PATH[:KV]', into `config.heads`; one of the same name is replaced.

    A relative PATH is the user's: it counts from the working directory. Raises UsageError.
    """
    for item in items:
        match = re.fullmatch(r"([\w-]+)=(.+?)(?::(shared|activated|isolated))?", item)
        if not match:
            raise UsageError(
                f"--heads={item}: not of the form NAME=PATH or NAME=PATH:isolated (NAME: letters, digits, - and _)"
            )
        name, path, kv = match.groups()
        if not path.startswith("random:"):
            path = str(Path(path).expanduser().absolute())
        with config.unlocked():
            config.heads[name] = ConfigDict({"path": path, "kv": kv or "shared"})


def served_names(config: ConfigDict) -> list[str]:
    """The names of the models that `build(config)` serves, the trunk first."""
    return [config.trunk.name, *config.heads]


def load_config(spec: str) -> ConfigDict:
    """Loads 'FILE[:ARG]' by calling FILE's get_config, with ARG if there is one. Raises UsageError.

    A bare file name is looked for in configs/ before the working directory; any other relative path in the working
    directory before the repository.
    """
    match = re.fullmatch(r"(.+?\.py)(?::(.*))?", spec)
    name, arg = match.groups() if match else (spec.partition(":")[0], None)
    path = Path(name).expanduser()
    places = (CONFIGS / path, path) if path.name == name else (path, REPOSITORY / path)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = sorted(file.name for file in CONFIGS.glob("*.py"))
        raise UsageError(f"--config={spec}: no such file{_hint(path.name, known)}; configs/ has {', '.join(known)}")
    module_spec = importlib.util.spec_from_file_location(f"config_{found.stem}", found.absolute())
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"--config={spec}: {found} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError(f"--config={spec}: {found} defines no get_config()")
    with usage_errors(f"--config={spec}"):
        return module.get_config() if arg is None else module.get_config(arg)


def build(config: ConfigDict) -> App:
    """Loads the trunk, its tokenizer and the heads, and puts an engine on them.

    A relative path of a head counts from the repository. Raises UsageError.
    """
    engine = engine_config(config.engine)
    for name, head in config.heads.items():
        check_head(name, head, config.trunk.name)
    if not config.heads:
        log.warning(
            "no heads: heads/ is empty or not in this config, and --heads names none; the trunk is served alone"
        )

    from icarus_jax import adapters, checkpoint, distributed, full_heads, tokenizer
    from icarus_jax.engine import Engine
    from icarus_jax.head_loader import HeadLoader

    with usage_errors("config.distributed"):
        distributed.initialize(**config.distributed)
    enable_compilation_cache()
    with usage_errors():
        trunk = checkpoint.open_trunk(config.trunk.source, engine.dtype)
        text = tokenizer.load_tokenizer(trunk.path)
    heads: dict = {}
    for name, head in config.heads.items():
        with usage_errors(f"head {name!r}"):
            path = head_path(head.path)
            if full_heads.is_full_head(path):
                own = full_heads.load_full_head(path, head.kv, trunk, engine.dtype)
                heads[name] = HeadConfig(name, path, head.kv), own
            else:
                heads[name] = adapters.read_head(name, path, head.kv, trunk.config, trunk_identity=trunk.identity)
    eos_ids = frozenset(tokenizer.eos_token_ids(text, trunk.path))
    with usage_errors():
        made = Engine.create(engine, trunk.config, trunk.params, heads, eos_ids, config.trunk.name)
    sources = {config.trunk.name: config.trunk.source} | {name: head.path for name, (head, _) in heads.items()}
    folders = [REPOSITORY / folder for folder in config.server.head_folders.split(",") if folder]
    return App(made, text, eos_ids, HeadLoader(made, config.trunk.name, trunk.identity, sources, folders))


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start is quick."""
    import jax

    from icarus_jax import sources

    jax.config.update("jax_compilation_cache_dir", str(sources.cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _parse_flags(argv: list[str], default_config: str) -> ConfigDict:
    """Reads the flags and returns the config, overrides applied."""
    spec, argv = _take_config(argv, default_config)
    if any(arg in HELP_FLAGS for arg in argv):
        print(_help(default_config))
        sys.exit(0)
    config = load_config(spec)
    _check_overrides(config, argv)
    # The whole-file flag of config_flags knows the working directory only, so the file is read here.
    config_flags.DEFINE_config_dict("config", config, sys_argv=argv)
    try:
        # Warnings and above, unless the user says otherwise: at absl's own default Orbax tells of its every step.
        rest = FLAGS([argv[0], "--verbosity=-1", *argv[1:]])[1:]
    except flags.UnrecognizedFlagError as error:
        own = ", ".join(f"--{flag.name}" for flag in FLAGS.get_key_flags_for_module(sys.argv[0]))
        raise UsageError(f"{error}; the flags are --config, {own}") from error
    except flags.Error as error:
        raise UsageError(error) from error
    if rest:
        raise UsageError(
            f"unexpected argument {rest[0]!r}; flags look like --NAME=VALUE, a config like --config={spec}"
        )
    logging.getLogger("icarus_jax").setLevel(logging.INFO)
    return FLAGS.config


def _take_config(argv: list[str], default: str) -> tuple[str, list[str]]:
    """Takes --config=SPEC or --config SPEC out of argv; the last one counts."""
    spec, rest, args = default, [], iter(argv)
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in ("--config", "-config"):
            spec = value if equals else next(args, "")
        else:
            rest.append(arg)
    return spec, rest


def _check_overrides(config: ConfigDict, argv: Iterable[str]) -> None:
    """Raises UsageError for a --config.KEY that the config does not have."""
    for arg in argv:
        match = re.match(r"--?(?:no)?config\.([^=]*)", arg)
        node, walked = config, "config"
        if not match:
            continue
        for key in match[1].split("."):
            known = sorted(node) if isinstance(node, ConfigDict) else []
            if key not in known:
                valid = f"the keys of {walked} are {', '.join(known)}" if known else f"{walked} has no keys"
                raise UsageError(f"--config.{match[1]}: no such key {key!r}{_hint(key, known)}; {valid}")
            node, walked = node[key], f"{walked}.{key}"


def engine_config(section: ConfigDict) -> EngineConfig:
    """config.engine, checked. Raises UsageError."""
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    for key in section:
        if key not in known:
            raise UsageError(f"config.engine.{key}: no such key{_hint(key, known)}; the keys are {', '.join(known)}")
    with usage_errors("config.engine"):
        return EngineConfig(**section)


def check_head(name: str, head: ConfigDict, trunk_name: str) -> None:
    """Raises UsageError if one of config.heads makes no sense."""
    if name == trunk_name:
        raise UsageError(f"head {name!r} has the trunk's name; give one of them another")
    if head.kv not in KV_KINDS[1:]:
        raise UsageError(f"config.heads: head {name!r}: kv={head.kv!r}; it is one of {', '.join(KV_KINDS[1:])}")


def head_path(path: str) -> str:
    """A head's path in a config, as the other programs take it."""
    return path if path.startswith("random:") else str(REPOSITORY / path)


def _help(default_config: str) -> str:
    program = sys.modules["__main__"].__doc__ or ""
    known = ", ".join(sorted(file.name for file in CONFIGS.glob("*.py")))
    keys = ", ".join(_flat_keys(load_config(default_config)))
    return (
        f"{program.strip()}\n\nflags:\n"
        f"  --config=FILE[:ARG]: the config ({default_config}); in configs/: {known}\n"
        f"  --config.KEY=VALUE: override a value; keys: {keys}\n"
        + FLAGS.main_module_help().strip().partition("\n")[2].replace("\n\n", "\n")
    )


def _flat_keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
