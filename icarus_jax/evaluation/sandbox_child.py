"""What runs in the sandbox's two interpreters: a program under test, and the judge that checks it.

    python -I -S sandbox_child.py program                   calls come on stdin, replies go to stdout
    python -I -S sandbox_child.py judge REPLIES CALLS       the numbers of the descriptors; the verdict goes to stdout

Both talk in lines of JSON. The judge's first line to the program is the order to run; its others are calls of the
program's functions. The judge trusts nothing in a reply: it makes plain values of it, or fails the program. Standard
library only, since the interpreters know no path to anything else.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from sandbox_values import pack, unpack

del sys.path[0]  # the program and the check import from the standard library only

FILE_BYTES = 1 << 20
_HARMLESS = frozenset({"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv"})  # for imports
_REFUSED = (
    *("os.", "socket.", "subprocess.", "ctypes.", "shutil.", "pty.", "resource.", "sqlite3.", "fcntl.", "syslog."),
    *("gc.", "signal.pthread_kill"),  # gc finds the hook
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Ended(BaseException):
    """The program has ended or answers nonsense. Not an Exception, so that a check does not catch it by accident."""


# ---- limits of both interpreters


def limit(limits: dict[str, Any], over: Callable[[str], NoReturn]) -> None:
    """Sets the limits of this process.

    Args:
        limits: its processor time, wall time and memory.
        over: over(message) is called if the process reaches a time limit.
    """
    cpu, wall, memory = limits["cpu"], limits["wall"], limits["memory"]
    signal.signal(signal.SIGXCPU, lambda *_: over(f"over the limit of {cpu} s of processor time"))
    for what, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),  # the hard limit kills a program that does not handle the signal in time
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))
    # This process ends itself too, in case the evaluation is killed and nobody else enforces the limit.
    signal.signal(signal.SIGALRM, lambda *_: over(f"over the limit of {wall:g} s"))
    signal.setitimer(signal.ITIMER_REAL, wall)


def guard(folder: str) -> None:
    """Refuses the operations that a function under test does not need. An audit hook cannot be removed again.

    The hook looks up no name that the program could replace. No folder can be opened and no link be made in `folder`,
    so a path without a further '/' names a file in it.

    Args:
        folder: the working directory, in which files may be written.
    """
    starts, split, decode = str.startswith, str.rpartition, bytes.decode
    kind, text, raw, number, refusal, stat, missing = type, str, bytes, int, PermissionError, os.stat, OSError
    harmless, refused, writes = _HARMLESS, _REFUSED, _WRITES
    ours = ("", ".", folder, os.path.realpath(folder))
    proc = stat("/proc").st_dev if os.path.isdir("/proc") else -1

    def is_allowed(path: str, flags: int) -> bool:
        if path == "/dev/null":
            return True
        if flags & writes:
            parent, slash, name = split(path, "/")
            return parent in ours and name not in ("", ".", "..") and (parent != "" or slash == "")
        try:
            found = stat(path)
        except missing:
            return True  # to open it will fail as well
        return found.st_dev != proc and found.st_mode & 0o170000 != 0o040000  # no folder

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if kind(path) is raw:
                path = decode(path, "utf-8", "surrogateescape")
            # An object of another type may give another path when it is used.
            if kind(path) is number or (kind(path) is text and is_allowed(path, flags)):
                return
        elif event in harmless or not starts(event, refused):
            return
        raise refusal(f"refused in the sandbox: {event}")

    sys.addaudithook(hook)


def _silence() -> tuple[int, int]:
    """Sends the standard streams nowhere. Returns the descriptors that were stdout and stdin."""
    kept = os.dup(1), os.dup(0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    return kept


def _say(descriptor: int, message: Any) -> None:
    left = json.dumps(message).encode() + b"\n"
    while left:
        left = left[os.write(descriptor, left) :]


def _told(error: BaseException) -> list[str]:
    """Returns an exception's type and message."""
    with contextlib.suppress(Exception):  # str(error) is the program's
        return [type(error).__name__, str(error)[:1000]]
    return [type(error).__name__, ""]


# ---- the program's interpreter


def run_program() -> NoReturn:
    """Runs the program, and then calls its functions as the judge asks, until the judge closes the pipe."""
    replies, stdin = _silence()
    calls = os.fdopen(stdin, "rb")
    order = json.loads(calls.readline())

    def over(message: str) -> NoReturn:
        _say(replies, {"ended": message})
        os._exit(0)

    limit(order["limits"], over)
    guard(os.getcwd())
    names: dict[str, Any] = {"__name__": "__main__"}

    def run() -> None:
        exec(compile(order["program"], "program", "exec"), names)

    def answer(work: Callable[..., Any], args: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"value": pack(work(*args, **options))}
        except BaseException as error:  # SystemExit is a failure too
            return {"error": _told(error)}

    _say(replies, answer(run, [], {}))
    for line in calls:
        name, args, options = unpack(json.loads(line))
        _say(replies, answer(lambda *a, name=name, **o: names[name](*a, **o), args, options))
    os._exit(0)


# ---- the judge's interpreter


class Program:
    """The program, as the judge sees it.

    Attributes:
        ended: why it has ended, if it has.
    """

    def __init__(self, replies: int, calls: int):
        """Takes the descriptors of the pipes."""
        self._replies = os.fdopen(replies, "rb")
        self._calls = calls
        self.ended = ""

    def start(self, order: dict[str, Any]) -> None:
        """Runs the program, and raises what it raises."""
        self._ask(order)

    def function(self, name: str) -> Callable[..., Any]:
        """Returns a stand-in for one of the program's functions."""

        def call(*args: Any, **options: Any) -> Any:
            return self._ask(pack((name, list(args), options)))

        call.__name__ = name
        return call

    def _ask(self, message: Any) -> Any:
        """Returns the value of a reply, a plain one. Raises Ended, or what the program has raised."""
        if self.ended:
            raise Ended(self.ended)
        with contextlib.suppress(OSError):  # it has ended; what it said last is still there to read
            _say(self._calls, message)
        line = self._replies.readline()
        self.ended = "the program ended its interpreter"
        if not line:
            raise Ended(self.ended)
        try:
            reply = json.loads(line)
            if "ended" in reply:
                self.ended = str(reply["ended"]) or self.ended
                raise Ended(self.ended)
            error = _exception(*map(str, reply["error"])) if "error" in reply else None
            value = None if error else unpack(reply["value"])
        except Exception:
            self.ended = "the program wrote into its interpreter's answers"
            raise Ended(self.ended) from None
        self.ended = ""
        if error:
            raise error
        return value


def _exception(kind: str, said: str) -> Exception:
    """Makes an exception with the name and the message of the program's. A check can catch it if it is a built-in."""
    known = getattr(builtins, kind, None)
    base = known if isinstance(known, type) and issubclass(known, Exception) else Exception
    made: type[Exception] = type(kind, (base,), {"__str__": lambda self: said})
    return base.__new__(made)  # without __init__, which may ask for more than a message


def judge(replies: int, calls: int) -> NoReturn:
    """Reads the order, lets the program run, runs the check, and writes the verdict.

    Args:
        replies: the descriptor on which the program replies.
        calls: the descriptor on which it is called.
    """
    order = json.loads(sys.stdin.buffer.read())
    answer, _ = _silence()

    def finish(error: str) -> NoReturn:
        with contextlib.suppress(OSError):  # the evaluation has closed its end of the pipe
            _say(answer, {"passed": not error, "error": error.splitlines()[0][:200] if error else ""})
        os._exit(0)

    limit(order["limits"], finish)
    guard(os.getcwd())
    program = Program(replies, calls)
    try:
        program.start({"limits": order["limits"], "program": order["program"]})
        names = {"__name__": "check", "program_function": program.function}
        exec(compile(order["check"], "check", "exec"), names)
    except Ended as error:
        finish(str(error))
    except BaseException as error:
        finish(": ".join(_told(error)))
    finish(program.ended)  # in case the check has caught everything


if __name__ == "__main__":
    if sys.argv[1] == "program":
        run_program()
    judge(*map(int, sys.argv[2:4]))
