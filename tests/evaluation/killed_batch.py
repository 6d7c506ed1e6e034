"""Batch runs that are killed at random moments, or run out of disk. A process of its own: it forks.

    python -m tests.evaluation.killed_batch double REQUESTS FOLDER ROUNDS    the double; for test_batch_file.py
    python -m tests.evaluation.killed_batch real FOLDER KILLS                launch/evaluate.py, SmolLM2 and two heads

The second command kills one run KILLS times, and each time the same command goes on with its file. It prints after how
many lines each kill came, and at the end how many lines are lost, doubled or other than those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from icarus_jax.cli.paths import program
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


def double(requests: Path, folder: Path, rounds: int) -> None:
    """Kills a run on the double at random sizes of its file, and finishes it; prints what each killed run had left."""
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


# ---- the real program

MODELS = ("smollm2-135m-instruct", "intent", "sql")
ENGINE = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256, "num_pages": 256}


def ask(number: int, rng: random.Random) -> dict:
    """Makes a line of a batch file. The lengths of the answers differ, so that they come one by one."""
    prompt = f"Question {number}: what is {rng.randrange(1000)} times {rng.randrange(1000)}, and why?"
    tokens = {"max_tokens": rng.randrange(2, 24), "temperature": 0, "ignore_eos": True}
    body = {"model": MODELS[number % len(MODELS)], "messages": [{"role": "user", "content": prompt}], **tokens}
    return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def evaluate(requests: Path, out: Path) -> subprocess.Popen:
    """Starts launch/evaluate.py on a batch file."""
    sizes = [f"--config.engine.{name}={value}" for name, value in ENGINE.items()]
    files = [f"--config.data.path={requests}", f"--config.out={out}", f"--config.models={','.join(MODELS)}"]
    with out.with_suffix(".log").open("a") as log:
        args = [*program("evaluate"), "--config=evaluate.py:batch", *files, *sizes]
        return subprocess.Popen(args, stdout=log, stderr=log)


def kill_after(running: subprocess.Popen, out: Path, lines: int, delay: float) -> None:
    """Kills a run some seconds after its file has reached a number of lines."""
    while not (out.exists() and out.read_bytes().count(b"\n") >= lines):
        assert running.poll() is None, f"it ended before it was killed: {out.with_suffix('.log')}"
        time.sleep(0.01)
    time.sleep(delay)
    running.kill()
    assert running.wait() == -signal.SIGKILL, "it ended before it was killed"


def answers(out: Path) -> dict[str, object]:
    """Returns what each line answers, by custom_id."""
    lines = [json.loads(line) for line in out.read_bytes().splitlines()]
    return {line["custom_id"]: line["response"]["body"]["choices"] for line in lines}


def real(folder: Path, kills: int) -> None:
    """Kills launch/evaluate.py again and again, lets it finish, and compares the answers with an undisturbed run's."""
    rng, begin, count = random.Random(0), time.monotonic(), 16 * kills
    requests, whole, out = folder / "requests.jsonl", folder / "whole.jsonl", folder / "killed.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    requests.write_text("".join(json.dumps(ask(i, rng)) + "\n" for i in range(count)))
    assert evaluate(requests, whole).wait() == 0, f"it failed: {whole.with_suffix('.log')}"
    kept, vanished, torn = b"", 0, 0
    for number in range(kills):
        kill_after(evaluate(requests, out), out, kept.count(b"\n") + rng.randrange(1, 12), rng.uniform(0, 0.5))
        left = out.read_bytes()
        vanished += not left.startswith(kept)
        torn += not left.endswith(b"\n")
        kept = left[: left.rfind(b"\n") + 1]
        print(f"kill {number + 1} after {len(kept.splitlines())} of {count} lines", flush=True)
    assert evaluate(requests, out).wait() == 0, f"it failed: {out.with_suffix('.log')}"
    vanished += not out.read_bytes().startswith(kept)
    seen = Counter(json.loads(line)["custom_id"] for line in out.read_bytes().splitlines())
    expected, found = answers(whole), answers(out)
    result = {
        "kills": kills,
        "torn_lines": torn,
        "lines": count,
        "lost": len(expected.keys() - found.keys()) + vanished,
        "doubled": sum(times > 1 for times in seen.values()),
        "different": sum(found[name] != expected[name] for name in expected.keys() & found.keys()),
        "seconds": round(time.monotonic() - begin),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "real":
        real(Path(sys.argv[2]).absolute(), int(sys.argv[3]))
    else:
        double(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
