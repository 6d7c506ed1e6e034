"""The heads that come and go while the server runs: where each comes from, and which folders one may come from."""

from __future__ import annotations

import logging
import os
import pathlib
import re
import threading
from collections.abc import Iterable, Mapping

from icarus_jax.engine.engine import Engine
from icarus_jax.errors import RequestError
from icarus_jax.scheduling.registry import Model
from icarus_jax.weights.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from icarus_jax.weights.peft import read_head

log = logging.getLogger(__name__)

NAME = re.compile(r"[\w.:/@-]{1,128}")


class UnknownHead(ValueError):
    """No head of this name is served."""


class HeadLoader:
    """Loads and unloads heads; thread-safe, one at a time.

    trunk_identity: the trunk's (checkpoint.py), or None: adapters are then not asked which one they belong to.
    sources: where the models of the start come from. folders: what `find` may look into.
    """

    def __init__(
        self,
        engine: Engine,
        trunk_name: str,
        trunk_identity: str | None = None,
        sources: Mapping[str, str] | None = None,
        folders: Iterable[str | pathlib.Path] = (),
    ):
        self.engine = engine
        self.trunk_name = trunk_name
        self.folders = tuple(_real(pathlib.Path(folder).expanduser()) for folder in folders)
        self.trunk_identity = trunk_identity
        self._sources = dict(sources or {})
        self._lock = threading.Lock()

    def source(self, name: str) -> str:
        """Where a model's weights come from; its own name if nobody said."""
        return self._sources.get(name, name)

    def find(self, path: str) -> pathlib.Path:
        """The real folder of an adapter that a client names; a relative path counts from the configured folders.

        Raises PermissionError if it, or a file in it, lies outside of them, symlinks followed; FileNotFoundError.
        """
        places = [_real(folder / path) for folder in self.folders]  # an absolute path stands for itself
        allowed = [place for place in places if self._is_inside(place)]
        if not allowed:
            raise PermissionError(f"{path[:256]!r} is outside the folders that heads may be loaded from")
        found = next((place for place in allowed if (place / CONFIG_FILE).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path[:256]!r} is no adapter: it has no {CONFIG_FILE} (a PEFT folder holds it)")
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not self._is_inside(_real(found / file)):
                raise PermissionError(f"{path[:256]!r}: {file} is a link to outside the folders that heads lie in")
        return found

    def _is_inside(self, path: pathlib.Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self.folders)

    def load(self, name: str, source: str, kv: str | None = None, pinned: bool = False, replace: bool = True) -> Model:
        """Serves the adapter in `source` as `name`; blocks until it is. With `replace`, in place of what has the name.

        kv: 'shared', 'activated' or 'isolated'; None: as adapters.read_head has it. Raises ValueError, and if the name
        is at fault its subclass RequestError with the field 'name'.
        """
        if not NAME.fullmatch(name):
            message = f"{name[:64]!r} cannot name a head: 1 to 128 letters, digits and any of - _ . : / @"
            raise RequestError(message, "name")
        with self._lock:
            if name == self.trunk_name:
                raise RequestError(f"{name!r} is the trunk's name; give the head another", "name")
            if not replace and name in self.engine.models:
                raise RequestError(f"{name!r} is loaded already, from {self.source(name)}", "name")
            head, factors = read_head(
                name, source, kv, self.engine.model_config, trunk_identity=self.trunk_identity, pinned=pinned
            )
            self.engine.load_head(head, factors)
            self._sources[name] = source
            log.info("head %s: loaded from %s as kv='%s'", name, source, head.kv)
            return self.engine.models[name]

    def unload(self, name: str) -> None:
        """Serves a head no longer; requests in flight finish. Raises RequestError for the trunk, UnknownHead."""
        with self._lock:
            if name == self.trunk_name:
                raise RequestError(f"{name!r} is the trunk; it cannot be unloaded", "name")
            if name not in self.engine.models:
                raise UnknownHead(f"the head {name[:64]!r} is not served")
            self.engine.unload_head(name)
            self._sources.pop(name, None)
            log.info("head %s: unloaded", name)


def _real(path: pathlib.Path) -> pathlib.Path:
    """The path with every link followed, also where nothing lies."""
    return pathlib.Path(os.path.realpath(path))
