"""Batch runs on the double that are killed at random moments, or run out of disk. A process of its own: it forks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from icarus_jax.evaluation import batch_file, result_file
from icarus_jax.evaluation.batch import run
from icarus_jax.server.app import create_app
from icarus_jax.server.head_loader import HeadLoader
from tests import doubles

TOKENIZER = doubles.byte_level_tokenizer()


@contextlib.contextmanager
def serve():
    engine = doubles.FakeEngine(len(TOKENIZER), step_seconds=0.0005)
    engine.start()
    yield create_app(engine, TOKENIZER, (), HeadLoader(engine, "trunk")), 4
    engine.shutdown(drain=False)


class SlowDisk:
    """The module os for result_file.py, with writes of 80 bytes at most that take a while."""

    def __getattr__(self, name: str):
        return getattr(os, name)

    def write(self, fd: int, data: bytes) -> int:
        time.sleep(0.0002)
        return os.write(fd, data[:80])


def fork(requests: Path, out: Path, file_bytes: int | None = None) -> int:
    """Answers the requests in a child process. Returns its id."""
    child = os.fork()
    if child:
        return child
    result_file.os = SlowDisk()
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    code = 1
    try:
        run(batch_file.batch_evaluation(requests, {}), out, serve)
        code = 0
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def kill_at(child: int, out: Path, size: int) -> None:
    """Kills a run once its result file has reached a size."""
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size >= size) and time.monotonic() < deadline:
        time.sleep(0.0001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main() -> None:
    """Kills a run at random sizes of its file, and finishes it; prints what each killed run had left."""
    requests, folder, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    assert os.waitpid(fork(requests, folder / "whole.jsonl"), 0)[1] == 0
    size = (folder / "whole.jsonl").stat().st_size
    rng, left = random.Random(0), []
    for number in range(rounds):
        out = folder / f"{number}.jsonl"
        kill_at(fork(requests, out), out, 1 if number == 0 else rng.randrange(size))
        left.append(out.read_bytes().decode())
        assert os.waitpid(fork(requests, out), 0)[1] == 0
    full = folder / "full.jsonl"
    assert os.waitpid(fork(requests, full, size // 2), 0)[1] != 0
    left.append(full.read_bytes().decode())
    assert os.waitpid(fork(requests, full), 0)[1] == 0
    print(json.dumps(left))


if __name__ == "__main__":
    main()
