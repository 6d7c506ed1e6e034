"""Serves several replicas on a Ray cluster: one OpenAI-compatible HTTP API in front of them.

    python launch/serve_ray.py --config=ray.py
    serve run launch.serve_ray:application config=ray.py engine.num_pages=4096

On SIGTERM or Ctrl-C it stops, after the running requests have finished. A second signal stops it at once.
"""

from __future__ import annotations

import ast
import functools
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # run as a file: the package is beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from icarus_jax import cli
from icarus_jax.errors import UsageError, usage_errors

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.schema import DeploymentStatusOverview

_HEADS = cli.define_heads()
NAME = "icarus-jax"  # of the application


def main(config: ConfigDict) -> None:
    """Starts the replicas and serves until a signal comes."""
    cli.add_heads(config, _HEADS.value or ())
    check(config)
    with usage_errors():
        from icarus_jax.on_ray.cluster import cluster
    from ray import serve

    from icarus_jax.on_ray.application import application as make

    app = make(config)
    ray = config.ray
    engines = max(ray.replicas, ray.max_replicas) + ray.prefill_replicas
    with cluster(ray.address, ray.num_cpus * engines):
        serve.start(http_options={"host": config.server.host, "port": config.server.port})
        try:
            serve.run(app, name=NAME)
        except RuntimeError as error:
            raise UsageError(why_not(serve.status().applications[NAME].deployments, error)) from error
        wait_for_signal()
        serve.delete(NAME)  # waits for the requests in flight
        serve.shutdown()


def check(config: ConfigDict) -> None:
    """Checks a config before anything is started.

    Args:
        config: The config.

    Raises:
        UsageError: It is of another program, or a value makes no sense.
    """
    if "ray" not in config or "routing" not in config:
        raise UsageError("this config is for launch/serve.py; --config=ray.py is for this program")
    cli.access(config.server)
    cli.check_adapters(config)
    cli.engine_config(config.engine)
    for name, head in config.heads.items():
        cli.check_head(name, head, config.trunk.name)


def why_not(deployments: Mapping[str, DeploymentStatusOverview], error: RuntimeError) -> str:
    """Finds out why an application does not start.

    Args:
        deployments: Its deployments; their messages hold the replicas' tracebacks.
        error: What Ray Serve says.

    Returns:
        The UsageError of a replica if there is one, else all that is known.
    """
    from icarus_jax.on_ray.cluster import usage_error_in

    messages = "\n".join(deployment.message for deployment in deployments.values())
    return usage_error_in(messages) or f"{error} {messages}"


def wait_for_signal() -> None:
    """Returns after SIGTERM or SIGINT. A second one then ends the process at once."""
    stop = threading.Event()

    def take(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, take)
    stop.wait()


def application(args: Mapping[str, str]) -> Application:
    """Makes the application for `serve run` and for Serve's config files, where Ray Serve has a proxy of its own.

    Args:
        args: 'config': FILE or FILE:ARG, as for --config; and values in it, such as 'engine.num_pages': 4096.

    Raises:
        UsageError: A value makes no sense, or others could use the server without a key. Where the proxy listens is not
            known here, so that without keys 'server.host': '127.0.0.1' has to say that it is on this machine.
    """
    from icarus_jax.on_ray.application import application as make

    config = cli.load_config(args.get("config", "ray.py"))
    if "server.host" not in args:
        config.server.host = "0.0.0.0"
    for key, value in args.items():
        if key != "config":
            set_value(config, key, value)
    check(config)
    return make(config)


def set_value(config: ConfigDict, key: str, value: object) -> None:
    """Sets a value of a config.

    Args:
        config: The config.
        key: Its name with dots, such as 'engine.num_pages'.
        value: The value, or its text.

    Raises:
        UsageError: There is no such key, or the value is of another type.
    """
    section, _, name = key.rpartition(".")
    try:
        node = functools.reduce(getattr, section.split(".") if section else (), config)
        known = name in node
    except (AttributeError, TypeError):
        known = False
    if not known:
        raise UsageError(f"{key}: no such key in the config")
    with usage_errors(key):
        node[name] = value if isinstance(node[name], str) else _literal(value)


def _literal(value: object) -> object:
    """Returns a number or a truth value for a text that `serve run` has taken from the command line."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


def run() -> None:
    """Reads the flags and runs the program; also the console script icarus-serve-ray."""
    cli.run(main, default_config="ray.py")


if __name__ == "__main__":
    run()
