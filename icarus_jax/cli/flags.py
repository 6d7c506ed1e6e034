"""Configs, flags and one-line errors of the programs in launch/. Does not import JAX."""

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

flags.disclaim_key_flags()  # so that --heads is listed in the --help of the programs that define it


def run(main: Callable[[ConfigDict], None], default_config: str) -> None:
    """Runs a program: reads the flags, then calls `main(config)`.

    --config=FILE[:ARG] chooses the config, and --config.KEY=VALUE overrides a value in it. A UsageError or RequestError
    is printed as one line on stderr, and the exit code is then 2.

    Args:
        main: The program.
        default_config: The config if the flags do not name one, as FILE or FILE:ARG.
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
    """Defines the flag --heads. Its value is for `add_heads`."""
    text = (
        "NAME=PATH[:KV],...: PATH: a folder, hf://.., gs://.. or random:SEED; KV: shared (default), activated, isolated"
    )
    return flags.DEFINE_list("heads", None, text, allow_override=True)  # one process may import several programs


def add_heads(config: ConfigDict, items: Iterable[str]) -> None:
    """Adds heads to `config.heads`. A head of the same name is replaced.

    Args:
        config: The config.
        items: The heads, each as 'NAME=PATH' or 'NAME=PATH:KV'. A relative PATH is relative to the working directory;
            what lies in a store ('hf://..', 'gs://..') stays as it is.

    Raises:
        UsageError: An item has another form.
    """
    for item in items:
        match = re.fullmatch(r"([\w-]+)=(.+?)(?::(shared|activated|isolated))?", item)
        if not match:
            raise UsageError(
                f"--heads={item}: not of the form NAME=PATH or NAME=PATH:isolated (NAME: letters, digits, - and _)"
            )
        name, path, kv = match.groups()
        if not path.startswith("random:") and "://" not in path:
            path = str(Path(path).expanduser().absolute())
        with config.unlocked():
            config.heads[name] = ConfigDict({"path": path, "kv": kv or "shared"})


def load_config(spec: str) -> ConfigDict:
    """Loads a config by calling its file's `get_config`.

    Args:
        spec: 'FILE' or 'FILE:ARG'; ARG is passed to `get_config`. A file name without a folder is looked up in
            configs/, then in the working directory. Any other relative path is looked up in the working directory, then
            in paths.HOME.

    Raises:
        UsageError: There is no such file, it defines no config, or it refuses the argument.
    """
    match = re.fullmatch(r"(.+?\.py)(?::(.*))?", spec)
    name, arg = match.groups() if match else (spec.partition(":")[0], None)
    path = Path(name).expanduser()
    places = (CONFIGS / path, path) if path.name == name else (path, HOME / path)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = sorted(file.name for file in CONFIGS.glob("[a-z]*.py"))
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
    """Reads the flags and returns the config with its overrides. `program` is the name of the module that runs."""
    spec, argv = _take_config(argv, default_config)
    if any(arg in HELP_FLAGS for arg in argv):
        print(_help(program, default_config))
        sys.exit(0)
    config = load_config(spec)
    _check_overrides(config, argv)
    # DEFINE_config_file would look for the file in the working directory only.
    config_flags.DEFINE_config_dict("config", config, sys_argv=argv)
    try:
        # By default only warnings and errors are logged. With absl's own default, Orbax logs each of its steps.
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
    """Takes --config=SPEC or --config SPEC out of argv. Of several, the last one counts."""
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
    """Returns the name under which absl lists a module's flags."""
    return sys.argv[0] if program == "__main__" else program


def _help(program: str, default_config: str) -> str:
    """Returns the text of --help."""
    text = sys.modules[program].__doc__ or ""
    known = ", ".join(sorted(file.name for file in CONFIGS.glob("[a-z]*.py")))
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
    """Returns "; did you mean WORD?" for a misspelt word, or "" if no known word is similar.

    Args:
        word: The misspelt word.
        known: The words that it could be.
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""
