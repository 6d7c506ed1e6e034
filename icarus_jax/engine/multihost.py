"""One engine over several processes (hosts): process 0 schedules, and all of them execute.

The programs of a step span the devices of all processes. So every process must launch the same programs in the same
order with the same inputs. Before process 0 calls its Runner, it sends the call over TCP to the other processes, which
make the same call. Parts: the call as bytes (host_messages), the connection (host_link), and what happens when a
process is lost (host_team).
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import logging
import os
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from icarus_jax.engine import host_link, host_messages
from icarus_jax.engine.host_team import Team
from icarus_jax.engine.runner import Runner

log = logging.getLogger(__name__)

# The methods of the Runner that run programs.
CALLS = ("warmup", "copy_pages", "compare_pages", "load_head", "launch", "sample")
INVITATION_BYTES = 256  # the size of the message with process 0's address
JOIN_SECONDS, LOST_SECONDS = 300.0, 10.0
FEW_BYTES = 4096  # the largest message to process 0: others only say that they are there

_team: Team | None = None  # of this process, once it has joined the others


def initialize(
    coordinator: str,
    num_processes: int,
    process_id: int,
    join_seconds: float = JOIN_SECONDS,
    lost_seconds: float = LOST_SECONDS,
) -> None:
    """Joins the processes of a run. Must be called before JAX is used.

    A process that has joined ends, with one line and exit code 1, when another process is lost.

    Args:
        coordinator: HOST:PORT of process 0, the same in all processes. 'auto': JAX finds it in the environment (a TPU
            slice, Slurm). '': this process is alone.
        num_processes: The number of processes, if `coordinator` names an address.
        process_id: The number of this process, from 0 on, if `coordinator` names an address.
        join_seconds: How long all processes together may take to join. This process ends if they have not by then.
        lost_seconds: A process that says nothing for so long is lost. At least 1.

    Raises:
        ValueError: A setting makes no sense.
    """
    host, _, port = coordinator.rpartition(":")
    if coordinator not in ("", "auto"):
        if not host or not port.isdigit():
            raise ValueError(f"coordinator={coordinator!r}; it is HOST:PORT of process 0, 'auto' or ''")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process_id={process_id}; with num_processes={num_processes} it lies below that, from 0")
    if join_seconds <= 0 or lost_seconds < 1:
        raise ValueError(f"{join_seconds=}, {lost_seconds=}; the first is above 0, the second at least 1")
    if not coordinator:
        return
    limits: dict[str, Any] = {"initialization_timeout": round(join_seconds + 60)}  # JAX's own limit prints a stack
    deadline = time.monotonic() + join_seconds
    if coordinator != "auto":
        if process_id == 0:
            address = _listening_address(host)
            coordinator = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            limits["coordinator_bind_address"] = coordinator  # JAX would listen on all networks
        limits |= {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    with _limit(join_seconds):
        jax.distributed.initialize(**limits)
        if jax.process_count() > 1:
            _join(host, deadline, lost_seconds)


class Leader:
    """Stands in for the Runner in process 0. It sends each of CALLS to the other processes before it is made here."""

    def __init__(self, runner: Runner, team: Team):
        """Wraps a runner.

        Args:
            runner: The runner of process 0.
            team: The links to the other processes.
        """
        self._runner, self._team = runner, team
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()
        self._pending: Future | None = None
        threading.Thread(target=self._work, name="runner", daemon=True).start()
        team.on_failure(self._give_up)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._runner, name)
        if name == "results":  # waits for the device, and needs nobody else's call
            return functools.partial(self._run, value)
        return functools.partial(self._call, name, value) if name in CALLS else value

    def _call(self, name: str, method: Callable, *args: Any) -> Any:
        """Makes a call in all processes.

        Raises:
            ConnectionError: Another process is lost.
        """
        if name == "copy_pages" and not args[0]:  # most steps copy none
            return None
        # Only process 0 shows progress: warmup's argument is a progress bar, and is not sent.
        self._team.send(host_messages.encode((name, *(() if name == "warmup" else args))))
        return self._run(method, *args)

    def _run(self, method: Callable, *args: Any) -> Any:
        """Makes a call in this process.

        The call itself runs on a thread of its own. It may wait for another host's devices, and that host may be lost.

        Raises:
            ConnectionError: Another process is lost.
        """
        future: Future = Future()
        self._pending = future
        self._jobs.put((future, functools.partial(method, *args)))
        if self._team.failure:
            self._give_up(self._team.failure)
        return future.result()

    def _work(self) -> None:
        while True:
            future, call = self._jobs.get()
            with contextlib.suppress(InvalidStateError):  # `_give_up` was faster
                try:
                    future.set_result(call())
                except Exception as error:
                    future.set_exception(error)
                    self._team.fail(f"process 0 has failed ({type(error).__name__})")  # the others are out of step

    def _give_up(self, reason: str) -> None:
        if (future := self._pending) is not None:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(ConnectionError(reason))


class Worker:
    """Stands in for the Runner in the processes other than 0, which make the calls that process 0 sends."""

    def __init__(self, runner: Runner, team: Team):
        """Wraps a runner.

        Args:
            runner: The runner of this process.
            team: The link to process 0.
        """
        self._runner, self._team = runner, team

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def work(self) -> None:
        """Makes process 0's calls until process 0 says that the run has ended.

        This process ends if process 0 is lost, or if a call fails, as process 0 then waits for a part of it.
        """
        while (message := self._team.calls.get()) is not None:
            try:
                name, *args = host_messages.decode(message)
                if name not in CALLS:
                    raise ValueError(f"process 0 calls {name!r}")
                getattr(self._runner, name)(*args)
            except Exception:
                log.exception("a call of process 0 failed")
                return self._team.fail(f"process {jax.process_index()} has failed")
        self._runner.close()  # else this process ends only once all programs are compiled


def spread(runner: Runner) -> Runner:
    """Connects this process's runner with those of the other processes.

    Args:
        runner: The runner of this process.

    Returns:
        The runner itself if there is one process; else a Leader in process 0, and a Worker in the others.
    """
    if jax.process_count() == 1:
        return runner
    team = _team or _join("", time.monotonic() + JOIN_SECONDS, LOST_SECONDS)  # the caller has initialised JAX alone
    return cast(Runner, (Leader if team.leads else Worker)(runner, team))


# ---- joining


def _join(host: str, deadline: float, lost_seconds: float) -> Team:
    """Links this process with the others.

    Args:
        host: Process 0, as all processes call it; '' if nobody said.
        deadline: When to give up, in the time of time.monotonic().
        lost_seconds: See `initialize`.
    """
    global _team
    process, count = jax.process_index(), jax.process_count()
    if process == 0:
        key = secrets.token_bytes(32)
        address = _listening_address(host)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family, backlog=128) as listener:
            _broadcast([address, listener.getsockname()[1], key.hex()])
            links = host_link.admit(listener, key, count, deadline, lost_seconds, FEW_BYTES)
    else:
        address, port, key_hex = _broadcast(None)
        most = host_messages.MAX_BYTES
        links = [host_link.join((address, port), bytes.fromhex(key_hex), process, deadline, lost_seconds, most)]
    _team = Team(links, process == 0, lost_seconds)
    return _team


def _broadcast(words: list[Any] | None) -> list[Any]:
    """Returns what process 0 passes, in every process. It must fit INVITATION_BYTES as JSON."""
    data = np.frombuffer(json.dumps(words).encode().ljust(INVITATION_BYTES), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes())


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Ends this process with one line if the body takes longer. What it waits for in JAX cannot be interrupted."""

    def end(reason: str = "") -> None:
        reason = reason or "is each process started, with a process_id of its own, and can they reach each other?"
        log.critical("the processes of this run have not all joined in %g s: %s", seconds, reason)
        sys.stderr.flush()
        os._exit(1)  # else JAX would wait for the other processes

    timer = threading.Timer(seconds + 1, end)  # `admit` and `join` know more, and look at the time themselves
    timer.daemon = True
    timer.start()
    try:
        yield
    except TimeoutError as error:
        end(str(error))
    finally:
        timer.cancel()


def _listening_address(host: str) -> str:
    """Returns the one address of this host at which it listens: that of `host` if it is reachable from others.

    Args:
        host: What the other processes call this one; '' if nobody said.
    """
    host = host.strip("[]")
    if host:
        address = str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0])
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        # A host's own name often means 127.0.1.1 on the host itself, and its network address elsewhere.
        alone = ipaddress.ip_address(address.partition("%")[0]).is_loopback and host not in ("localhost", address)
        with contextlib.suppress(OSError), socket.create_server((address, 0), family=family):
            if not alone:
                return address
    return _own_address()


def _own_address() -> str:
    """Returns this host's address on its network, read from the routing table. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
