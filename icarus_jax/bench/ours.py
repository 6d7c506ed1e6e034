"""Starts our own server for a run, and stops it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from icarus_jax.bench.client import Server, ServerError
from icarus_jax.cli.paths import program
from icarus_jax.errors import UsageError

START_SECONDS = 900  # how long a server may take until it answers


@dataclasses.dataclass(frozen=True)
class OwnServer:
    """A server that was started for a run: its URL and process id."""

    url: str
    pid: int


@contextlib.contextmanager
def serving(
    spec: str, overrides: Mapping[str, object], log: Path, more: Sequence[str] = (), name: str = "serve"
) -> Iterator[OwnServer]:
    """Runs `launch/serve.py`, or another program that serves, on a free port while the context is entered.

    Args:
        spec: the config's name, as for --config.
        overrides: config key -> its value.
        log: the file that the server's output is written to.
        more: further flags.
        name: the program's name in launch/; 'serve_ray' starts several replicas.

    Yields:
        The server, once it answers.

    Raises:
        UsageError: the server ended before it answered, or took too long.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"engine.warmup": "all", **overrides, "server.port": port}  # nothing is compiled while it is measured
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    command = [*program(name), f"--config={spec}", *flags, *more]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            _wait(url, process, log)
            yield OwnServer(url, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            last = log.read_text().strip().splitlines()[-1:]
            raise UsageError(f"our server ended at once: {' '.join(last)} (see {log})")
        with contextlib.suppress(OSError, ServerError):
            asyncio.run(Server(url).get("/health"))
            return
        time.sleep(0.2)
    raise UsageError(f"our server did not answer within {START_SECONDS} s (see {log})")
