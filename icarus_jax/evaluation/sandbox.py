"""Runs a generated Python program, and tells whether it passes a check. Standard library only.

The program and the check run in two interpreters (sandbox_child.py), which have nothing but the standard library. The
check's interpreter calls the program's functions over a pair of pipes, compares plain values, and reports the verdict
to the evaluation over a pipe that the program's process never has. So the program cannot know or forge its verdict,
whatever it does in its own interpreter: end it early, write to its descriptors, patch builtins, leave threads or exit
handlers behind, search its frames or memory, or return objects that equal everything. All it can do is to give wrong
answers, or right ones.

Both run in empty folders that are removed afterwards, with limits on processor time, wall time, memory and file size.
An audit hook refuses sockets, other processes, ctypes, /proc, and every write outside the folder. If the system grants
namespaces (`is_isolated`), the kernel also keeps both off the network and away from all other processes (their memory,
their environment, and what /proc says of them), and ends the processes that they have started.

What is not guarded: the hook is Python's and lives in the process that it watches, so code that was written to break
out of the interpreter gets past it. Such code can read and write what the user can, this package's files too; without
namespaces it can also reach the check's process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

CPU_SECONDS = 5
WALL_SECONDS = 20.0  # more than CPU_SECONDS, because the program shares the processor with the engine
MEMORY_BYTES = 512 << 20
CHILD = Path(__file__).resolve().with_name("sandbox_child.py")
_HIDE_PROC = 'mount -t tmpfs -o ro icarus /proc 2>/dev/null; exec "$@"'
_UNSHARE = ("unshare", "--map-root-user", "--net", "--pid", "--ipc", "--mount", "--kill-child")
_NAMESPACES = (*_UNSHARE, "sh", "-c", _HIDE_PROC, "sh")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: whether it ran to its end and passed the check.
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
    check: str = "",
    cpu_seconds: int = CPU_SECONDS,
    wall_seconds: float = WALL_SECONDS,
    memory_bytes: int = MEMORY_BYTES,
) -> Outcome:
    """Runs a program, then a check of its functions, until both end or one reaches a limit. Thread-safe.

    Their processes and files are removed before this returns.

    Args:
        program: the source code of the program. It is not trusted.
        check: the source code of the check. It is trusted. In it, program_function(name) returns a stand-in for a
            function of the program. Arguments and results are copied; they may be numbers, strings, bytes, None, and
            lists, tuples, sets, dicts and iterators of these. The check fails if it raises. Without a check, `passed`
            only means that the program says it ran to its end.
        cpu_seconds: the limit on the processor time of each, in seconds.
        wall_seconds: the limit on the wall time of both together, in seconds.
        memory_bytes: the limit on the address space of each, in bytes.

    Returns:
        How the program ended.
    """
    limits = {"cpu": cpu_seconds, "wall": wall_seconds, "memory": memory_bytes}
    order = json.dumps({"limits": limits, "program": program, "check": check}).encode()
    with (
        tempfile.TemporaryDirectory(prefix="icarus-", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as at_end,
    ):
        judge = _start(folder, at_end)
        try:
            verdict, _ = judge.communicate(order, timeout=wall_seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"over the limit of {wall_seconds:g} s")
    if judge.returncode == 0:
        with contextlib.suppress(ValueError, TypeError):
            return Outcome(**json.loads(verdict))
    return Outcome(False, f"the check ended without a verdict (exit code {judge.returncode})")


def _start(folder: str, at_end: contextlib.ExitStack) -> subprocess.Popen[bytes]:
    """Starts both interpreters and connects them. Returns the judge's process, which says the verdict on its stdout."""
    calls_out, calls_in = os.pipe()
    replies_out, replies_in = os.pipe()
    try:
        _child(folder, at_end, ["program"], stdin=calls_out, stdout=replies_in)
        ends = (replies_out, calls_in)
        return _child(folder, at_end, ["judge", *map(str, ends)], subprocess.PIPE, subprocess.PIPE, ends)
    finally:  # the children have these now; a reader learns that the writer has ended only if nobody else can write
        for end in (calls_out, calls_in, replies_out, replies_in):
            os.close(end)


def _child(
    folder: str, at_end: contextlib.ExitStack, args: list[str], stdin: int, stdout: int, keep: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    """Starts an interpreter in a folder of its own, which `at_end` ends again."""
    home = os.path.join(folder, args[0])
    os.mkdir(home)
    process = subprocess.Popen(
        [*(_NAMESPACES if is_isolated() else ()), sys.executable, "-I", "-S", str(CHILD), *args],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        cwd=home,
        env={"HOME": home, "TMPDIR": home, "PATH": os.defpath},
        pass_fds=keep,
        start_new_session=True,
    )
    at_end.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
