"""One engine over several processes (hosts): process 0 schedules, all of them execute.

A step's programs span the devices of every process, so that each process has to launch them, in the same order and
with the same inputs. Process 0 says over TCP what it is about to call on its Runner; the others make the same calls.
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

CALLS = ("warmup", "copy_pages", "compare_pages", "load_head", "execute")  # what runs programs
INVITATION_BYTES = 256


def initialize(coordinator: str, num_processes: int, process_id: int) -> None:
    """Joins the processes of a run, before JAX is used. Raises ValueError if a setting makes no sense.

    coordinator: HOST:PORT of process 0, the same for all; 'auto': what the environment knows (a TPU slice, Slurm);
    '': this process is alone.
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
    """Process 0's Runner: the others are told of every one of CALLS before it is made here."""

    def __init__(self, runner: Runner, others: list[Connection]):
        self._runner, self._others = runner, others
        atexit.register(self._send, None)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._runner, name)
        return functools.partial(self._call, name, value) if name in CALLS else value

    def _call(self, name: str, method: Callable, *args: Any) -> Any:
        self._send((name, () if name == "warmup" else args))  # a progress bar stays at home
        return method(*args)

    def _send(self, call: tuple[str, tuple] | None) -> None:
        for other in self._others:
            other.send(call)


class Worker:
    """The Runner of any other process."""

    def __init__(self, runner: Runner, leader: Connection):
        self._runner, self._leader = runner, leader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def work(self) -> None:
        """Makes process 0's calls until it ends. Raises ConnectionError if it is gone without a word."""
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
    """Joins this process's runner to those of the others: a Leader in process 0, a Worker in the others.

    In a run of one process it is the runner itself.
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
    """Process 0's words, in every process."""
    data = np.frombuffer(json.dumps(words).encode().ljust(INVITATION_BYTES), np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes())


def _own_address() -> str:
    """This host's address on its network, as its routing table has it; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
