"""LangChain's ChatOpenAI and a LangGraph agent, against the tiny trunk."""

from __future__ import annotations

import asyncio
import functools
import operator
from collections.abc import Iterable
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from tests.frameworks.schemas import Weather, get_weather

WEATHER = tool(get_weather)
both_apis = pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])


@pytest.fixture
def chat(served):
    def chat(head: str = "a", **fields: Any) -> ChatOpenAI:
        fields = {"temperature": 0, "max_tokens": 100, "max_retries": 0, **fields}
        return ChatOpenAI(base_url=f"{served.url}/v1", api_key="none", model=head, **fields)

    return chat


def joined(chunks: Iterable[AIMessageChunk]) -> AIMessageChunk:
    return functools.reduce(operator.add, chunks)


def test_whole_and_streamed(chat):
    model = chat(max_tokens=8, stream_usage=True, logprobs=True, top_logprobs=2)

    async def stream() -> list[AIMessageChunk]:
        return [chunk async for chunk in model.astream("Hi")]

    whole = model.invoke("Hi")
    for streamed in (joined(model.stream("Hi")), joined(asyncio.run(stream()))):
        assert streamed.content == whole.content
        assert whole.usage_metadata["output_tokens"] == streamed.usage_metadata["output_tokens"] == 8
    assert whole.response_metadata["model_name"] == "a"


def test_every_setting_of_a_model(chat):
    settings = {
        "seed": 1,
        "n": 2,
        "top_p": 0.9,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "stop": ["\n\n"],
        "logit_bias": {5: 1},
        "reasoning_effort": "low",
        "verbosity": "low",
        "service_tier": "auto",
        "store": True,
        "metadata": {"run": "1"},
        "extra_body": {"session": {"id": "s", "retain": 1}},
    }
    answer = chat(max_tokens=4, **settings).invoke("Hi", prompt_cache_key="conversation")
    assert answer.usage_metadata["output_tokens"] == 8


@pytest.mark.parametrize("choice", ["any", "get_weather", True], ids=str)
@both_apis
def test_bind_tools(chat, choice, responses):
    model = chat(stream_usage=True, use_responses_api=responses)
    model = model.bind_tools([WEATHER], tool_choice=choice, strict=True, parallel_tool_calls=False)
    (call,) = model.invoke("What is the weather?").tool_calls
    assert call["name"] == "get_weather" and WEATHER.invoke(call["args"]).startswith("It rains in ")
    streamed = joined(model.stream("What is the weather?"))
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], call["args"])]
    assert streamed.usage_metadata["input_token_details"]["cache_read"] > 0


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@both_apis
def test_with_structured_output(chat, method, responses):
    for form in (Weather, {"title": "weather", "description": "The weather.", **Weather.model_json_schema()}):
        model = chat(use_responses_api=responses).with_structured_output(form, method=method, include_raw=True)
        answer = model.invoke("What is the weather?")
        assert answer["parsing_error"] is None
        assert Weather.model_validate(answer["parsed"])
    assert list(model.stream("What is the weather?"))


def test_the_forms_of_messages(chat):
    call = {"name": "get_weather", "args": {"city": "Oslo"}, "id": "call", "type": "tool_call"}
    messages = [
        SystemMessage([{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]),
        HumanMessage(["What is", {"type": "text", "text": "the weather?"}], name="someone"),
        AIMessage([{"type": "reasoning", "reasoning": "Hm."}, {"type": "text", "text": "I look."}], tool_calls=[call]),
        ToolMessage([{"type": "text", "text": "It rains."}], tool_call_id="call"),
    ]
    assert chat(max_tokens=4).invoke(messages).usage_metadata["output_tokens"] == 4
    plain = [
        SystemMessage("Be brief."),
        HumanMessage("What is\nthe weather?"),
        AIMessage("I look.", tool_calls=[call]),
        ToolMessage("It rains.", tool_call_id="call"),
    ]
    usage = chat(max_tokens=4).invoke(plain).usage_metadata
    assert usage["input_token_details"]["cache_read"] == usage["input_tokens"], "both are the same prompt"


def test_a_graph_whose_nodes_are_heads(chat):
    asks = chat("a").bind_tools([WEATHER], tool_choice="any")
    graph = StateGraph(MessagesState)
    graph.add_node("asks", lambda state: {"messages": [asks.invoke(state["messages"])]})
    graph.add_node("tools", ToolNode([WEATHER]))
    graph.add_node("answers", lambda state: {"messages": [chat("b", max_tokens=8).invoke(state["messages"])]})
    graph.add_edge(START, "asks")
    graph.add_conditional_edges("asks", tools_condition)
    graph.add_edge("tools", "answers")
    *_, calling, told, answer = graph.compile().invoke({"messages": [("user", "What is the weather?")]})["messages"]
    assert calling.tool_calls and told.content.startswith("It rains in ")
    assert (answer.response_metadata["model_name"], answer.usage_metadata["output_tokens"]) == ("b", 8)


def test_completions(served):
    model = OpenAI(base_url=f"{served.url}/v1", api_key="none", model="a", temperature=0, max_tokens=4, max_retries=0)
    assert model.invoke("Hi") == "".join(model.stream("Hi"))
