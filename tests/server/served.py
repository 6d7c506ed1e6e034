"""A served double of the engine, for tests of the HTTP API."""

from __future__ import annotations

import contextlib
import pathlib
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import httpx
import openai
import uvicorn

from icarus_jax.server.app import create_app
from icarus_jax.server.head_loader import HeadLoader
from icarus_jax.server.head_resolver import HeadResolver
from tests import doubles

TOKENIZER = doubles.byte_level_tokenizer()
V = len(TOKENIZER)
EOS = TOKENIZER.eos_token_id
LIMIT = 128  # the double's max_model_len


class Served:
    """An app on a real socket, in a thread."""

    def __init__(
        self,
        engine,
        tokenizer,
        eos_ids: tuple[int, ...] = (),
        sources: dict[str, str] | None = None,
        head_folders: Iterable[pathlib.Path | str] = (),
        adapter_resolver: str = "",
        max_cpu_loras: int = 256,
        **options: Any,  # of create_app
    ):
        self.engine = engine
        engine.start()
        self.loader = HeadLoader(engine, next(iter(engine.models)), None, sources, head_folders)
        if adapter_resolver:
            options["resolver"] = HeadResolver(self.loader, adapter_resolver, max_cpu_loras)
        app = create_app(engine, tokenizer, eos_ids, self.loader, **options)
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=600)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def complete(self, **fields) -> dict:
        answer = self.http.post("/v1/completions", json={"model": "trunk", "temperature": 0, **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metric(self, line: str) -> float:
        found = re.search(f"^{re.escape(line)} (.*)$", self.http.get("/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    def close(self) -> None:
        self.http.close()
        self.openai.close()
        self._server.should_exit = True
        self._thread.join()
        self.engine.shutdown(drain=False)


HANG_SECONDS = 600.0  # a limit for hangs: a busy machine must not reach it


def wait_for(condition: Callable[[], object], seconds: float = HANG_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(
    step_seconds: float = 0.0,
    eos_ids: tuple[int, ...] = (),
    head_folders: Iterable[pathlib.Path | str] = (),
    **options: Any,
) -> Iterator[Served]:
    """The double, served."""
    engine = doubles.FakeEngine(V, eos_ids, step_seconds, LIMIT)
    served = Served(engine, TOKENIZER, eos_ids, {"parrot": "heads/parrot"}, head_folders, **options)
    try:
        yield served
    finally:
        served.close()


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


GOOD = {"model": "trunk", "prompt": [5], "max_tokens": 1}
CHAT = {"model": "trunk", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def check_error(answer: httpx.Response, status: int, param: str | None, code: str | None = None) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert error["message"] and "\n" not in error["message"]
    return error
