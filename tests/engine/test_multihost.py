"""Messages between hosts: what is in them, who may send them, and what happens when a host is lost."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import random
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from icarus_jax.engine import host_link, host_messages, host_team, multihost
from icarus_jax.engine.host_link import BEAT, CALL, FAILED, HEADER, TAG_BYTES, Link, admit, join
from icarus_jax.engine.host_messages import decode, encode
from tests.engine.measure_messages import step_batch

ROOT = Path(__file__).resolve().parents[2]
KEY = b"k" * 32
LOST, MOST = 1.0, 1 << 20
MASKS = np.zeros((4, 0), np.int32)


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return type(b) is np.ndarray and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return type(a) is type(b) and a == b


# ---- calls as bytes


@pytest.mark.parametrize("sampled", [False, True])
def test_a_step_is_the_same_on_the_other_side(sampled):
    batch = step_batch(4, sampled)
    for call in (("launch", batch.bucket, batch.step), ("sample", batch.variant, batch.sampling, MASKS)):
        assert same(call, decode(bytearray(encode(call))))


@pytest.mark.parametrize(
    "value",
    [
        ("copy_pages", [(1, 2), (3, 4)]),
        ("load_head", 1, {"q_proj": (np.ones((2, 3), np.float32), np.arange(6.0, dtype=np.float32))}),
        [None, True, 1.5, "é", [], (), {}, np.zeros((0, 3), np.int32), np.array(7, np.uint32)],
        np.array([0.0, -0.0, np.nan]),
        np.arange(8).astype(ml_dtypes.bfloat16),
        np.arange(12, dtype=np.int64).reshape(3, 4).T,
        np.full((5, 5), -1, np.int32),
        np.array([True, False]),
    ],
)
def test_every_kind_of_value(value):
    assert same(value, decode(bytearray(encode(value))))


def test_one_value_stands_for_all():
    assert len(encode(np.full((256, 4096), 7, np.int32))) < 100


@pytest.mark.parametrize("value", [object(), print, {1, 2}, np.array([print]), SimpleNamespace(a=1), 1j])
def test_what_is_not_data_is_not_sent(value):
    with pytest.raises(TypeError, match="cannot be sent"):
        encode([value])


def test_what_is_cut_off_or_garbage_is_an_error():
    batch = step_batch(1, True)
    message = encode(("launch", batch.bucket, batch.step, batch.sampling))
    for length in range(0, len(message), 97):
        with pytest.raises(ValueError, match="not a message"):
            decode(message[:length])
    with pytest.raises(ValueError, match="left over"):
        decode(message + b"\0")
    rng = random.Random(0)
    for _ in range(2000):
        spoilt = bytearray(message)
        for _ in range(rng.randint(1, 4)):
            spoilt[rng.randrange(600)] = rng.randrange(256)
        with contextlib.suppress(ValueError):
            decode(spoilt)


@pytest.mark.parametrize(
    "header",
    [
        b'["array","int32",[4611686018427387904],true]',  # would take all memory
        b'["array","int32",[-1],false]',
        b'["array","object",[1],false]',
        b'["array","O",[1],false]',
        b'["Popen",["sh"]]',
        b'["Bucket"]',
        b'{"a":1}',
        b"[" * 100_000,
        b"[]",
        b"[[1]]",
        b"\xff",
    ],
)
def test_headers_that_lie(header):
    with pytest.raises(ValueError, match="not a message"):
        decode(struct.pack("!I", len(header)) + header + bytes(16))


def test_nothing_unpickles():
    for file in [*(ROOT / "icarus_jax").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing"}, file


# ---- joining


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def join_all(listener, count=2, key=KEY, seconds=20.0, peers=()):
    """Process 0's links and those of the others. `peers` are called with the address before the others join."""
    address, deadline = listener.getsockname(), time.monotonic() + seconds
    with ThreadPoolExecutor(count) as pool:
        leader = pool.submit(admit, listener, KEY, count, deadline, LOST, MOST)
        opened = [peer(address) for peer in peers]
        others = [pool.submit(join, address, key, i, deadline, LOST, MOST) for i in range(1, count)]
        links = leader.result(), [other.result() for other in others]
    for sock in opened:
        sock.close()
    return links


def connected(data: bytes = b""):
    def peer(address):
        sock = socket.create_connection(address)
        sock.sendall(data)
        return sock

    return peer


def gone(address):
    sock = socket.create_connection(address)
    sock.close()
    return sock


def reflected(address):
    """Says what the listener says."""
    sock = socket.create_connection(address)
    sock.sendall(sock.recv(1000) * 3)
    return sock


def test_strangers_keep_nobody_from_joining(listener, caplog):
    """A port scan: some leave at once, some say something else, some say nothing."""
    noise = [gone, connected(), connected(b"GET / HTTP/1.1\r\n\r\n"), connected(bytes(1000)), reflected]
    begin = time.monotonic()
    leader, others = join_all(listener, 3, peers=noise * 5)
    assert time.monotonic() - begin < host_link.HELLO_SECONDS
    for i, (mine, theirs) in enumerate(zip(leader, others, strict=True), 1):
        mine.send(CALL, b"to %d" % i)
        theirs.send(BEAT)
        assert theirs.receive() == (CALL, b"to %d" % i) and mine.receive() == (BEAT, b"")
    assert "does not know the key" in caplog.text


def test_more_silent_strangers_than_there_is_room_for(listener, monkeypatch):
    monkeypatch.setattr(host_link, "HELLO_SECONDS", 0.5)
    monkeypatch.setattr(host_link, "MAX_PEERS", 4)
    join_all(listener, 2, peers=[connected()] * 12)


def test_who_never_comes_is_named(listener):
    with pytest.raises(TimeoutError, match=r"of 2 processes these are missing: 1$"):
        admit(listener, KEY, 2, time.monotonic() + 0.3, LOST, MOST)


@pytest.mark.parametrize("key, process", [(b"x" * 32, 1), (KEY, 2), (KEY, 0)])
def test_a_wrong_process_does_not_join(listener, key, process):
    deadline = time.monotonic() + 1
    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(admit, listener, KEY, 2, deadline, LOST, MOST)
        with pytest.raises(TimeoutError, match=r"process 0 at 127\.0\.0\.1:.* did not admit process"):
            join(listener.getsockname(), key, process, deadline, LOST, MOST)
        with pytest.raises(TimeoutError, match="missing: 1"):
            leader.result()


def test_a_false_process_0_is_not_believed(listener):
    """It knows no key, so it cannot say the last word."""

    def impostor():
        with listener.accept()[0] as sock:
            sock.sendall(host_link.HELLO + bytes(32))
            sock.sendall(sock.recv(1000)[-32:])

    threading.Thread(target=impostor, daemon=True).start()
    sock = socket.create_connection(listener.getsockname())
    with sock, pytest.raises(ValueError, match="does not know the key"):
        host_link._introduce(sock, KEY, 1, time.monotonic() + 10)


# ---- messages on their way


def wired() -> tuple[Link, Link, socket.socket, socket.socket]:
    """Two links, and the ends of the wires between them: what a link sends comes out, and what goes in it receives."""
    (a, wire_a), (b, wire_b) = socket.socketpair(), socket.socketpair()
    make = lambda sock, keys, other: Link(sock, keys, other, LOST, MOST)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:  # a Unix socket has no TCP options
        patch.setattr(socket.socket, "setsockopt", lambda *_: None)
        return make(a, (b"1", b"2"), "process 1"), make(b, (b"2", b"1"), "process 0"), wire_a, wire_b


@pytest.mark.parametrize("at", [0, 8, 9, 20, -1])  # the kind, the length, the tag, the body
def test_a_changed_bit_is_noticed(at):
    a, b, wire_a, wire_b = wired()
    a.send(CALL, b"a body")
    frame = bytearray(wire_a.recv(1000))
    frame[at] ^= 1
    wire_b.sendall(frame + bytes(1))
    with pytest.raises(ConnectionError, match=r"process 0 did not write|process 0 said nothing"):
        b.receive()


def test_a_replayed_swapped_or_reflected_message_is_noticed():
    for which in ("again", "later first", "back"):
        a, b, wire_a, wire_b = wired()
        a.send(CALL, b"1")
        one = wire_a.recv(1000)
        a.send(CALL, b"2")
        two = wire_a.recv(1000)
        target, frames = {"again": (b, [one, one]), "later first": (b, [two]), "back": (a, [one])}[which]
        for frame in frames:
            (wire_b if target is b else wire_a).sendall(frame)
        if which == "again":
            assert b.receive() == (CALL, b"1")
        with pytest.raises(ConnectionError, match="did not write, or not now"):
            target.receive()


def test_a_message_that_is_too_large_is_refused_before_it_is_read():
    _, b, _, wire_b = wired()
    wire_b.sendall(HEADER.pack(CALL, MOST + 1))
    with pytest.raises(ConnectionError, match=f"process 0 sent a message of {MOST + 1} bytes; at most {MOST}"):
        b.receive()


def test_what_is_too_large_is_not_sent(monkeypatch):
    monkeypatch.setattr(host_messages, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"a message of .* bytes; other hosts take 1000"):
        encode(np.arange(1000))


@pytest.mark.parametrize("sent", [0, 5, HEADER.size, HEADER.size + TAG_BYTES + 2])
@pytest.mark.parametrize("closed", [True, False])
def test_an_end_that_is_cut_off_or_silent(sent, closed):
    a, b, wire_a, wire_b = wired()
    a.send(CALL, b"a body")
    wire_b.sendall(wire_a.recv(1000)[:sent])
    if closed:
        wire_b.close()
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="process 0 is gone" if closed else r"process 0 said nothing for 1 s"):
        b.receive()
    assert time.monotonic() - begin < LOST + 1


def test_an_end_that_takes_nothing():
    a, *_wires = wired()
    with pytest.raises(ConnectionError, match=r"process 1 took nothing for 1 s"):
        a.send(CALL, bytes(50_000_000))


def test_a_large_message_may_take_longer_than_silence():
    a, b, wire_a, wire_b = wired()
    body = np.random.default_rng(0).bytes(MOST)

    def slow_wire():
        left = HEADER.size + TAG_BYTES + len(body)
        while left:
            time.sleep(0.2)  # nine times, and LOST is 1 s
            data = wire_a.recv(min(left, 120_000), socket.MSG_WAITALL)
            wire_b.sendall(data)
            left -= len(data)

    with ThreadPoolExecutor(2) as pool:
        begin = time.monotonic()
        done = [pool.submit(slow_wire), pool.submit(a.send, CALL, body)]
        assert b.receive() == (CALL, body) and time.monotonic() - begin > LOST
        assert [future.result() for future in done] == [None, None]


# ---- the team


@pytest.fixture
def ends(monkeypatch):
    """What would end this process."""
    said = []
    monkeypatch.setattr(host_team, "_exit", lambda: said.append("now"))
    monkeypatch.setattr(host_team, "_exit_after", lambda seconds, reason="": said.append(seconds))
    monkeypatch.setattr(host_team.atexit, "register", lambda _: None)
    return said


def wait_for(ready, seconds=10.0):
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.01)


class StuckRunner:
    """`launch` waits for a host that will not come."""

    def __init__(self):
        self.entered, self.leave = threading.Event(), threading.Event()

    def launch(self, batch):
        self.entered.set()
        self.leave.wait(60)

    def copy_pages(self, copies):
        return "copied"


@pytest.mark.parametrize("how", ["gone", "silent", "failed"])
def test_a_step_raises_when_a_host_is_lost(listener, ends, how, caplog):
    (link,), (other,) = join_all(listener)
    runner = StuckRunner()
    leader = multihost.Leader(runner, host_team.Team([link], True, LOST))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(leader.launch, "a batch")
        assert runner.entered.wait(10)
        begin = time.monotonic()
        if how == "gone":
            other.close()
        if how == "failed":
            other.send(FAILED, b"out of memory")
        want = {"gone": "process 1 is gone", "silent": "said nothing", "failed": "process 1 says: out of memory"}[how]
        with pytest.raises(ConnectionError, match=want):
            call.result(20)
        assert time.monotonic() - begin < LOST + 1
    assert ends == [host_team.GRACE_SECONDS]
    with pytest.raises(ConnectionError, match=want):
        leader.copy_pages([(1, 2)])
    assert len([r for r in caplog.records if r.levelname == "CRITICAL"]) == 1 and want in caplog.text
    runner.leave.set()


def test_calls_are_made_on_both_sides(listener, ends):
    """And beats keep a link alive on which nothing else is said."""
    (link,), (other,) = join_all(listener)
    theirs, seen = host_team.Team([other], False, LOST), []
    runner = SimpleNamespace(copy_pages=seen.append, close=lambda: seen.append("closed"))
    team = host_team.Team([link], True, LOST)
    leader = multihost.Leader(StuckRunner(), team)
    assert leader.copy_pages([]) is None
    assert leader.copy_pages([(1, 2)]) == "copied"
    time.sleep(3 * LOST)
    assert leader.copy_pages([(3, 4)]) == "copied"
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(multihost.Worker(runner, theirs).work)
        wait_for(lambda: len(seen) == 2)
        team._leave()
        work.result(10)
    assert seen == [[(1, 2)], [(3, 4)], "closed"] and not team.failure and not theirs.failure
    other.close()
    time.sleep(0.1)
    assert not team.failure and set(ends) == {host_team.END_SECONDS}


@pytest.mark.parametrize("message", [encode(("__init__", 1)), encode(("execute", 1)), b"garbage"])
def test_a_worker_that_fails_ends_all(listener, ends, message):
    (link,), (other,) = join_all(listener)
    team, theirs = host_team.Team([link], True, LOST), host_team.Team([other], False, LOST)
    team.send(message)
    multihost.Worker(SimpleNamespace(execute=lambda batch: 1 / 0), theirs).work()
    wait_for(lambda: team.failure)
    assert "process 1 says: process 0 has failed" in team.failure  # jax.process_index() is 0 in this test
    assert "now" in ends and host_team.GRACE_SECONDS in ends


def test_where_process_0_listens():
    assert multihost._listening_address("localhost") in ("127.0.0.1", "::1")
    assert multihost._listening_address("127.0.0.1") == "127.0.0.1"
    own = multihost._own_address()
    assert multihost._listening_address(own) == own
    assert multihost._listening_address("192.0.2.1") == own  # an address of nobody: of a proxy, perhaps
    assert multihost._listening_address("") == own


@pytest.mark.parametrize("limits", [{"join_seconds": 0.0}, {"lost_seconds": 0.5}])
def test_limits_that_make_no_sense(limits):
    with pytest.raises(ValueError, match="the first is above 0, the second at least 1"):
        multihost.initialize("", 1, 0, **limits)
