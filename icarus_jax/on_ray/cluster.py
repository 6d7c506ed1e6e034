"""The Ray cluster that a program uses: its own on this machine, or one that is there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ml_collections import ConfigDict

from icarus_jax.errors import UsageError

OBJECT_STORE_BYTES = 256 << 20  # of a cluster on this machine: requests and answers are small


@contextmanager
def cluster(address: str, num_cpus: float) -> Iterator[None]:
    """Connects to a cluster while the context is entered.

    Args:
        address: the cluster's address, or 'auto'; '': a cluster on this machine, which ends with the context.
        num_cpus: how many CPUs the program's actors ask for. A cluster on this machine has as many at least, so that
            they can start on a machine with fewer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send its makers what the cluster is used for
    if address:
        ray.init(address, log_to_driver=True)
    else:
        os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's own, 15, the engines come after all else
        cpus = max(os.cpu_count() or 1, int(num_cpus) + 1)
        ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES)
    try:
        yield
    finally:
        ray.shutdown()


def usage_error_in(message: str) -> str:
    """Returns what the last UsageError of another process says; '' if there is none.

    Args:
        message: What Ray says, with the traceback of that process.
    """
    return (re.findall(r"^.*UsageError: (.+)$", message, re.MULTILINE) or [""])[-1]


def needs(section: ConfigDict) -> dict[str, Any]:
    """Returns what an actor with an engine asks the cluster for.

    Args:
        section: config.ray, with num_cpus, num_gpus and resources (NAME=NUMBER,NAME=NUMBER, such as TPU=4).

    Raises:
        UsageError: resources has another form.
    """
    found = {}
    for part in filter(None, section.resources.split(",")):
        match = re.fullmatch(r"([^=]+)=(\d+(?:\.\d+)?)", part.strip())
        if not match:
            raise UsageError(f"config.ray.resources: {part!r} is not of the form NAME=NUMBER, such as TPU=4")
        found[match[1]] = float(match[2])
    return {"num_cpus": section.num_cpus, "num_gpus": section.num_gpus, "resources": found}
