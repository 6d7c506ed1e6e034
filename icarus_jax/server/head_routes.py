"""The endpoints that load and unload heads while the server runs: our own and vLLM's."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from icarus_jax.errors import RequestError
from icarus_jax.scheduling.registry import Model
from icarus_jax.server.body import ApiError, B, Body, parse, read_body
from icarus_jax.server.endpoints import Route
from icarus_jax.server.head_loader import HeadLoader, UnknownHead
from icarus_jax.weights.adapter_cache import StoreError

T = TypeVar("T")
OFF = "heads are not loaded over HTTP: start the server with --config.server.head_folders=DIR to allow it"


class LoadHead(Body):
    """The body of /v1/load_head.

    Attributes:
        name: the head's name as a model.
        path: the adapter's folder or name in a store; see `HeadPlaces.find`.
        kv: the kind of the head; None: the adapter's own.
        pinned: whether the head keeps its adapter slot for good.
    """

    name: str
    path: str
    kv: Literal["shared", "activated", "isolated"] | None = None
    pinned: bool = False


class UnloadHead(Body):
    """The body of /v1/unload_head."""

    name: str


class LoadLoraAdapter(Body):
    """The body of /v1/load_lora_adapter; the fields are vLLM's.

    Attributes:
        lora_name: the head's name as a model.
        lora_path: the adapter's folder or name in a store; see `HeadPlaces.find`.
        load_inplace: whether a head of the same name is replaced.
    """

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLoraAdapter(Body):
    """The body of /v1/unload_lora_adapter; the field is vLLM's."""

    lora_name: str


class HeadRoutes:
    """The endpoints that load and unload heads.

    Loading takes long. It runs on a thread of its own, so that neither the event loop nor its pool of threads waits.

    Attributes:
        bodies: path -> the model that checks the body.
    """

    bodies: Mapping[str, type[Body]] = {
        "/v1/load_head": LoadHead,
        "/v1/unload_head": UnloadHead,
        "/v1/load_lora_adapter": LoadLoraAdapter,
        "/v1/unload_lora_adapter": UnloadLoraAdapter,
    }

    def __init__(self, loader: HeadLoader, show: Callable[[Model], dict[str, Any]]):
        """Takes the loader that does the work.

        Args:
            loader: loads and unloads the heads.
            show: describes a model as /v1/models lists it.
        """
        self._loader = loader
        self._show = show
        self._thread = ThreadPoolExecutor(1, "heads")

    def routes(self) -> list[Route]:
        """Returns the method, path and handler of each endpoint."""
        return [
            ("POST", "/v1/load_head", self.load_head),
            ("POST", "/v1/unload_head", self.unload_head),
            ("POST", "/v1/load_lora_adapter", self.load_lora_adapter),
            ("POST", "/v1/unload_lora_adapter", self.unload_lora_adapter),
        ]

    async def load_head(self, http: HttpRequest) -> Any:
        """Loads a head, or a new version of it under the same name, and describes it as /v1/models does."""
        body = await self._read(LoadHead, http)
        call = functools.partial(self._load, body.name, body.path, kv=body.kv, pinned=body.pinned)
        return self._show(await self._run("name", "path", call))

    async def unload_head(self, http: HttpRequest) -> Any:
        """Stops serving a head. Requests that already use it finish."""
        body = await self._read(UnloadHead, http)
        await self._run("name", "name", functools.partial(self._loader.unload, body.name))
        return {"id": body.name, "object": "model", "deleted": True}

    async def load_lora_adapter(self, http: HttpRequest) -> Response:
        """Loads a head as vLLM does: a name that is loaded already is refused, unless load_inplace is true."""
        body = await self._read(LoadLoraAdapter, http)
        name, path = body.lora_name, body.lora_path
        call = functools.partial(self._load, name, path, replace=body.load_inplace)
        await self._run("lora_name", "lora_path", call)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_lora_adapter(self, http: HttpRequest) -> Response:
        """Stops serving a head, as vLLM does."""
        body = await self._read(UnloadLoraAdapter, http)
        await self._run("lora_name", "lora_name", functools.partial(self._loader.unload, body.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def _read(self, kind: type[B], http: HttpRequest) -> B:
        if not self._loader.places:
            raise ApiError(403, OFF, code="head_loading_off")
        return await asyncio.to_thread(parse, kind, await read_body(http))

    def _load(self, name: str, path: str, **options: Any) -> Model:
        return self._loader.load(name, self._loader.places.find(path), **options)

    async def _run(self, name: str, path: str, call: Callable[[], T]) -> T:
        """Runs `call` on the thread of heads. Raises ApiError about the body's field `name` or `path` if it fails."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except PermissionError as error:
            raise ApiError(403, str(error), path, "path_not_allowed") from error
        except FileNotFoundError as error:
            raise ApiError(404, str(error), path, "adapter_not_found") from error
        except StoreError as error:
            raise ApiError(503, str(error), path, "adapter_store_error", {"Retry-After": "10"}) from error
        except UnknownHead as error:
            raise ApiError(404, str(error), name, "model_not_found") from error
        except RequestError as error:
            if error.field != "name":
                raise
            raise ApiError(400, str(error), name) from error
        except (ValueError, OSError) as error:
            raise ApiError(400, " ".join(str(error).split()), path) from error
