"""A prefill replica: an engine that computes prompts, and leaves their pages in the page store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ml_collections import ConfigDict

from icarus_jax.on_ray.asked import Prompt
from icarus_jax.on_ray.engine_replica import EngineReplica
from icarus_jax.scheduling.request import Request, SamplingParams, TokenOutput

PROMPTS = 16  # that a prefill replica takes at a time: more would wait longer than it takes to compute them elsewhere


class PrefillReplica(EngineReplica):
    """Computes prompts for the other replicas. It serves the trunk alone: only the trunk makes K/V that is stored."""

    def __init__(self, config: ConfigDict):
        """Loads the trunk that the config describes, without heads, and starts the engine.

        Args:
            config: the config of the other replicas.

        Raises:
            UsageError: a source cannot be read, or a value makes no sense.
        """
        alone = config.copy_and_resolve_references()
        with alone.unlocked():
            alone.heads = ConfigDict()
            alone.engine.max_loras = 0
            alone.server.watch_heads = alone.server.adapter_resolver = ""
        super().__init__(alone)

    async def prefill(self, prompt: Prompt) -> AsyncIterator[str]:
        """Computes a prompt, and waits until its pages are in the page store.

        Args:
            prompt: the prompt.

        Yields:
            This replica's id, as soon as the prompt has been taken.
        """
        yield self._id
        loop, saved = asyncio.get_running_loop(), asyncio.Event()
        pages, trunk = self._engine.pages, next(iter(self._engine.models))
        assert pages is not None

        def on_output(index: int, output: TokenOutput) -> None:  # runs on the engine's thread
            if output.finish_reason:
                pages.when_saved(lambda: loop.call_soon_threadsafe(saved.set))

        params = SamplingParams(max_tokens=1, temperature=0.0)
        salt, tenant, weight = prompt.cache_salt, prompt.tenant, prompt.weight
        request = Request((trunk,), prompt.token_ids, params, cache_salt=salt, tenant=tenant, weight=weight)
        seq_ids = self._engine.submit(request, on_output)
        try:
            await saved.wait()
        finally:  # whoever asked may have gone
            self._engine.abort(seq_ids)
