"""Runs a generated Python program, and tells whether it ran to its end. Standard library only.

The program runs in an interpreter of its own (`python sandbox.py`, below), which has nothing but the standard library.
It runs in an empty folder that is removed afterwards, with limits on processor time, wall time, memory and file size.
An audit hook refuses sockets, other processes, ctypes, and every write outside that folder. If the system grants
namespaces (`is_isolated`), the kernel also keeps the program off the network, and ends the processes it has started.

This stops the accidents in code that a model writes. It does not stop code that was written to break out, because the
hook is Python's and lives in the process that it watches.
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
WALL_SECONDS = 20.0  # more than CPU_SECONDS, because the program shares the processor with the engine
MEMORY_BYTES = 512 << 20
FILE_BYTES = 1 << 20
_NAMESPACES = ("unshare", "--map-root-user", "--net", "--pid", "--kill-child")
_HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv"}  # import needs os.listdir
_REFUSED = ("os.", "socket.", "subprocess.", "ctypes.", "shutil.", "pty.", "resource.", "sqlite3.", "fcntl.", "syslog.")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: whether it ran to its end.
        error: why it did not, in one line; '' if it did.
    """

    passed: bool
    error: str = ""


@functools.cache
def is_isolated() -> bool:
    """Tells whether the system lets programs run in network and process namespaces of their own."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run([*_NAMESPACES, "true"], capture_output=True, timeout=10).returncode == 0
    return False


def run_program(
    program: str,
    cpu_seconds: int = CPU_SECONDS,
    wall_seconds: float = WALL_SECONDS,
    memory_bytes: int = MEMORY_BYTES,
) -> Outcome:
    """Runs a program until it ends or reaches a limit. Thread-safe.

    The program's processes and files are removed before this returns.

    Args:
        program: the source code.
        cpu_seconds: the limit on its processor time, in seconds.
        wall_seconds: the limit on its wall time, in seconds.
        memory_bytes: the limit on its address space, in bytes.

    Returns:
        How the program ended.
    """
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


# ---- what runs in the program's own interpreter


def _limit(order: dict[str, Any], answer: int) -> None:
    """Sets the limits of this process. If the program reaches a time limit, it is reported as failed."""

    def over(what: str) -> Callable[..., NoReturn]:
        return lambda *_: _finish(answer, Outcome(False, f"over the limit of {what}"))

    cpu = order["cpu"]
    signal.signal(signal.SIGXCPU, over(f"{cpu} s of processor time"))
    for what, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),  # the hard limit kills a program that does not handle the signal in time
        (resource.RLIMIT_AS, order["memory"], order["memory"]),
        (resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))
    # This process ends itself too, in case the evaluation is killed and nobody else enforces the limit.
    signal.signal(signal.SIGALRM, over(f"{order['wall']:g} s"))
    signal.setitimer(signal.ITIMER_REAL, order["wall"])


def _guard(folder: str) -> None:
    """Refuses the operations that a function under test does not need. An audit hook cannot be removed again."""

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
    with contextlib.suppress(OSError):  # the evaluation has closed its end of the pipe
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
    except BaseException as error:  # SystemExit is a failure too: the tests come at the end of the program
        outcome = Outcome(False, f"{type(error).__name__}: {error}".splitlines()[0][:200])
    _finish(answer, outcome)


if __name__ == "__main__":
    _serve()
