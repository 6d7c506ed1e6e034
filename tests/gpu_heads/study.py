"""Runs the study behind docs/heads.md (runs.py), several commands at a time: minutes on a GPU, days on CPUs.

    python -m tests.gpu_heads.study --data=DIR --out=DIR --seconds=480 --workers=8 tuned original left_out folds general

What has ended is not run again, and a training that was stopped goes on from its last checkpoint: the same command
does the rest. tests.gpu_heads.report makes the table of what is there. Exit status: how many commands failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.gpu_heads.runs import CHATS, GROUPS, Job, Study

ROOT = Path(__file__).resolve().parents[2]
GRACE = 20.0  # seconds in which a training that is stopped writes its checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line, and runs what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; none: all", metavar="GROUP")
    parser.add_argument("--data", type=Path, required=True, help=f"the folder of the data, of {CHATS} and of texts/")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--seconds", type=float, default=480, help="when to stop what still runs")
    parser.add_argument("--workers", type=int, default=8, help="commands at a time")
    parser.add_argument("--flag", action="append", default=[], help="a flag of all commands")
    parser.add_argument("--training", action="append", default=[], help="a flag of all trainings")
    parser.add_argument("--answering", action="append", default=[], help="a flag of all evaluations")
    args = parser.parse_args(argv)
    if wrong := set(args.groups) - set(GROUPS):
        parser.error(f"no group {wrong.pop()!r}; there are {', '.join(GROUPS)}")
    deadline = time.monotonic() + args.seconds
    study = Study(
        args.data.resolve(), args.out.resolve(), tuple(args.flag), tuple(args.training), tuple(args.answering)
    )
    jobs = [job for group in args.groups or GROUPS for job in study.jobs(group)]
    return run(jobs, study.out / "logs", args.workers, deadline)


def run(jobs: Sequence[Job], logs: Path, workers: int, deadline: float) -> int:
    """Runs jobs whose needs are there, in their order, until all have ended or the time is over.

    Args:
        jobs: The jobs.
        logs: The folder of what they print.
        workers: How many run at a time.
        deadline: When those that still run are stopped, as time.monotonic() counts.

    Returns:
        How many failed. What was stopped, or could not begin, has not failed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if not job.output.exists()]
    running: dict[str, tuple[Job, subprocess.Popen, float]] = {}
    failed = 0
    try:
        while waiting or running:
            failed += _reap(running, logs)
            if time.monotonic() > deadline:
                break
            ready = [job for job in waiting if all(need.exists() for need in job.needs)]
            if not ready and not running:
                break  # what they need has failed
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                running[job.name] = (job, _start(job, logs), time.monotonic())
            time.sleep(0.1)
    finally:
        _stop([process for _, process, _ in running.values()])
    for name, (job, process, began) in list(running.items()):
        if process.returncode == 0 and _ended(job, 0, logs, time.monotonic() - began):
            del running[name]  # it ended while it was told to stop
    left = [job.name for job in waiting] + list(running)
    print(f"{len(jobs) - len(left) - failed} of {len(jobs)} are there, {failed} failed; left: {', '.join(left) or '-'}")
    return failed


def _reap(running: dict[str, tuple[Job, subprocess.Popen, float]], logs: Path) -> int:
    """Removes the jobs that have ended. Returns how many of them failed."""
    ended = [name for name, (_, process, _) in running.items() if process.poll() is not None]
    jobs = [running.pop(name) for name in ended]
    return sum(not _ended(job, process.returncode, logs, time.monotonic() - began) for job, process, began in jobs)


def _start(job: Job, logs: Path) -> subprocess.Popen:
    print(f"{job.name}: begins", flush=True)
    with (logs / f"{job.name}.out").open("w") as out, (logs / f"{job.name}.log").open("a") as log:
        return subprocess.Popen(job.command(), cwd=ROOT, stdout=out, stderr=log, env=os.environ)


def _ended(job: Job, status: int, logs: Path, seconds: float) -> bool:
    """Says how a job ended, and keeps the figures that it printed. Returns whether it ended well."""
    printed = (logs / f"{job.name}.out").read_text(errors="replace").splitlines()
    if status == 0 and not job.output.exists() and printed:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        job.output.write_text(printed[-1] + "\n")
    well = status == 0 and job.output.exists()
    said = (logs / f"{job.name}.log").read_text(errors="replace").splitlines()
    why = "" if well else f"status {status}: {' | '.join(said[-3:])}"
    print(f"{job.name}: {seconds:.0f} s {why}", flush=True)
    return well


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    until = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
