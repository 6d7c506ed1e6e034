"""What the programs in launch/ share: configs, flags, and errors of one line. Loads no JAX."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from icarus_jax.cli import platforms
from icarus_jax.cli.paths import CONFIGS, HOME
from icarus_jax.errors import RequestError, UsageError, usage_errors

FLAGS = flags.FLAGS
HELP_FLAGS = ("--help", "-help", "-h", "--helpshort")

flags.disclaim_key_flags()  # --heads belongs to the program that defines it, and to its --help


def run(main: Callable[[ConfigDict], None], default_config: str) -> None:
    """Runs a program: reads the flags, then calls `main(config)`.

    --config=FILE[:ARG] picks the config (else `default_config`), --config.KEY=VALUE overrides a value in it. A
    UsageError or RequestError, from `main` too, becomes one line on stderr and exit code 2.
    """
    platforms.leave_libtpu_alone()
    try:
        app.run(main, flags_parser=lambda argv: _parse_flags(argv, main.__module__, default_config))
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


def load_config(spec: str) -> ConfigDict:
    """Loads 'FILE[:ARG]' by calling FILE's get_config, with ARG if there is one. Raises UsageError.

    A bare file name is looked for in configs/ before the working directory; any other relative path in the working
    directory before paths.HOME.
    """
    match = re.fullmatch(r"(.+?\.py)(?::(.*))?", spec)
    name, arg = match.groups() if match else (spec.partition(":")[0], None)
    path = Path(name).expanduser()
    places = (CONFIGS / path, path) if path.name == name else (path, HOME / path)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = sorted(file.name for file in CONFIGS.glob("*.py"))
        raise UsageError(f"--config={spec}: no such file{hint(path.name, known)}; configs/ has {', '.join(known)}")
    module_spec = importlib.util.spec_from_file_location(f"config_{found.stem}", found.absolute())
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"--config={spec}: {found} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError(f"--config={spec}: {found} defines no get_config()")
    with usage_errors(f"--config={spec}"):
        return module.get_config() if arg is None else module.get_config(arg)


def _parse_flags(argv: list[str], program: str, default_config: str) -> ConfigDict:
    """Reads the flags and returns the config, overrides applied. program: the name of the module that runs."""
    spec, argv = _take_config(argv, default_config)
    if any(arg in HELP_FLAGS for arg in argv):
        print(_help(program, default_config))
        sys.exit(0)
    config = load_config(spec)
    _check_overrides(config, argv)
    # The whole-file flag of config_flags knows the working directory only, so the file is read here.
    config_flags.DEFINE_config_dict("config", config, sys_argv=argv)
    try:
        # Warnings and above, unless the user says otherwise: at absl's own default Orbax tells of its every step.
        rest = FLAGS([argv[0], "--verbosity=-1", *argv[1:]])[1:]
    except flags.UnrecognizedFlagError as error:
        own = ", ".join(f"--{flag.name}" for flag in FLAGS.get_key_flags_for_module(_flag_module(program)))
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
                raise UsageError(f"--config.{match[1]}: no such key {key!r}{hint(key, known)}; {valid}")
            node, walked = node[key], f"{walked}.{key}"


def _flag_module(program: str) -> str:
    """The name that absl files a module's flags under."""
    return sys.argv[0] if program == "__main__" else program


def _help(program: str, default_config: str) -> str:
    text = sys.modules[program].__doc__ or ""
    known = ", ".join(sorted(file.name for file in CONFIGS.glob("*.py")))
    keys = ", ".join(_flat_keys(load_config(default_config)))
    return (
        f"{text.strip()}\n\nflags:\n"
        f"  --config=FILE[:ARG]: the config ({default_config}); in configs/: {known}\n"
        f"  --config.KEY=VALUE: override a value; keys: {keys}\n"
        + FLAGS.module_help(_flag_module(program)).strip().partition("\n")[2].replace("\n\n", "\n")
    )


def _flat_keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def hint(word: str, known: Iterable[str]) -> str:
    """ "; did you mean WORD?" for a misspelt word, or nothing if none of the known ones is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
