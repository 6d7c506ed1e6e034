"""Lets prefill replicas compute long prompts, whose pages then come through the page store."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from icarus_jax.engine.engine import Engine
from icarus_jax.engine.page_mover import LOAD_SECONDS
from icarus_jax.on_ray.asked import Prompt
from icarus_jax.scheduling.request import Request

log = logging.getLogger(__name__)

ACCEPT_SECONDS = 2.0  # how long a prompt waits for a prefill replica that takes it
PREFILL_SECONDS = 120.0  # and for its pages; those that are stored by then are used all the same
RETRY_SECONDS = 30.0  # how long prompts are computed here after the page store or a prefill replica was too slow


class RemotePrefill:
    """Asks prefill replicas for the pages of a prompt, before the engine gets the request.

    The engine then finds the pages in the page store. They are the trunk's, so that prefill replicas need no heads, and
    one prefill does for all models of a request. Whatever goes wrong, the engine computes what it does not find.
    """

    def __init__(self, replicas: DeploymentHandle, engine: Engine, max_local_tokens: int):
        """Takes what it works with.

        Args:
            replicas: the deployment of `PrefillReplica`.
            engine: the engine that gets the requests. It has a page store.
            max_local_tokens: how many tokens of a prompt, neither cached nor stored, the engine computes itself.
        """
        self._prefill, self._engine = replicas.options(stream=True).prefill, engine
        self._max_local_tokens = max_local_tokens
        self._next = 0.0  # when prefill replicas are asked again, in seconds of time.monotonic()

    async def __call__(self, request: Request) -> None:
        """Waits until the pages of a prompt are in the page store, if it is worth it.

        Args:
            request: the request that the engine will get.
        """
        tokens = self._of_trunk(request)
        if await self._is_worth_it(tokens, request.cache_salt):
            await self._ask(Prompt(tokens, request.cache_salt, request.tenant, request.weight))

    def _of_trunk(self, request: Request) -> tuple[int, ...]:
        """Returns the tokens of the prompt's full pages whose K/V the trunk makes, for one of the models at least."""
        models, ids = self._engine.models, request.prompt_ids
        ends = [models[name].adapted_from(ids) for name in request.models if name in models]
        end = min(len(ids), max(ends, default=0))
        return ids[: end - end % self._engine.config.page_size]

    async def _is_worth_it(self, tokens: tuple[int, ...], cache_salt: str) -> bool:
        """Returns whether too many tokens at the end are neither cached nor stored."""
        before = tokens[: max(0, len(tokens) - self._max_local_tokens)]
        if len(before) < self._engine.config.page_size or time.monotonic() < self._next:
            return False
        assert self._engine.pages is not None
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                return not await asyncio.wrap_future(self._engine.pages.has(before, cache_salt))
        except TimeoutError:  # pages would not come through this store either
            self._next = time.monotonic() + RETRY_SECONDS
            return False

    async def _ask(self, prompt: Prompt) -> None:
        answers: Any = self._prefill.remote(prompt)
        try:
            async with asyncio.timeout(ACCEPT_SECONDS) as accepting:
                await anext(answers)
            async with asyncio.timeout(PREFILL_SECONDS):
                async for _ in answers:
                    pass
        except (RayError, RayServeException) as error:
            log.warning("a prefill replica has failed, the prompt is computed here: %s", type(error).__name__)
        except TimeoutError:
            answers.cancel()
            if not accepting.expired():
                self._next = time.monotonic() + RETRY_SECONDS
            log.warning(
                "no prefill replica has the time for a prompt of %d tokens: it is computed here", len(prompt.token_ids)
            )
        except asyncio.CancelledError:  # nobody waits for the answer any more
            answers.cancel()
            raise
