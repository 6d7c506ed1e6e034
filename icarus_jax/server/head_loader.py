"""Loads and unloads heads while the server runs, and knows where the weights of each come from."""

from __future__ import annotations

import logging
import pathlib
import re
import threading
from collections.abc import Iterable, Mapping

from icarus_jax.engine.engine import Engine
from icarus_jax.errors import RequestError
from icarus_jax.scheduling.registry import Model
from icarus_jax.server.head_places import HeadPlaces
from icarus_jax.weights.adapter_cache import AdapterCache
from icarus_jax.weights.peft import CACHE, read_head

log = logging.getLogger(__name__)

NAME = re.compile(r"[\w.:/@-]{1,128}")


class UnknownHead(ValueError):
    """No head of this name is served."""


class HeadLoader:
    """Loads and unloads heads. Thread-safe: files are read side by side, the engine takes one head after the other.

    Attributes:
        engine: the engine that serves the heads.
        trunk_name: the trunk's name as a model.
        places: where clients may load heads from.
        trunk_identity: the trunk's identity, or None.
    """

    def __init__(
        self,
        engine: Engine,
        trunk_name: str,
        trunk_identity: str | None = None,
        sources: Mapping[str, str] | None = None,
        folders: Iterable[str | pathlib.Path] = (),
        cache: AdapterCache = CACHE,
    ):
        """Takes the engine and what is known of its models.

        Args:
            engine: the engine that serves the heads.
            trunk_name: the trunk's name as a model.
            trunk_identity: the trunk's identity; an adapter trained on another trunk is refused. None: adapters are
                not checked for this.
            sources: model name -> where its weights come from, for the models that the engine already serves.
            folders: the places that clients may load heads from; see `HeadPlaces`.
            cache: keeps copies of adapters that lie in a store.

        Raises:
            ValueError: a place cannot be one.
        """
        self.engine = engine
        self.trunk_name = trunk_name
        self.places = HeadPlaces(folders)
        self.trunk_identity = trunk_identity
        self._sources = dict(sources or {})
        self._cache = cache
        self._lock = threading.Lock()

    def source(self, name: str) -> str:
        """Returns where a model's weights come from; the model's own name if that is not known."""
        return self._sources.get(name, name)

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
            OSError: the adapter's store has no such adapter, or does not answer.
        """
        self._check_name(name, replace)
        head, factors = read_head(
            name,
            source,
            kv,
            self.engine.model_config,
            trunk_identity=self.trunk_identity,
            pinned=pinned,
            cache=self._cache,
        )
        with self._lock:
            self._check_name(name, replace)  # somebody may have loaded it while the files were read
            self.engine.load_head(head, factors)
            self._sources[name] = source
            log.info("head %s: loaded from %s as kv='%s'", name, source, head.kv)
            return self.engine.models[name]

    def _check_name(self, name: str, replace: bool) -> None:
        if not NAME.fullmatch(name):
            message = f"{name[:64]!r} cannot name a head: 1 to 128 letters, digits and any of - _ . : / @"
            raise RequestError(message, "name")
        if name == self.trunk_name:
            raise RequestError(f"{name!r} is the trunk's name; give the head another", "name")
        if not replace and name in self.engine.models:
            raise RequestError(f"{name!r} is loaded already, from {self.source(name)}", "name")

    def unload(self, name: str, version: Model | None = None) -> None:
        """Stops serving a head. Requests that already use it finish.

        Args:
            name: the head's name as a model.
            version: the only version of the head that may be unloaded; None: any.

        Raises:
            RequestError: the name is the trunk's; `field` is 'name'.
            UnknownHead: no head of this name is served, or it is another version.
        """
        with self._lock:
            if name == self.trunk_name:
                raise RequestError(f"{name!r} is the trunk; it cannot be unloaded", "name")
            served = self.engine.models.get(name)
            if served is None or (version is not None and served is not version):
                raise UnknownHead(f"the head {name[:64]!r} is not served")
            self.engine.unload_head(name)
            self._sources.pop(name, None)
            log.info("head %s: unloaded", name)
