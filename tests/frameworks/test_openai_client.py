"""The official `openai` client, against the tiny trunk: what it sends is served, and what it reads is there."""

from __future__ import annotations

import asyncio
import json

import openai
import pydantic
import pytest

from tests.frameworks.schemas import City, Weather

MESSAGES = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "What is the weather?"}]


class GetWeather(pydantic.BaseModel):
    """Get the weather of a city."""

    city: City


TOOL = openai.pydantic_function_tool(GetWeather, name="get_weather")
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def chat(served):
    return served.openai.chat.completions


def request(**fields) -> dict:
    return {"model": "a", "messages": MESSAGES, "max_tokens": 16, "temperature": 0, **fields}


def test_chat_and_stream_say_the_same(chat):
    fields = request(logprobs=True, top_logprobs=2, n=2)
    whole = chat.create(**fields)
    with chat.stream(**fields, stream_options={"include_usage": True}) as stream:
        events = list(stream)
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= {event.type for event in events}
    said = [event.content for event in events if event.type == "content.done"]
    assert said == [choice.message.content for choice in whole.choices] and len(said) == 2
    assert (whole.choices[0].finish_reason, whole.model) == ("length", "a")
    assert events[-1].snapshot.usage.completion_tokens == whole.usage.completion_tokens == 32
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2


def test_what_a_client_says_about_a_request_changes_nothing(chat):
    plain = chat.create(**request())
    told = {
        "metadata": {"run": "1"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "conversation",
        "prompt_cache_retention": "24h",
        "reasoning_effort": "low",
        "safety_identifier": "someone",
        "service_tier": "auto",
        "store": True,
        "user": "someone",
        "verbosity": "low",
    }
    assert chat.create(**request(**told)).choices[0].message.content == plain.choices[0].message.content


@pytest.mark.parametrize("choice", ["required", NAMED], ids=str)
def test_tools(chat, choice):
    fields = request(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False, max_tokens=100)
    parsed = chat.parse(**fields).choices[0]
    with chat.stream(**fields) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    for answer in (parsed, streamed):
        (call,) = answer.message.tool_calls
        assert (answer.finish_reason, call.function.name) == ("tool_calls", "get_weather")
        assert isinstance(call.function.parsed_arguments, GetWeather)
    history = [*MESSAGES, parsed.message, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    assert chat.create(**request(messages=history, tools=[TOOL])).usage.prompt_tokens_details.cached_tokens > 0


def test_parse_with_pydantic(chat):
    fields = request(response_format=Weather, max_tokens=100)
    (whole,) = chat.parse(**fields).choices
    with chat.stream(**fields) as stream:
        stream.until_done()
        (streamed,) = stream.get_final_completion().choices
    assert whole.finish_reason == "stop" and isinstance(whole.message.parsed, Weather)
    assert streamed.message.parsed == whole.message.parsed
    assert json.loads(whole.message.content) == whole.message.parsed.model_dump()
    with pytest.raises(openai.LengthFinishReasonError):
        chat.parse(**fields | {"max_tokens": 3})


def answering(**fields) -> dict:
    return {"model": "a", "input": "What is the weather?", "max_output_tokens": 100, "temperature": 0, **fields}


def test_a_response_goes_on_and_is_streamed(served):
    responses = served.openai.responses
    first = responses.create(**answering(max_output_tokens=8))
    assert (first.status, first.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = list(responses.create(**answering(max_output_tokens=8), stream=True))
    said = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(said) == events[-1].response.output_text == first.output_text
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    fields = answering(model="b", input="And tomorrow?", max_output_tokens=8, previous_response_id=first.id)
    usage = responses.create(**fields).usage
    assert usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1, "all that a has read and written"


def test_a_response_is_parsed(served):
    responses = served.openai.responses
    parsed = responses.parse(**answering(text_format=Weather))
    assert isinstance(parsed.output_parsed, Weather)
    with responses.stream(**answering(text_format=Weather)) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    (call,) = responses.parse(**answering(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)).output
    assert call.type == "function_call" and isinstance(call.parsed_arguments, GetWeather)


def test_errors_are_the_clients_own(served, chat):
    with pytest.raises(openai.NotFoundError, match="nobody"):
        chat.create(**request(model="nobody"))
    with pytest.raises(openai.BadRequestError) as error:
        chat.create(**request(top_logprobs=2))
    assert error.value.body["param"] == "top_logprobs"
    assert [model.id for model in served.openai.models.list()] == ["trunk", "a", "b"]


def test_the_asynchronous_client(served):
    async def both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            answers = [client.chat.completions.create(**request(model=name)) for name in ("a", "b")]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]

    said = asyncio.run(both())
    alone = [served.openai.chat.completions.create(**request(model=name)) for name in ("a", "b")]
    assert said == [answer.choices[0].message.content for answer in alone]
