"""One engine over several processes (hosts): process 0 schedules, and all of them execute.

The programs of a step span the devices of all processes. So every process must launch the same programs in the same
order with the same inputs. Before process 0 calls its Runner, it sends the call over TCP to the other processes, which
make the same call.
"""

from __future__ import annotations

import atexit
import functools
import json
import secrets
import socket
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from icarus_jax.engine.runner import Runner

CALLS = ("warmup", "copy_pages", "compare_pages", "load_head", "execute")  # the Runner's methods that run programs
INVITATION_BYTES = 256  # the size of the message with process 0's address


def initialize(coordinator: str, num_processes: int, process_id: int) -> None:
    """Joins the processes of a run. Must be called before JAX is used.

    Args:
        coordinator: HOST:PORT of process 0, the same in all processes. 'auto': JAX finds it in the environment (a TPU
            slice, Slurm). '': this process is alone.
        num_processes: The number of processes, if `coordinator` names an address.
        process_id: The number of this process, from 0 on, if `coordinator` names an address.

    Raises:
        ValueError: A setting makes no sense.
    """
    if coordinator == "auto":
        jax.distributed.initialize()
    elif coordinator:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"coordinator={coordinator!r}; it is HOST:PORT of process 0, 'auto' or ''")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process_id={process_id}; with num_processes={num_processes} it lies below that, from 0")
        jax.distributed.initialize(coordinator, num_processes, process_id)


class Leader:
    """Stands in for the Runner in process 0. It sends each of CALLS to the other processes before it is made here."""

    def __init__(self, runner: Runner, others: list[Connection]):
        """Wraps a runner.

        Args:
            runner: The runner of process 0.
            others: A connection to each of the other processes.
        """
        self._runner, self._others = runner, others
        atexit.register(self._send, None)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._runner, name)
        return functools.partial(self._call, name, value) if name in CALLS else value

    def _call(self, name: str, method: Callable, *args: Any) -> Any:
        # Only process 0 shows progress: warmup's argument is a progress bar, and is not sent.
        sent = () if name == "warmup" else args
        self._send((name, sent))
        return method(*args)

    def _send(self, call: tuple[str, tuple] | None) -> None:
        """Sends a call, (method, arguments), to the other processes. None: the run has ended."""
        for other in self._others:
            other.send(call)


class Worker:
    """Stands in for the Runner in the processes other than 0, which make the calls that process 0 sends."""

    def __init__(self, runner: Runner, leader: Connection):
        """Wraps a runner.

        Args:
            runner: The runner of this process.
            leader: The connection to process 0.
        """
        self._runner, self._leader = runner, leader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def work(self) -> None:
        """Makes process 0's calls until process 0 says that the run has ended.

        Raises:
            ConnectionError: The connection broke before that: process 0 has crashed or was killed.
        """
        while True:
            try:
                call = self._leader.recv()
            except EOFError:
                raise ConnectionError("process 0 is gone") from None
            if call is None:
                return
            name, args = call
            getattr(self._runner, name)(*args)


def spread(runner: Runner) -> Runner:
    """Connects this process's runner with those of the other processes.

    Args:
        runner: The runner of this process.

    Returns:
        The runner itself if there is one process; else a Leader in process 0, and a Worker in the others.
    """
    if jax.process_count() == 1:
        return runner
    if jax.process_index() == 0:
        key = secrets.token_bytes(32)
        with Listener(("", 0), authkey=key) as listener:
            _broadcast([_own_address(), listener.address[1], key.hex()])
            others = [listener.accept() for _ in range(jax.process_count() - 1)]
        return cast(Runner, Leader(runner, others))
    host, port, key_hex = _broadcast(None)
    return cast(Runner, Worker(runner, Client((host, port), authkey=bytes.fromhex(key_hex))))


def _broadcast(words: list[Any] | None) -> list[Any]:
    """Returns what process 0 passes, in every process. It must fit INVITATION_BYTES as JSON."""
    data = np.frombuffer(json.dumps(words).encode().ljust(INVITATION_BYTES), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes())


def _own_address() -> str:
    """Returns this host's address on its network, read from the routing table. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
