"""Which heads have been loaded and unloaded while the replicas run, so that all of them serve the same ones."""

from __future__ import annotations

import dataclasses
import json
import time

from icarus_jax.server.body import parse
from icarus_jax.server.head_routes import LoadHead, LoadLoraAdapter, UnloadHead, UnloadLoraAdapter

LOAD, UNLOAD = "/v1/load_head", "/v1/unload_head"
HEAD_PATHS = (LOAD, UNLOAD, "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


@dataclasses.dataclass(frozen=True)
class HeadChange:
    """A head that has been loaded or unloaded.

    Attributes:
        name: the head's name as a model.
        path: the endpoint that makes the change again, whatever was there before: LOAD or UNLOAD.
        body: the body for it.
    """

    name: str
    path: str
    body: bytes

    @classmethod
    def of(cls, path: str, body: bytes) -> HeadChange:
        """Reads it from a request that a replica has carried out.

        Args:
            path: the endpoint, one of HEAD_PATHS.
            body: the body of the request.
        """
        if path == LOAD:
            return cls(parse(LoadHead, body).name, LOAD, body)
        if path == UNLOAD:
            return cls(parse(UnloadHead, body).name, UNLOAD, body)
        if path == "/v1/load_lora_adapter":
            load = parse(LoadLoraAdapter, body)
            again = {"name": load.lora_name, "path": load.lora_path}
            return cls(load.lora_name, LOAD, json.dumps(again).encode())
        name = parse(UnloadLoraAdapter, body).lora_name
        return cls(name, UNLOAD, json.dumps({"name": name}).encode())


class HeadLog:
    """The changes of heads, numbered in order; of each head the last one. A deployment of one replica.

    A replica that starts carries out all of them, one that has missed some carries out those. If this process dies, the
    changes are forgotten: replicas that start later serve the heads of the config only. The numbers begin with the time
    of the start, so that those of the next process are above all that replicas have seen.
    """

    def __init__(self) -> None:
        """Starts without changes."""
        self._last: dict[str, tuple[int, HeadChange]] = {}
        self._version = time.time_ns()

    def add(self, change: HeadChange) -> int:
        """Notes a change, and returns its number.

        Args:
            change: what a replica has carried out.
        """
        self._version += 1
        self._last[change.name] = self._version, change
        return self._version

    def since(self, version: int) -> tuple[int, list[HeadChange]]:
        """Returns the number of the last change, and the changes after a number, in order.

        Args:
            version: the number.
        """
        later = sorted((entry for entry in self._last.values() if entry[0] > version), key=lambda entry: entry[0])
        return self._version, [change for _, change in later]
