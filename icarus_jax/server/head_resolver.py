"""Heads that are loaded when a request first names them, and given up for others when they are idle.

A model NAME that is not served is looked for at PREFIX/NAME, where PREFIX is a folder, a place in a bucket, or hf://ORG.
Requests for one name wait for one load; the engine goes on meanwhile. A name for which nothing can be loaded is not
looked for again within FAILED_SECONDS. The model is vLLM's LoRA resolvers: what is not there is 404, what is there but
cannot be served is 400.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from icarus_jax.errors import RequestError
from icarus_jax.scheduling.registry import Model
from icarus_jax.server.body import ApiError
from icarus_jax.server.exchange import current
from icarus_jax.server.head_loader import HeadLoader
from icarus_jax.server.head_places import HeadPlaces
from icarus_jax.weights.adapter_cache import StoreError, is_remote

log = logging.getLogger(__name__)

NAME = re.compile(r"(?=.{1,128}$)\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)  # no '..', no absolute path, no revision
THREADS = 4  # that load heads
FAILED_SECONDS = 10.0
MAX_FAILED = 4096  # names that are remembered
MAX_LOADING = 256  # loads that one API key may have in the line
MAX_NEW = 32  # models that one request may name and that are not loaded


class UnknownModel(ApiError):
    """A request names a model that is not served.

    Attributes:
        name: the model's name.
        num_new: how many such models the request names.
    """

    def __init__(self, name: str, status: int, message: str, param: str, code: str | None = None, num_new: int = 1):
        """Takes the model's name, the fields of the error object, and how many such models the request names."""
        super().__init__(status, message, param, code)
        self.name = name
        self.num_new = num_new


@dataclasses.dataclass(frozen=True)
class _Failure:
    """Why a head cannot be loaded. It keeps no exception: with its traceback it would keep the adapter's weights.

    Attributes:
        until: when the head is looked for again, in seconds (monotonic).
        status: of the answer; 404: there is no such head.
        message: of the answer, as are the others.
        reason: more, which says where the adapter lies: only administrators are told.
    """

    until: float
    status: int
    message: str = ""
    reason: str = ""
    code: str | None = None
    headers: dict[str, str] | None = None

    def error(self, unknown: UnknownModel) -> ApiError:
        """Returns the error of a request that lacks the head."""
        if self.status == 404:
            return unknown
        message = f"{self.message}: {self.reason}" if current().caller.admin else self.message
        return ApiError(self.status, message, unknown.param, self.code, self.headers)


class Leases:
    """The models that one HTTP request names: they are not given up before it has ended. Thread-safe."""

    def __init__(self) -> None:
        """Starts without models."""
        self._lock = threading.Lock()
        self._resolver: HeadResolver | None = None
        self._names: set[str] = set()
        self._closed = False

    def add(self, resolver: HeadResolver, name: str) -> None:
        """Adds a model. After `close` it does nothing.

        Args:
            resolver: gives models up.
            name: the model's name.
        """
        with self._lock:
            if not self._closed and name not in self._names:
                self._resolver = resolver
                self._names.add(name)
                resolver.keep(name)

    def close(self) -> None:
        """Returns all models. May be called more than once."""
        with self._lock:
            self._closed = True
            names, self._names = self._names, set()
            for name in names:
                assert self._resolver is not None
                self._resolver.release(name)


class HeadResolver:
    """Loads heads on first use. Its state may be used from any thread."""

    def __init__(self, loader: HeadLoader, prefix: str, max_cpu_loras: int):
        """Starts without resolved heads.

        Args:
            loader: loads and unloads the heads.
            prefix: where heads lie: a folder, or what their names in a store begin with.
            max_cpu_loras: how many heads the host keeps in memory, those loaded otherwise included. While requests use
                more of them, it keeps more.

        Raises:
            ValueError: the prefix can be none.
        """
        self._max_cpu_loras = max_cpu_loras
        self._loader = loader
        self._prefix = prefix.rstrip("/")
        self._places = HeadPlaces([prefix])
        self._threads = ThreadPoolExecutor(THREADS, "resolver")
        self._state = threading.Condition()  # of all that follows
        self._loading: dict[str, tuple[str, Future[_Failure | None]]] = {}  # name -> the key that asked first, the load
        self._resolved: OrderedDict[str, Model] = OrderedDict()  # the heads loaded here, the longest unused first
        self._leaving: set[str] = set()  # heads that are being unloaded
        self._users: Counter[str] = Counter()  # name -> requests that use it
        self._failed: OrderedDict[str, _Failure] = OrderedDict()  # the latest last

    def hold(self, named: Iterable[tuple[str, str]], leases: Leases) -> None:
        """Keeps the models of a request that has been read.

        Args:
            named: the models, each after the field that names it.
            leases: keeps them.

        Raises:
            UnknownModel: a model has been given up since the request was read.
        """
        for field, name in named:
            leases.add(self, name)
            with self._state:
                served = name in self._loader.engine.models and name not in self._leaving
            if not served:
                raise UnknownModel(name, 404, f"the model {name!r} is not served any more", field, "model_not_found")

    def keep(self, name: str) -> None:
        """Counts a request that uses a model."""
        with self._state:
            self._users[name] += 1
            if name in self._resolved:
                self._resolved.move_to_end(name)

    def release(self, name: str) -> None:
        """Counts a request that uses a model no more."""
        with self._state:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
        if self._is_full():
            self._threads.submit(self._give_up)

    async def load(self, unknown: UnknownModel, leases: Leases) -> None:
        """Loads a head that a request lacks.

        Args:
            unknown: says which; raised again if there is none.
            leases: keeps the head for the request.

        Raises:
            ApiError: there is no such head, it cannot be loaded, or too many are loaded at once.
        """
        if unknown.num_new > MAX_NEW:
            message = f"the request names {unknown.num_new} models that are not loaded; at most {MAX_NEW} may be"
            raise ApiError(400, message, unknown.param)
        name, caller = unknown.name, current().caller.name
        if not NAME.fullmatch(name):
            raise unknown
        leases.add(self, name)
        # Others may wait for it too.
        failure = await asyncio.shield(asyncio.wrap_future(self._start(name, caller)))
        if failure is not None:
            raise failure.error(unknown)

    def _start(self, name: str, caller: str) -> Future[_Failure | None]:
        """Puts a load into the line, unless it is there already or has failed a short time ago.

        Raises:
            ApiError: too many are there.
        """
        with self._state:
            if name in self._loading:
                return self._loading[name][1]
            failure = self._failed.get(name)
            if failure is not None and time.monotonic() < failure.until:
                known: Future[_Failure | None] = Future()
                known.set_result(failure)
                return known
            if sum(caller == key for key, _ in self._loading.values()) >= MAX_LOADING:
                message = f"{MAX_LOADING} models that you asked for are being loaded already; try again in a second"
                raise ApiError(429, message, "model", "rate_limit_exceeded", {"Retry-After": "1"})
            load = self._threads.submit(self._load, name)
            self._loading[name] = caller, load
            return load

    def _load(self, name: str) -> _Failure | None:
        """Loads a head, on a thread. Returns why it cannot be loaded; None if it is served now."""
        try:
            with self._state:
                self._state.wait_for(lambda: name not in self._leaving)
                if name in self._loader.engine.models or not self._users[name]:  # it is there, or nobody waits for it
                    return None
            source = f"{self._prefix}/{name}" if is_remote(self._prefix) else name
            model = self._loader.load(name, self._places.find(source), replace=False)
            with self._state:
                self._resolved[name] = model
        except RequestError as error:
            if error.field != "name":  # the engine takes no more heads
                raise
        except (ValueError, OSError) as error:
            return self._remember(name, _failure(name, error))
        finally:
            with self._state:
                del self._loading[name]
            if self._is_full():
                self._threads.submit(self._give_up)
        return None

    def _remember(self, name: str, failure: _Failure) -> _Failure:
        if failure.reason:
            log.warning("head %s: cannot be loaded: %s", name, failure.reason)
        with self._state:
            self._failed[name] = failure
            self._failed.move_to_end(name)
            if len(self._failed) > MAX_FAILED:
                self._failed.popitem(last=False)
        return failure

    def _is_full(self) -> bool:
        return len(self._loader.engine.models) - 1 > self._max_cpu_loras  # the trunk is no head

    def _give_up(self) -> None:
        """Unloads the heads that have been idle for the longest time, as many as are too many."""
        while (chosen := self._choose()) is not None:
            name, model = chosen
            try:
                self._loader.unload(name, model)  # not what somebody else loads under this name at the same time
            except ValueError:
                log.info("head %s: was unloaded or replaced by somebody else, or the engine ends", name)
            finally:
                with self._state:
                    self._leaving.discard(name)
                    self._state.notify_all()

    def _choose(self) -> tuple[str, Model] | None:
        """Returns an idle head, which counts as leaving from now on; None if there are not too many heads."""
        with self._state:
            served = self._loader.engine.models
            if len(served) - 1 - len(self._leaving) <= self._max_cpu_loras:
                return None
            for name, model in list(self._resolved.items()):
                if served.get(name) is not model:  # it was unloaded or replaced by somebody else, and is not ours
                    del self._resolved[name]
                elif not self._users[name]:
                    del self._resolved[name]
                    self._leaving.add(name)
                    return name, model
            return None


def _failure(name: str, error: Exception) -> _Failure:
    until, said = time.monotonic() + FAILED_SECONDS, " ".join(str(error).split())
    if isinstance(error, FileNotFoundError | PermissionError):
        return _Failure(until, 404)
    if isinstance(error, StoreError):
        message = f"the model {name!r} cannot be fetched now"
        return _Failure(until, 503, message, said, "adapter_store_error", {"Retry-After": "10"})
    return _Failure(until, 400, f"the model {name!r} was found, and cannot be loaded", said)
