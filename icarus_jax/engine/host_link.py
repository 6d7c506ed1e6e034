"""A link between two processes of a run: TCP whose messages are authenticated and whose silence is noticed.

Both sides know the run's key. They prove it to each other with numbers drawn anew, which a third party cannot replay,
and derive a key for each direction from it. A message is

    u8, its kind | u64, the length of its body | HMAC-SHA256 of kind, length, number and SHA-256 of the body | the body

where the number counts the messages of this direction; it is not sent. Nothing is encrypted.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence

log = logging.getLogger(__name__)

BEAT, CALL, END, FAILED = range(4)  # the kinds of messages
HELLO = b"icarus-jax hosts 1\n"
HELLO_SECONDS = 5.0  # a peer that has not proved by then that it knows the key is dropped
MAX_PEERS = 64  # that may be proving it at a time
RETRY_SECONDS = 0.2
NONCE_BYTES = TAG_BYTES = 32
CHUNK_BYTES = 1 << 20
HEADER = struct.Struct("!BQ")
NUMBER = struct.Struct("!Q")


def _tag(key: bytes, *parts: bytes | bytearray) -> bytes:
    return hmac.digest(key, b"".join(parts), "sha256")


class Link:
    """One end of a link. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket, keys: Sequence[bytes], other: str, lost_seconds: float, max_bytes: int):
        """Takes over a socket whose other end has proved that it knows the key.

        Args:
            sock: The socket.
            keys: The keys of what is sent, and of what is received.
            other: What messages of errors call the other end, for example 'process 1'.
            lost_seconds: How long the other end may say nothing, or take nothing.
            max_bytes: The largest body that is received.
        """
        self.other = other
        self._sock, self._lost_seconds, self._max_bytes = sock, lost_seconds, max_bytes
        self._send_key, self._receive_key = keys
        self._sent = self._received = 0  # messages
        self._sending = threading.Lock()
        sock.settimeout(lost_seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: what is sent must be acknowledged by then
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(lost_seconds * 1000))

    def send(self, kind: int, body: bytes = b"") -> None:
        """Sends a message.

        Args:
            kind: Its kind.
            body: What it says.

        Raises:
            ConnectionError: The other end is gone, or takes nothing.
        """
        head, digest = HEADER.pack(kind, len(body)), hashlib.sha256(body).digest()
        with self._sending:
            tag = _tag(self._send_key, head, NUMBER.pack(self._sent), digest)
            self._sent += 1
            try:
                self._send_all(head + tag + body if len(body) < CHUNK_BYTES else head + tag)
                if len(body) >= CHUNK_BYTES:
                    self._send_all(body)
            except OSError as error:
                raise self._broken(error, "took") from None

    def _send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # not sendall: its limit would be one for all of the data
            view = view[self._sock.send(view[:CHUNK_BYTES]) :]

    def receive(self) -> tuple[int, bytearray]:
        """Waits for a message.

        Returns:
            Its kind and its body.

        Raises:
            ConnectionError: The other end is gone, or says nothing, or something that is not its own.
        """
        try:
            head = _read(self._sock, HEADER.size)
            kind, length = HEADER.unpack(head)
            if length > self._max_bytes:
                raise ValueError(f"a message of {length} bytes; at most {self._max_bytes} are taken")
            tag, body = _read(self._sock, TAG_BYTES), _read(self._sock, length)
        except (OSError, EOFError, ValueError) as error:
            raise self._broken(error, "said") from None
        digest = hashlib.sha256(body).digest()
        if not hmac.compare_digest(tag, _tag(self._receive_key, head, NUMBER.pack(self._received), digest)):
            raise ConnectionError(f"a message that {self.other} did not write, or not now, came in its name")
        self._received += 1
        return kind, body

    def _broken(self, error: Exception, did: str) -> ConnectionError:
        if isinstance(error, TimeoutError):
            return ConnectionError(f"{self.other} {did} nothing for {self._lost_seconds:g} s")
        if isinstance(error, ValueError):
            return ConnectionError(f"{self.other} sent {error}")
        return ConnectionError(f"{self.other} is gone")

    def close(self) -> None:
        """Ends the link, also for a thread that waits in `receive`."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _read(sock: socket.socket, size: int, deadline: float | None = None) -> bytearray:
    """Reads so many bytes.

    Args:
        sock: Where from. Its limit of time holds for each part that comes.
        size: How many.
        deadline: When all must have come, in the time of time.monotonic().

    Raises:
        EOFError: There are fewer.
        TimeoutError: They did not come in time.
    """
    data = bytearray(size)
    view = memoryview(data)
    while view:
        if deadline is not None:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        count = sock.recv_into(view[:CHUNK_BYTES])
        if not count:
            raise EOFError
        view = view[count:]
    return data


# ---- joining


def admit(
    listener: socket.socket, key: bytes, num_processes: int, deadline: float, lost_seconds: float, max_bytes: int
) -> list[Link]:
    """Waits until processes 1 to num_processes - 1 have joined. A peer that does not know the key is dropped.

    Args:
        listener: A socket that listens.
        key: The run's key.
        num_processes: The number of processes, this one included.
        deadline: When to give up, in the time of time.monotonic().
        lost_seconds: See Link.
        max_bytes: See Link.

    Returns:
        The links, in the order of the processes.

    Raises:
        TimeoutError: They have not all joined by the deadline.
    """
    joined: dict[int, tuple[socket.socket, bytes]] = {}  # a process's socket, and what both sides said on it
    room, lock, full = threading.Semaphore(MAX_PEERS), threading.Lock(), threading.Event()

    def meet(sock: socket.socket, address: str) -> None:
        try:
            process, said = _greet(sock, key, num_processes)
        except (OSError, EOFError, ValueError) as error:
            log.warning("%s does not join: %s", address, str(error) or "it left")
            sock.close()
            return
        finally:
            room.release()
        with lock:
            earlier = joined.get(process)  # a process that lost its connection comes again
            joined[process] = sock, said
            if len(joined) == num_processes - 1:
                full.set()
        if earlier is not None:
            earlier[0].close()

    listener.settimeout(RETRY_SECONDS)
    while not full.is_set():
        if time.monotonic() > deadline:
            missing = ", ".join(str(i) for i in range(1, num_processes) if i not in joined)
            raise TimeoutError(f"of {num_processes} processes these are missing: {missing}")
        try:
            sock, address = listener.accept()
        except OSError:  # nobody came, or somebody who has left already
            continue
        if room.acquire(blocking=False):
            threading.Thread(target=meet, args=(sock, f"{address[0]}:{address[1]}"), daemon=True).start()
        else:
            sock.close()
    links = []
    with lock:
        for process, (sock, said) in sorted(joined.items()):
            with contextlib.suppress(OSError):  # its link will notice
                sock.sendall(_tag(key, b"admits", said))
            keys = _tag(key, b"from 0", said), _tag(key, b"to 0", said)
            links.append(Link(sock, keys, f"process {process}", lost_seconds, max_bytes))
    return links


def _greet(sock: socket.socket, key: bytes, num_processes: int) -> tuple[int, bytes]:
    """Lets a peer prove that it knows the key. That this side knows it, it learns when all have joined.

    Returns:
        The peer's process, and what both sides said.

    Raises:
        ValueError: It does not know the key.
        OSError, EOFError: It left, or said nothing.
    """
    deadline = time.monotonic() + HELLO_SECONDS
    sock.settimeout(HELLO_SECONDS)
    nonce = secrets.token_bytes(NONCE_BYTES)
    sock.sendall(HELLO + nonce)
    reply = bytes(_read(sock, NUMBER.size + NONCE_BYTES, deadline))
    said = nonce + reply
    if not hmac.compare_digest(_read(sock, TAG_BYTES, deadline), _tag(key, b"joins", said)):
        raise ValueError("it does not know the key")
    (process,) = NUMBER.unpack_from(reply)
    if not 0 < process < num_processes:
        raise ValueError(f"it says that it is process {process}")
    return process, said


def join(
    address: tuple[str, int], key: bytes, process: int, deadline: float, lost_seconds: float, max_bytes: int
) -> Link:
    """Joins process 0; tries it again and again.

    Args:
        address: Where process 0 listens.
        key: The run's key.
        process: The number of this process.
        deadline: When to give up, in the time of time.monotonic().
        lost_seconds: See Link.
        max_bytes: See Link.

    Raises:
        TimeoutError: Process 0 has not admitted this process by the deadline.
    """
    while True:
        sock = None
        try:
            sock = socket.create_connection(address, HELLO_SECONDS)
            said = _introduce(sock, key, process, deadline)
            keys = _tag(key, b"to 0", said), _tag(key, b"from 0", said)
            return Link(sock, keys, "process 0", lost_seconds, max_bytes)
        except (OSError, EOFError, ValueError) as error:
            if sock is not None:
                sock.close()
            if time.monotonic() > deadline:
                where, why = f"{address[0]}:{address[1]}", str(error) or "it left"
                raise TimeoutError(f"process 0 at {where} did not admit process {process}: {why}") from None
        time.sleep(RETRY_SECONDS)


def _introduce(sock: socket.socket, key: bytes, process: int, deadline: float) -> bytes:
    """The other side of `_greet`. Waits until all have joined, and returns what both sides said."""
    hello = bytes(_read(sock, len(HELLO) + NONCE_BYTES, min(deadline, time.monotonic() + HELLO_SECONDS)))
    said = hello[len(HELLO) :] + NUMBER.pack(process) + secrets.token_bytes(NONCE_BYTES)
    sock.sendall(said[NONCE_BYTES:] + _tag(key, b"joins", said))
    tag = _read(sock, TAG_BYTES, deadline)
    if not (hello.startswith(HELLO) and hmac.compare_digest(tag, _tag(key, b"admits", said))):
        raise ValueError("it does not know the key")
    return said
