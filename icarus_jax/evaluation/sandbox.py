"""Runs a generated Python program, and says whether it got to its end. Standard library only.

The program runs in an interpreter of its own (`python sandbox.py`, below) with nothing but the standard library, in an
empty folder that is removed afterwards, under limits of processor time, wall time, memory and file size. An audit hook
refuses it sockets, other processes, ctypes, and every write outside that folder. Where the system grants namespaces
(`is_isolated`), the kernel keeps it off the network as well, and takes down whatever it has started.

This holds what models write by accident. The hook is Python's, inside the process that it watches: do not rely on it
against code that was written to break out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NoReturn

CPU_SECONDS = 5
WALL_SECONDS = 20.0  # more: the program shares the processor with the engine
MEMORY_BYTES = 512 << 20
FILE_BYTES = 1 << 20
_NAMESPACES = ("unshare", "--map-root-user", "--net", "--pid", "--kill-child")
_HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv"}  # imports need the first
_REFUSED = ("os.", "socket.", "subprocess.", "ctypes.", "shutil.", "pty.", "resource.", "sqlite3.", "fcntl.", "syslog.")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclasses.dataclass(frozen=True)
class Outcome:
    """passed: the program ran to its end. error: else why not, in one line."""

    passed: bool
    error: str = ""


@functools.cache
def is_isolated() -> bool:
    """Whether programs run in network and process namespaces of their own."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run([*_NAMESPACES, "true"], capture_output=True, timeout=10).returncode == 0
    return False


def run_program(
    program: str,
    cpu_seconds: int = CPU_SECONDS,
    wall_seconds: float = WALL_SECONDS,
    memory_bytes: int = MEMORY_BYTES,
) -> Outcome:
    """Runs a program to its end or its limits. Thread-safe; nothing of it is left when this returns."""
    order = {"program": program, "cpu": cpu_seconds, "wall": wall_seconds, "memory": memory_bytes}
    prefix = _NAMESPACES if is_isolated() else ()
    with tempfile.TemporaryDirectory(prefix="icarus-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-I", "-S", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "PATH": os.defpath},
            start_new_session=True,
        )
        try:
            answer, _ = process.communicate(json.dumps(order).encode(), timeout=wall_seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"over the limit of {wall_seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode == 0 and answer:
        try:
            return Outcome(**json.loads(answer))
        except (ValueError, TypeError):
            return Outcome(False, "the program wrote into the interpreter's answer")
    return Outcome(False, f"the interpreter ended without a word (exit code {process.returncode})")


# ---- in the interpreter of the program


def _limit(order: dict[str, Any], answer: int) -> None:
    def over(what: str) -> Callable[..., NoReturn]:
        return lambda *_: _finish(answer, Outcome(False, f"over the limit of {what}"))

    cpu = order["cpu"]
    signal.signal(signal.SIGXCPU, over(f"{cpu} s of processor time"))
    for what, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),  # the second kills what hears no signal
        (resource.RLIMIT_AS, order["memory"], order["memory"]),
        (resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))
    # In case the evaluation itself is killed meanwhile.
    signal.signal(signal.SIGALRM, over(f"{order['wall']:g} s"))
    signal.setitimer(signal.ITIMER_REAL, order["wall"])


def _guard(folder: str) -> None:
    """Refuses what a function under test has no need of. An audit hook cannot be taken away again."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not flags & _WRITES or isinstance(path, int) or path == os.devnull:
                return
            if os.path.realpath(os.fsdecode(path)).startswith(folder + os.sep):
                return
        elif event in _HARMLESS or not event.startswith(_REFUSED):
            return
        raise PermissionError(f"refused in the sandbox: {event}")

    sys.addaudithook(hook)


def _finish(answer: int, outcome: Outcome) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(answer, json.dumps(dataclasses.asdict(outcome)).encode())
    os._exit(0)


def _serve() -> NoReturn:
    """Reads the order, runs the program and writes the Outcome, unless the program ends the interpreter first."""
    order = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    _limit(order, answer)
    _guard(os.path.realpath(os.curdir))
    try:
        exec(compile(order["program"], "program", "exec"), {"__name__": "__main__"})
        outcome = Outcome(True)
    except BaseException as error:  # SystemExit too: the tests come last
        outcome = Outcome(False, f"{type(error).__name__}: {error}".splitlines()[0][:200])
    _finish(answer, outcome)


if __name__ == "__main__":
    _serve()
