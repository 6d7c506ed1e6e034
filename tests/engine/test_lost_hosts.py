"""Two processes as two hosts, in network namespaces with a router between them: what is lost, and when all has ended.

Each test prints a line with what it saw: pytest -m full -s tests/engine/test_lost_hosts.py. It takes a root user who
may make network namespaces. All traffic stays in them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from icarus_jax.engine.host_team import GRACE_SECONDS
from tests import tiny
from tests.engine.host_program import TOKENS

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

LOST = 4.0  # config.distributed.lost_seconds
SOON = LOST + GRACE_SECONDS + 3  # all has ended by then, on a busy machine
PORT = 31_415
ADDRESSES = ("10.77.1.2", "10.77.2.2")
# A run's own /etc/hosts: gloo listens on the address that the host's name stands for.
ENTER = (
    'printf "%s\\n" "127.0.0.1 localhost" "$0 $(hostname)" >"$1" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Network:
    """Hosts 0 and 1, and a router that can lose what it should pass on."""

    def __init__(self):
        self.hosts = [f"icarus-{os.getpid()}-{i}" for i in range(2)]
        self.router = f"icarus-{os.getpid()}-r"

    def __enter__(self):
        for name in (*self.hosts, self.router):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "dev", "lo", "up")
        for i, (name, address) in enumerate(zip(self.hosts, ADDRESSES, strict=True)):
            gateway = address.rpartition(".")[0] + ".1"
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{i}", "netns", self.router)
            for where, device, own in ((name, "eth0", address), (self.router, f"port{i}", gateway)):
                ip("-n", where, "addr", "add", f"{own}/24", "dev", device)
                ip("-n", where, "link", "set", "dev", device, "up")
            ip("-n", name, "route", "add", "default", "via", gateway)
        ip("netns", "exec", self.router, "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
        return self

    def __exit__(self, *_):
        for name in (*self.hosts, self.router):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def lose(self, host: int) -> None:
        """From now on nothing arrives at a host, and nobody is told."""
        ip("-n", self.router, "route", "add", "blackhole", f"{ADDRESSES[host]}/32")

    def slow(self, rate: str) -> None:
        for i in range(2):
            limit = ("qdisc", "add", "dev", f"port{i}", "root", "tbf", "rate", rate, "burst", "4k", "latency", "400ms")
            subprocess.run(["tc", "-n", self.router, *limit], check=True, capture_output=True)


def namespaces_work() -> bool:
    if os.getuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        return False
    try:
        with Network():
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    if not namespaces_work():
        pytest.skip("no network namespaces can be made here")
    folder = tmp_path_factory.mktemp("hosts")
    engine = {"mesh": "1x2", "page_size": 4, "num_pages": 64, "max_num_seqs": 1, "max_num_batched_tokens": 32}
    return {
        "trunk": tiny.tiny_model("llama", folder, num_hidden_layers=2),
        "engine": {**engine, "max_model_len": 64},
        "folder": folder,
    }


class Host:
    """A process on one of the hosts, and what it has said."""

    def __init__(self, network: Network, number: int, settings: dict, idle: bool):
        distributed = {"coordinator": f"{ADDRESSES[0]}:{PORT}", "num_processes": 2, "process_id": number}
        said = {"trunk": settings["trunk"], "engine": settings["engine"], "idle": idle}
        said["distributed"] = {**distributed, "lost_seconds": LOST, "join_seconds": 300.0}
        names = settings["folder"] / f"hosts{number}"
        program = [sys.executable, str(Path(__file__).with_name("host_program.py")), json.dumps(said)]
        enter = ["ip", "netns", "exec", network.hosts[number], "sh", "-c", ENTER, ADDRESSES[number], str(names)]
        more = {"XLA_FLAGS": "", "ICARUS_CACHE": str(settings["folder"] / "cache"), "PYTHONUNBUFFERED": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([*enter, *program], env=os.environ | more, **pipes)
        self.answers: list[tuple[float, float, list[int]]] = []
        self.errors: list[str] = []
        self.ended = 0.0
        self.threads = [threading.Thread(target=f) for f in (self._answers, self._errors)]
        for thread in self.threads:
            thread.start()

    def _answers(self):
        for line in self.process.stdout:
            if line.startswith("answer "):  # gloo writes here, too
                self.answers.append(tuple(json.loads(line.removeprefix("answer "))))
        self.process.wait()
        self.ended = time.time()

    def _errors(self):
        self.errors += list(self.process.stderr)

    def end(self, seconds: float) -> None:
        for thread in self.threads:
            thread.join(seconds)
        assert not any(thread.is_alive() for thread in self.threads), "it has not ended"

    @property
    def last_word(self) -> str:
        ours = [line for line in self.errors if "the run on several hosts ends" in line]
        assert len(ours) <= 1, ours
        return ours[0].partition("] ")[2].strip() if ours else ""


def wait_for(ready, hosts, seconds=200.0):
    until = time.time() + seconds
    while not ready():
        for host in hosts:
            assert host.process.poll() is None and time.time() < until, [h.errors for h in hosts]
        time.sleep(0.1)


FAULTS = ["killed 1", "killed 0", "stopped 1", "stopped 0", "cut both", "cut to 1", "cut to 0", "killed 1 idle"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_lost_ends_all(settings, fault):
    what, _, which = fault.partition(" ")
    idle = which.endswith("idle")
    with Network() as network:
        hosts = [Host(network, i, settings, idle) for i in range(2)]
        try:
            wait_for(lambda: len(hosts[0].answers) >= (1 if idle else 3), hosts)
            begin = time.time()
            victims = []
            if what == "cut":
                for host in (0, 1) if which == "both" else (int(which[-1]),):
                    network.lose(host)
            else:
                victims = [hosts[int(which[0])]]
                victims[0].process.send_signal(signal.SIGKILL if what == "killed" else signal.SIGSTOP)
            others = [host for host in hosts if host not in victims]
            for host in others:
                host.end(SOON + 20)
            if what == "stopped":  # it wakes up, and sees that it is alone
                woken = time.time()
                victims[0].process.send_signal(signal.SIGCONT)
                victims[0].end(SOON)
        finally:
            for host in hosts:
                host.process.kill()
        for host in hosts:
            host.end(30)
    report = [
        f"process {i}: {h.ended - begin:.1f} s, exit {h.process.returncode}, {h.last_word or h.errors[-1:]}"
        for i, h in enumerate(hosts)
        if h in others
    ]
    if what == "stopped":
        report.append(f"the stopped one {victims[0].ended - woken:.1f} s after it woke: {victims[0].last_word}")
    print(f"\n{fault}: {'; '.join(report)}")
    for host in others:
        assert host.ended - begin < SOON, report
        # JAX watches process 0, too. In the others it may be faster: it aborts them and prints a stack.
        aborted = host is hosts[1] and host.process.returncode == -signal.SIGABRT
        assert aborted or (host.process.returncode == 1 and host.last_word), host.errors


def test_what_is_slow_goes_on(settings):
    """A slow wire, then a process that is stopped most of the time: the same answers, later."""
    with Network() as network:
        hosts = [Host(network, i, settings, False) for i in range(2)]
        answers = hosts[0].answers
        try:
            wait_for(lambda: len(answers) >= 4, hosts)
            network.slow("200kbit")
            first = len(answers)
            wait_for(lambda: len(answers) >= first + 3, hosts)
            slow_wire = answers[first + 1][1]
            stopping = threading.Event()

            def pause():
                while not stopping.is_set():
                    hosts[1].process.send_signal(signal.SIGSTOP)
                    time.sleep(1.0)
                    hosts[1].process.send_signal(signal.SIGCONT)
                    time.sleep(0.1)

            thread = threading.Thread(target=pause)
            thread.start()
            second, begin = len(answers), time.time()
            wait_for(lambda: len(answers) >= second + 2 and time.time() > begin + 2 * LOST, hosts)
            stopping.set()
            thread.join()
        finally:
            for host in hosts:
                host.process.kill()
        for host in hosts:
            host.end(30)
    quick, slow_process = answers[2][1], answers[second + 1][1]
    print(
        f"\nslow: an answer of {TOKENS} tokens took {quick:.2f} s, at 200 kbit/s {slow_wire:.2f} s, "
        f"and with process 1 stopped for 10 of 11 parts of the time {slow_process:.2f} s"
    )
    assert len({tuple(tokens) for _, _, tokens in answers}) == 1
    assert quick < slow_wire < slow_process


def test_a_process_that_never_comes(settings):
    """One line at the deadline, though JAX waits for it."""
    said = {"trunk": settings["trunk"], "engine": settings["engine"], "idle": True}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    said["distributed"] = {"coordinator": f"127.0.0.1:{port}", "num_processes": 2, "join_seconds": 4.0}
    program = [sys.executable, str(Path(__file__).with_name("host_program.py")), json.dumps(said)]
    begin = time.time()
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    print(f"\nnobody joins in 4 s: {time.time() - begin:.1f} s with imports, exit {done.returncode}")
    assert done.returncode == 1
    assert "have not all joined in 4 s: is each process started" in done.stderr.splitlines()[-1]
