"""LiteLLM as a client, under each name that it has for such a server, against the tiny trunk."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm
import openai
import pytest

from tests.frameworks.schemas import City, Weather

# LiteLLM's own types draw them.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
MESSAGES = [{"role": "user", "content": "What is the weather?"}]


class GetWeather(Weather):
    """Get the weather of a city."""

    city: City


TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": GetWeather.model_json_schema()}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(params=["openai", "hosted_vllm", "litellm_proxy"])
def where(served, request) -> dict[str, Any]:
    return {
        "model": f"{request.param}/a",
        "api_base": f"{served.url}/v1",
        "api_key": "none",
        "messages": MESSAGES,
        "temperature": 0,
        "max_tokens": 100,
    }


def test_completion_streamed_and_asynchronous(where):
    where["max_tokens"] = 8
    whole = litellm.completion(**where)
    chunks = list(litellm.completion(**where, stream=True, stream_options={"include_usage": True}))
    streamed = litellm.stream_chunk_builder(chunks)
    later = asyncio.run(litellm.acompletion(**where))
    said = {answer.choices[0].message.content for answer in (whole, streamed, later)}
    assert len(said) == 1 and said.pop()
    assert [answer.usage.completion_tokens for answer in (whole, streamed, later)] == [8] * 3
    assert later.usage.prompt_tokens_details.cached_tokens == later.usage.prompt_tokens


@pytest.mark.parametrize("choice", ["required", NAMED], ids=str)
def test_tools(where, choice):
    asked = {"tools": [TOOL], "tool_choice": choice}
    whole = litellm.completion(**where, **asked).choices[0]
    streamed = litellm.stream_chunk_builder(list(litellm.completion(**where, **asked, stream=True))).choices[0]
    for answer in (whole, streamed):
        call = answer.message.tool_calls[0]
        assert (answer.finish_reason, call.function.name) == ("tool_calls", "get_weather")
        GetWeather.model_validate_json(call.function.arguments)


def test_a_form(where):
    answer = litellm.completion(**where, response_format=Weather).choices[0]
    Weather.model_validate_json(answer.message.content)


def test_settings(where):
    settings = {
        "seed": 1,
        "n": 2,
        "top_p": 0.9,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "stop": ["\n\n"],
        "logprobs": True,
        "top_logprobs": 2,
        "user": "someone",
        "reasoning_effort": "low",
        "timeout": 600,
        "extra_body": {"top_k": 5, "models": ["a", "b"], "session": {"id": "s", "retain": 1}},
    }
    answer = litellm.completion(**where | {"max_tokens": 4} | settings)
    assert (len(answer.choices), answer.usage.completion_tokens) == (4, 16)


def test_a_response(where):
    fields = {name: where[name] for name in ("model", "api_base", "api_key", "temperature")}
    fields |= {"input": "What is the weather?", "max_output_tokens": 100, "text_format": Weather}
    whole = litellm.responses(**fields)
    Weather.model_validate_json(whole.output[0].content[0].text)
    *_, last = litellm.responses(**fields, stream=True)
    assert last.response.output[0].content[0].text == whole.output[0].content[0].text


def test_errors(where):
    with pytest.raises(litellm.NotFoundError, match="nobody"):
        litellm.completion(**where | {"model": where["model"].replace("/a", "/nobody")})
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        litellm.completion(**where | {"max_tokens": 10_000})
