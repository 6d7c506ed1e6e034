"""The shipped head for tool calls calls by itself, which its trunk does not; by the openai client."""

from __future__ import annotations

import json

import openai
import pytest

pytestmark = [pytest.mark.heavy, pytest.mark.full]


def function(name: str, description: str, **arguments: str) -> dict:
    properties = {key: {"type": "string", "description": text} for key, text in arguments.items()}
    schema = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    function("getWeatherForecast", "Retrieve the weather forecast of a city", city="The name of the city"),
    function("sendEmail", "Send an email", recipient="The email address", subject="The subject of the email"),
    function("translateText", "Translate a text", text="The text", target_language="The language to translate to"),
]


def test_the_head_calls_and_the_trunk_does_not(smollm):
    chat = openai.OpenAI(base_url=f"{smollm.url}/v1", api_key="none").chat.completions
    asked = {"messages": [{"role": "user", "content": "Retrieve the weather forecast of Paris."}], "tools": TOOLS}
    trunk, head = (
        chat.create(model=model, temperature=0, max_tokens=60, **asked).choices[0]
        for model in ("smollm2-135m-instruct", "tools")
    )
    assert not trunk.message.tool_calls
    assert head.finish_reason == "tool_calls"
    (call,) = head.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("getWeatherForecast", {"city": "Paris"})
