"""Serves the trunk and its heads over the OpenAI-compatible HTTP API.

    python launch/serve.py --config=multi.py

On SIGTERM or Ctrl-C it stops, after the running requests have finished. A second signal stops it at once.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # run as a file: the package is beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from icarus_jax import cli
from icarus_jax.errors import UsageError, usage_errors

if TYPE_CHECKING:
    from icarus_jax.evaluation.batch_worker import BatchWorker
    from icarus_jax.server.auth import Keys
    from icarus_jax.server.head_loader import HeadLoader
    from icarus_jax.server.head_resolver import HeadResolver
    from icarus_jax.server.limits import Limits

_HEADS = cli.define_heads()


def main(config: ConfigDict) -> None:
    """Builds the engine and serves until a signal comes."""
    cli.add_heads(config, _HEADS.value or ())
    keys, limits = access(config.server)
    check_adapters(config)
    app = cli.build(config)
    from icarus_jax.evaluation.batch_routes import BatchRoutes
    from icarus_jax.server import access_log
    from icarus_jax.server import app as server
    from icarus_jax.server.auth import host_names

    if config.server.access_log:
        access_log.write_to_stdout()
    origins = [origin for origin in config.server.cors_origins.split(",") if origin]
    parser = config.server.tool_call_parser
    hosts = host_names(config.server.allowed_hosts, keys, config.server.allow_remote_without_keys)
    watcher = watching(app.loader, config.server.watch_heads)
    worker = batches(config.server.batch_folder, app.engine.config.max_num_seqs)
    resolver = resolving(app.loader, config.server)
    app.start()
    api = server.create_app(
        app.engine,
        app.tokenizer,
        app.eos_ids,
        app.loader,
        keys,
        limits,
        origins,
        hosts,
        parser,
        resolver,
        extra=[BatchRoutes(worker)],
        lifespan=worker.lifespan if worker else None,
    )
    with watcher:
        server.run(api, app.engine, config.server.host, config.server.port, config.server.drain_seconds)


def access(section: ConfigDict) -> tuple[Keys, Limits]:
    """Reads who may use the server, and how much of it.

    Args:
        section: config.server.

    Raises:
        UsageError: a value makes no sense, or other machines could use the server without a key.
    """
    from icarus_jax.server.auth import Keys, check_host
    from icarus_jax.server.limits import Limits
    from icarus_jax.server.tool_formats import choose_format

    keys = Keys.read(section.api_keys_file, section.admin_keys_file, section.key_weights)
    check_host(section.host, keys, section.allow_remote_without_keys)
    for name in ("max_waiting_requests", "max_waiting_tokens"):
        if section[name] < 0:
            raise UsageError(f"config.server.{name} is {section[name]}; it must be 0 (no limit) or more")
    with usage_errors("config.server.tool_call_parser"):
        choose_format("", section.tool_call_parser)
    return keys, Limits(section.max_waiting_requests, section.max_waiting_tokens, shared=len(keys.tenants) > 1)


def check_adapters(config: ConfigDict) -> None:
    """Checks what says which adapters are loaded while the server runs, before anything is loaded.

    Args:
        config: The config.

    Raises:
        UsageError: A value makes no sense, or there would be no adapter slot for heads that come later.
    """
    from icarus_jax.server.head_places import HeadPlaces
    from icarus_jax.weights.adapter_cache import is_remote

    section, prefix = config.server, config.server.adapter_resolver
    for name in ("adapter_cache_bytes", "max_cpu_loras"):
        if section[name] < 1:
            raise UsageError(f"config.server.{name} is {section[name]}; it must be at least 1")
    for name in ("head_folders", "adapter_resolver"):
        with usage_errors(f"config.server.{name}"):
            HeadPlaces(place for place in section[name].split(",") if place)
    if prefix and not is_remote(prefix) and not Path(prefix).expanduser().is_dir():
        raise UsageError(f"config.server.adapter_resolver: there is no folder {prefix}")
    if prefix and not (config.engine.max_loras or config.heads):
        raise UsageError("config.server.adapter_resolver needs adapter slots: --config.engine.max_loras=N")


def resolving(loader: HeadLoader, section: ConfigDict) -> HeadResolver | None:
    """Makes what loads heads when they are first named; None if the config does not ask for it.

    Args:
        loader: Loads the heads.
        section: config.server.
    """
    from icarus_jax.server.head_resolver import HeadResolver

    if not section.adapter_resolver:
        return None
    return HeadResolver(loader, section.adapter_resolver, section.max_cpu_loras)


def watching(loader: HeadLoader, folder: str) -> contextlib.AbstractContextManager:
    """Makes a context in which the heads of a folder are loaded as they appear.

    Args:
        loader: Loads the heads.
        folder: The folder; a relative path is relative to the working directory. '': none.

    Raises:
        UsageError: The folder cannot be watched.
    """
    if not folder:
        return contextlib.nullcontext()
    from icarus_jax.server.head_watch import HeadWatcher

    with usage_errors("config.server.watch_heads"):
        return HeadWatcher(loader, Path(folder).expanduser())


def batches(folder: str, max_num_seqs: int) -> BatchWorker | None:
    """Makes what runs the batches of /v1/batches.

    Args:
        folder: Where files and answers are kept; a relative path is relative to the working directory. '': there are
            no batches.
        max_num_seqs: How many sequences can run at once. Batches get half of them: clients that wait come first.

    Raises:
        UsageError: The folder cannot be used.
    """
    import jax

    if not folder or jax.process_index() > 0:  # of several processes, the first one answers requests
        return None
    from icarus_jax.evaluation.batch_store import BatchStore
    from icarus_jax.evaluation.batch_worker import BatchWorker

    with usage_errors("config.server.batch_folder"):
        store = BatchStore(Path(folder).expanduser())
    return BatchWorker(store, max(1, max_num_seqs // 2))


def run() -> None:
    """Reads the flags and runs the program; also the console script icarus-serve."""
    cli.run(main, default_config="multi.py")


if __name__ == "__main__":
    run()
