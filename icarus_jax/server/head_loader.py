"""Loads and unloads heads while the server runs, and knows where the weights of each come from."""

from __future__ import annotations

import logging
import os
import pathlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping

from icarus_jax.engine.engine import Engine
from icarus_jax.errors import RequestError
from icarus_jax.scheduling.registry import Model
from icarus_jax.weights.adapter_files import CONFIG_FILE
from icarus_jax.weights.peft import read_head

log = logging.getLogger(__name__)

NAME = re.compile(r"[\w.:/@-]{1,128}")


class UnknownHead(ValueError):
    """No head of this name is served."""


class HeadLoader:
    """Loads and unloads heads, one at a time. Thread-safe.

    Attributes:
        engine: the engine that serves the heads.
        trunk_name: the trunk's name as a model.
        folders: the real paths of the folders that clients may load heads from; empty: they may not load any.
        trunk_identity: the trunk's identity, or None.
    """

    def __init__(
        self,
        engine: Engine,
        trunk_name: str,
        trunk_identity: str | None = None,
        sources: Mapping[str, str] | None = None,
        folders: Iterable[str | pathlib.Path] = (),
    ):
        """Takes the engine and what is known of its models.

        Args:
            engine: the engine that serves the heads.
            trunk_name: the trunk's name as a model.
            trunk_identity: the trunk's identity; an adapter trained on another trunk is refused. None: adapters are
                not checked for this.
            sources: model name -> where its weights come from, for the models that the engine already serves.
            folders: the folders that `find` may look into.
        """
        self.engine = engine
        self.trunk_name = trunk_name
        self.folders = tuple(_real(pathlib.Path(folder).expanduser()) for folder in folders)
        self.trunk_identity = trunk_identity
        self._sources = dict(sources or {})
        self._lock = threading.Lock()

    def source(self, name: str) -> str:
        """Returns where a model's weights come from; the model's own name if that is not known."""
        return self._sources.get(name, name)

    def find(self, path: str) -> pathlib.Path:
        """Finds the folder of an adapter that a client names.

        Args:
            path: an absolute path, or one relative to any of `folders`.

        Returns:
            The real path of the adapter's folder.

        Raises:
            PermissionError: the folder, or anything below it, lies outside `folders` once symbolic links are followed,
                or is neither a file nor a folder.
            FileNotFoundError: the folder holds no adapter.
        """
        places = [_real(folder / path) for folder in self.folders]  # joined with an absolute path, this is that path
        allowed = [place for place in places if self._is_inside(place)]
        if not allowed:
            raise PermissionError(f"{path[:256]!r} is outside the folders that heads may be loaded from")
        found = next((place for place in allowed if (place / CONFIG_FILE).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path[:256]!r} is no adapter: it has no {CONFIG_FILE} (a PEFT folder holds it)")
        for place in _below(found):
            name = str(place.relative_to(found))[:256]
            real = _real(place)
            if not self._is_inside(real):
                raise PermissionError(f"{path[:256]!r}: {name} is a link to outside the folders that heads lie in")
            if real.exists() and not (real.is_file() or real.is_dir()):
                raise PermissionError(f"{path[:256]!r}: {name} is neither a file nor a folder")
        return found

    def _is_inside(self, path: pathlib.Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self.folders)

    def load(self, name: str, source: str, kv: str | None = None, pinned: bool = False, replace: bool = True) -> Model:
        """Loads an adapter and serves it as a head. Blocks until the engine serves it.

        Args:
            name: the head's name as a model.
            source: a PEFT folder, or another source that `peft.read_head` reads.
            kv: 'shared', 'activated' or 'isolated'; None: the kind that `peft.read_head` chooses.
            pinned: whether the head keeps its adapter slot for good.
            replace: whether a head of the same name is replaced by this one, rather than the name refused.

        Returns:
            The head as the engine now serves it.

        Raises:
            RequestError: the name cannot be used; `field` is 'name'.
            ValueError: the adapter cannot be read, or does not fit the trunk.
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
        """Stops serving a head. Requests that already use it finish.

        Args:
            name: the head's name as a model.

        Raises:
            RequestError: the name is the trunk's; `field` is 'name'.
            UnknownHead: no head of this name is served.
        """
        with self._lock:
            if name == self.trunk_name:
                raise RequestError(f"{name!r} is the trunk; it cannot be unloaded", "name")
            if name not in self.engine.models:
                raise UnknownHead(f"the head {name[:64]!r} is not served")
            self.engine.unload_head(name)
            self._sources.pop(name, None)
            log.info("head %s: unloaded", name)


def _below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields everything below a folder, and below the folders that links there lead to, each folder once.

    A folder is entered only after it has been yielded: who stops there has not looked into it.
    """
    entered: set[pathlib.Path] = set()
    waiting = [folder]
    while waiting:
        if (real := _real(waiting[-1])) in entered:
            waiting.pop()
            continue
        entered.add(real)
        for place in waiting.pop().iterdir():
            yield place
            if place.is_dir():
                waiting.append(place)


def _real(path: pathlib.Path) -> pathlib.Path:
    """Follows every symbolic link in a path. The path need not exist."""
    return pathlib.Path(os.path.realpath(path))
