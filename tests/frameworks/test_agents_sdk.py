"""The OpenAI Agents SDK, against the tiny trunk: tools, handoffs, output types, streams, all settings of a model."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    SQLiteSession,
    function_tool,
)
from agents.models.openai_provider import OpenAIProvider
from openai.types.shared import Reasoning

from tests.frameworks.schemas import Weather, get_weather

T = TypeVar("T")


class Run:
    """A run of agents, each a head; one client for one event loop."""

    def __init__(self, url: str, model: type[OpenAIChatCompletionsModel] | type[OpenAIResponsesModel]):
        self.model = model
        self.question = f"What is the weather? ({model.__name__})"  # not in the cache yet
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def agent(self, head: str, **fields: Any) -> Agent:
        settings = ModelSettings(temperature=0, max_tokens=100).resolve(fields.pop("settings", None))
        model = self.model(head, self.client)
        return Agent(head, instructions="Be brief.", model=model, model_settings=settings, **fields)

    def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        async def closing() -> T:
            async with self.client:
                return await work

        return asyncio.run(closing())


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel], ids=["chat", "responses"])
def run(served, request) -> Run:
    return Run(served.url, request.param)


def test_a_tool_is_called_and_answered(run):
    settings = ModelSettings(tool_choice="required", parallel_tool_calls=False)
    agent = run.agent("a", tools=[function_tool(get_weather)], settings=settings, output_type=Weather)
    result = run(Runner.run(agent, "What is the weather?"))
    call, told, _ = result.new_items
    assert call.raw_item.name == "get_weather" and told.output.startswith("It rains in ")
    assert isinstance(result.final_output, Weather)
    first, second = (answer.usage for answer in result.raw_responses)
    assert second.input_tokens > first.total_tokens


def handing_over(run: Run) -> Agent:
    """The agent a, which must hand over to b. Both have the same instructions and tools."""
    b = run.agent("b", settings=ModelSettings(tool_choice="none"), output_type=Weather)
    a = run.agent("a", settings=ModelSettings(tool_choice="transfer_to_b", include_usage=True))
    a.handoffs = b.handoffs = [a, b]
    return a


def test_a_handoff_is_another_head(run):
    result = run(Runner.run(handing_over(run), run.question))
    assert (result.last_agent.name, [item.type for item in result.new_items]) == (
        "b",
        ["handoff_call_item", "handoff_output_item", "message_output_item"],
    )
    first, second = (answer.usage for answer in result.raw_responses)
    # The last token of an answer has no K/V yet.
    assert second.input_tokens_details.cached_tokens == first.total_tokens - 1


def test_a_streamed_handoff(run):
    async def stream() -> tuple[set[str], Any]:
        result = Runner.run_streamed(handing_over(run), "What is the weather?")
        kinds = set()
        async for event in result.stream_events():
            kinds.add(event.data.type if event.type == "raw_response_event" else event.type)
        return kinds, result

    kinds, result = run(stream())
    assert {"agent_updated_stream_event", "response.function_call_arguments.delta"} <= kinds
    assert {"response.output_text.delta", "response.completed"} <= kinds
    assert result.last_agent.name == "b" and isinstance(result.final_output, Weather)
    assert result.context_wrapper.usage.requests == 2 and result.context_wrapper.usage.output_tokens > 8


def test_every_setting_of_a_model(run):
    settings = ModelSettings(
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        metadata={"run": "1"},
        store=True,
        prompt_cache_retention="24h",
        top_logprobs=2,
        reasoning=Reasoning(effort="low"),
        verbosity="low",
        truncation="auto",
        extra_body={"session": {"id": "s", "retain": 1}},
    )
    agent = run.agent("a", settings=settings, output_type=Weather)
    assert isinstance(run(Runner.run(agent, "Hi")).final_output, Weather)


def test_heads_by_name_and_a_conversation_in_a_session(run):
    responses = run.model is OpenAIResponsesModel
    config = RunConfig(model_provider=OpenAIProvider(openai_client=run.client, use_responses=responses))
    session = SQLiteSession("conversation")
    a, b = (Agent(name, instructions="Be brief.", model=name, output_type=Weather) for name in "ab")

    async def twice() -> list[Any]:
        return [await Runner.run(agent, run.question, session=session, run_config=config) for agent in (a, b)]

    first, second = (result.raw_responses[0].usage for result in run(twice()))
    assert second.input_tokens_details.cached_tokens == first.total_tokens - 1


def test_an_agent_as_a_tool(run):
    tool = run.agent("b", output_type=Weather).as_tool("ask_b", "Ask b.", max_turns=1)
    tool.params_json_schema["properties"]["input"]["maxLength"] = 20  # else a random trunk writes for ever
    settings = ModelSettings(tool_choice="ask_b")
    agent = run.agent("a", tools=[tool], settings=settings, tool_use_behavior="stop_on_first_tool")
    result = run(Runner.run(agent, "Hi"))
    assert [item.type for item in result.new_items] == ["tool_call_item", "tool_call_output_item"]
    assert "celsius" in str(result.final_output)
