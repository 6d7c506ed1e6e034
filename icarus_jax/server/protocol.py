"""The bodies of generation requests: OpenAI's fields, vLLM's extra ones under vLLM's names, and agent_fields.py's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import BeforeValidator, Field, create_model, model_validator

from icarus_jax.errors import RequestError
from icarus_jax.scheduling.request import SamplingParams
from icarus_jax.server.agent_fields import MAX_N, Routing, Session
from icarus_jax.server.body import Body, Int32, Int64
from icarus_jax.server.messages import MAX_MESSAGES, Message
from icarus_jax.server.other_fields import GENERATION_FIELDS, PROMPT_FIELDS
from icarus_jax.server.structured import Structured
from icarus_jax.server.tool_fields import ToolUse, check_tools, tool_use

RETAIN_SECONDS = 300.0  # how long the pages of a session are kept whose request does not say


class StreamOptions(Body):
    """OpenAI's `stream_options`: whether a last chunk brings the usage. vLLM's usage in every chunk is not served."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


# Fields of SamplingParams whose JSON form is another: they stand in the bodies below.
_OWN_FORM = ("max_tokens", "logit_bias", "stop", "stop_token_ids", "logprobs")
_JSON_TYPES: dict[Any, Any] = {int: Int32, int | None: Int32 | None}


def _sampling_fields() -> dict[str, Any]:
    """The fields of SamplingParams that bodies take as they are: name -> (type, default), as pydantic has it."""
    types = get_type_hints(SamplingParams) | {"seed": Int64 | None}
    fields = [field for field in dataclasses.fields(SamplingParams) if field.name not in _OWN_FORM]
    return {f.name: (_JSON_TYPES.get(types[f.name], types[f.name]), f.default) for f in fields}


# For the type checker its fields are unknown: they are stated once, in SamplingParams.
_SAME_FORM = _sampling_fields()
Sampling: Any = create_model("Sampling", __base__=Body, **_SAME_FORM)


class Generate(Sampling, Routing, Structured):
    """What completions and chat completions share. Ranges of sampling fields are checked by SamplingParams."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = GENERATION_FIELDS

    n: int = Field(1, ge=1, le=MAX_N)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Int32 | None = None
    logit_bias: dict[str, float] = Field({})
    stop: Annotated[list[str], BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)] = Field([])
    stop_token_ids: list[Int32] = Field([])
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    best_of: Int32 | None = None
    cache_salt: str = Field("", max_length=256)
    prompt_cache_key: str = Field("", max_length=256)  # names a session, if `session` does not
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # seconds, from the request's arrival

    @model_validator(mode="after")
    def _check_shared(self) -> Generate:
        if self.stream_options and not self.stream:
            raise RequestError("stream_options is only allowed with stream=true", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs is not available with stream=true", "prompt_logprobs")
        if self.best_of not in (None, self.n):
            raise RequestError(f"best_of is {self.best_of}; it must equal n, which is {self.n}", "best_of")
        if self.prompt_cache_key and self.session is None:
            self.session = Session(id=self.prompt_cache_key, retain=RETAIN_SECONDS)
        return self

    def named_logprobs(self) -> int | None:
        """How many alternatives the request wants of a generated token; None: it says nothing of log-probabilities."""
        raise NotImplementedError

    def asked_logprobs(self) -> int | None:
        """How many alternatives to report for a generated token; None: no log-probabilities."""
        named = self.named_logprobs()
        return 0 if named is None and self.reference_logprobs else named

    def asked_prompt_logprobs(self) -> int | None:
        """How many alternatives to report for a prompt token; None: no log-probabilities of the prompt."""
        return self.prompt_logprobs

    def asked_tokens(self) -> int | None:
        """The tokens that the request wants to be generated at most; None: it names no number."""
        return self.max_tokens

    def sampling_params(self, default_tokens: int) -> SamplingParams:
        """The engine's parameters; `default_tokens` is the max_tokens of a request that names none."""
        asked = self.asked_tokens()
        own_form = {
            "max_tokens": default_tokens if asked is None else asked,
            "logit_bias": tuple((_token_id(key), bias) for key, bias in self.logit_bias.items()),
            "stop": tuple(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids),
            "logprobs": self.asked_logprobs(),
            "prompt_logprobs": self.asked_prompt_logprobs(),
        }
        return SamplingParams(**{name: getattr(self, name) for name in _SAME_FORM} | own_form)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise RequestError(f"logit_bias has the key {key[:20]!r}; the keys are token ids", "logit_bias")
    return int(key)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


def _prompts(value: Any) -> list[str | list[int]]:
    """Any of the four forms of a prompt, as a list of prompts."""
    if isinstance(value, str) or (_is_ids(value) and value):
        return [value]
    if isinstance(value, list) and (all(isinstance(v, str) for v in value) or all(map(_is_ids, value))):
        return value
    raise ValueError("it must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


class CompletionRequest(Generate):
    """The body of /v1/completions. `prompt` is a text, token ids, or a list of either."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts)]  # list[str | list[int]]
    echo: bool = False
    logprobs: Int32 | None = None
    add_special_tokens: bool = True

    def named_logprobs(self) -> int | None:
        """`logprobs` as it is given."""
        return self.logprobs

    def asked_prompt_logprobs(self) -> int | None:
        """The larger of `prompt_logprobs` and, with `echo`, `logprobs`."""
        echoed = self.asked_logprobs() if self.echo else None
        asked = [count for count in (self.prompt_logprobs, echoed) if count is not None]
        return max(asked, default=None)


class ChatPrompt(Body):
    """A conversation and how the chat template is to render it."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = PROMPT_FIELDS

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] = Field({})
    add_generation_prompt: bool | None = None  # default: unless the final message is continued
    continue_final_message: bool = False
    add_special_tokens: bool = False  # the template writes them itself

    @model_validator(mode="after")
    def _check_prompt(self) -> ChatPrompt:
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other", "continue_final_message"
            )
        if "chat_template" in self.chat_template_kwargs:
            raise RequestError("chat_template_kwargs may not replace the chat_template", "chat_template_kwargs")
        check_tools(self.tools or [])
        return self


class ChatRequest(ChatPrompt, Generate):
    """The body of /v1/chat/completions."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = GENERATION_FIELDS

    max_completion_tokens: Int32 | None = None
    logprobs: bool = False
    top_logprobs: Int32 | None = None
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", "top_logprobs")
        self.tool_use()
        return self

    def tool_use(self) -> ToolUse | None:
        """The tools that the answer may call; None: none."""
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    def named_logprobs(self) -> int | None:
        """`top_logprobs`, if `logprobs` is true."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def asked_tokens(self) -> int | None:
        """`max_completion_tokens`, or the older `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling_params(self, default_tokens: int) -> SamplingParams:
        """As Generate has it; an error about `logprobs` names `top_logprobs`, which is the field here."""
        try:
            return super().sampling_params(default_tokens)
        except RequestError as error:  # the field's name in this API
            if error.field == "logprobs":
                raise RequestError(str(error).replace("logprobs", "top_logprobs", 1), "top_logprobs") from None
            raise


class TokenizeRequest(ChatPrompt):
    """Text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = Field([], max_length=MAX_MESSAGES)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise RequestError("give either prompt or messages", "prompt")
        return self

    def with_special_tokens(self) -> bool:
        """Whether the tokenizer adds its own tokens: by default to a text, not to a rendered conversation."""
        named = "add_special_tokens" in self.model_fields_set
        return self.add_special_tokens if named else self.prompt is not None


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[Int32]
