"""Makes the HTTP API of a config: who may use it, how much may wait, and which heads are loaded while it runs.

The server is imported inside the functions only, so that a misspelt flag is reported at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from icarus_jax.cli.composition import App
from icarus_jax.errors import UsageError, usage_errors

if TYPE_CHECKING:
    from fastapi import FastAPI

    from icarus_jax.server.auth import Keys
    from icarus_jax.server.endpoints import Endpoints
    from icarus_jax.server.head_loader import HeadLoader
    from icarus_jax.server.head_resolver import HeadResolver
    from icarus_jax.server.intake import Prefill
    from icarus_jax.server.limits import Limits
    from icarus_jax.server.tracing import Traces


def make_api(
    config: ConfigDict,
    app: App,
    keys: Keys,
    limits: Limits,
    traces: Traces | None,
    extra: Sequence[Endpoints] = (),
    lifespan: Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]] | None = None,
    prefill: Prefill | None = None,
) -> FastAPI:
    """Makes the HTTP API over an engine.

    Args:
        config: The config.
        app: What `build(config)` made.
        keys: Who may use the API.
        limits: How much may wait for the engine.
        traces: Where traces go; None: there are none.
        extra: More groups of endpoints.
        lifespan: As for `create_app`.
        prefill: As for `create_app`.
    """
    from icarus_jax.server.app import create_app
    from icarus_jax.server.auth import host_names

    section = config.server
    return create_app(
        app.engine,
        app.tokenizer,
        app.eos_ids,
        app.loader,
        keys,
        limits,
        [origin for origin in section.cors_origins.split(",") if origin],
        host_names(section.allowed_hosts, keys, section.allow_remote_without_keys),
        section.tool_call_parser,
        resolving(app.loader, section),
        extra=extra,
        lifespan=lifespan,
        traces=traces,
        body_timeout=section.body_timeout,
        prefill=prefill,
    )


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
    if not section.body_timeout > 0:
        raise UsageError(f"config.server.body_timeout is {section.body_timeout}; it must be above 0")
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


def tracing(endpoint: str) -> Traces | None:
    """Makes what sends the traces of requests; None if the config does not ask for it.

    Args:
        endpoint: The URL of the collector. '': there is none.

    Raises:
        UsageError: It is no such URL, or OpenTelemetry is not installed.
    """
    if not endpoint:
        return None
    try:
        from icarus_jax.server.tracing import Traces
    except ImportError as error:
        raise UsageError(
            f"config.server.otlp_traces_endpoint needs OpenTelemetry: pip install 'icarus-jax[otel]' ({error})"
        ) from None
    with usage_errors("config.server.otlp_traces_endpoint"):
        return Traces.to(endpoint)
