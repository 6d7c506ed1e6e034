"""What an answer has to follow: the fields that say it, what reaches the engine, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from icarus_jax.grammar import compile_queue, trial
from icarus_jax.scheduling.request import SamplingParams, TokenOutput
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.prompts import Prompt
from icarus_jax.server.streams import Choice
from tests.grammar.following import accepts
from tests.server.served import CHAT, EOS, GOOD, TOKENIZER, Served, check_error, ids_of, serving

APIS = {"/v1/completions": GOOD, "/v1/chat/completions": CHAT}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(eos_ids=(EOS,)) as server:
        yield server


def json_schema(schema: object, **more: object) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}}


# What is asked; a text that follows it, and one that does not.
ASKED = [
    (json_schema(SCHEMA, strict=True), '{"a": 5}', '{"a": "5"}'),
    (json_schema(SCHEMA, strict=None, description=None), '{"a": 5}', "{}"),
    (json_schema({}), "[1]", "[1"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "[1]", "[1"),
    ({"response_format": {"type": "json_object"}}, '{"b": []}', "[]"),
    ({"structured_outputs": {"json": SCHEMA}}, '{"a": 5}', "{}"),
    ({"structured_outputs": {"json_object": True}}, "{}", "[]"),
    ({"structured_outputs": {"regex": "[ab]+", "whitespace_pattern": "x", "_backend": "y"}}, "ab", "c"),
    ({"structured_outputs": {"choice": ["yes", "no"], "structural_tag": None}}, "no", "maybe"),
    ({"structured_outputs": {"grammar": 'start: "x"'}}, "x", "y"),
    ({"guided_json": SCHEMA}, '{"a": 5}', "{}"),
    ({"guided_json": '{"type": "integer"}', "guided_whitespace_pattern": " "}, "5", "x"),
    ({"guided_json": {}}, "[1]", "[1"),
    ({"guided_regex": "[ab]+", "guided_decoding_backend": "any"}, "ab", "c"),
    ({"guided_choice": ["yes", "no"]}, "yes", "maybe"),
    ({"guided_grammar": 'start: "x"', "response_format": {"type": "text"}}, "x", "y"),
]


@pytest.mark.parametrize("asked, right, wrong", ASKED, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
@pytest.mark.parametrize("path", APIS)
def test_the_grammar_reaches_the_engine(served, path, asked, right, wrong):
    answer = served.http.post(path, json=APIS[path] | asked)
    assert answer.status_code == 200, answer.text
    grammar = served.engine.requests[-1].grammar
    assert accepts(grammar, right) and not accepts(grammar, wrong)


@pytest.mark.parametrize("path", APIS)
def test_free_text_has_none(served, path):
    for asked in ({}, {"response_format": {"type": "text"}}, {"guided_json": None, "structured_outputs": None}):
        assert served.http.post(path, json=APIS[path] | asked).status_code == 200
        assert served.engine.requests[-1].grammar is None


def test_all_prompts_and_models_of_a_request_have_it(served):
    asked = {"prompt": [[5], [6]], "models": ["trunk", "parrot"], "n": 2, "guided_choice": ["a"], "stream": True}
    asked["handoff"] = [{"on": 7, "model": "parrot"}]
    assert served.http.post("/v1/completions", json=GOOD | asked).status_code == 200
    first, second = served.engine.requests[-2:]
    assert first.grammar is second.grammar is not None
    assert first.handoff is not None and first.models == ("trunk", "parrot")


def explosive(prime: int) -> dict:
    """A schema that takes hours to compile."""
    return {"allOf": [{"type": "integer", "multipleOf": p} for p in (prime, 89, 83, 79)]}


DEEP: dict = {"type": "string"}
for _ in range(250):
    DEEP = {"type": "array", "items": DEEP}
WRONG = [
    ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format", "json_schema"),
    (json_schema([]), "response_format", "object"),
    (json_schema({"type": "foo"}), "response_format", "foo"),
    (json_schema({"type": "array", "uniqueItems": True}), "response_format", "uniqueItems"),
    (json_schema({"x": "a" * 200_001}), "response_format", "at most 200000"),
    ({"structured_outputs": {}}, "structured_outputs", "nothing"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex and choice"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", "no choices"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag", "not supported"),
    ({"structured_outputs": {"json": {}, "disable_additional_properties": True}}, "structured_outputs", "False"),
    ({"structured_outputs": "a"}, "structured_outputs", ""),
    ({"guided_json": 5}, "guided_json", ""),
    ({"guided_json": "{"}, "guided_json", "EOF"),
    ({"guided_regex": "("}, "guided_regex", "unclosed"),
    ({"guided_choice": [1]}, "guided_choice", ""),
    ({"guided_choice": []}, "guided_choice", "no choices"),
    ({"guided_grammar": "start: foo"}, "guided_grammar", "foo"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "guided_json and guided_regex exclude"),
    (json_schema({}) | {"structured_outputs": {"json": {}}}, "structured_outputs", "response_format and"),
    ({"guided_json": explosive(97)}, "guided_json", "more than 1 s"),
]


@pytest.mark.parametrize("asked, field, reason", WRONG, ids=lambda v: v[:20] if isinstance(v, str) else "")
@pytest.mark.parametrize("path", APIS)
def test_what_is_wrong_is_a_400_that_names_the_field(served, path, asked, field, reason):
    error = check_error(served.http.post(path, json=APIS[path] | asked), 400, field)
    assert reason in error["message"]


def test_a_schema_nested_too_deeply_is_a_400(served):
    answer = served.http.post("/v1/completions", json=GOOD | {"guided_json": DEEP})
    assert answer.status_code == 400, answer.text


def test_others_are_answered_while_grammars_compile(monkeypatch):
    """More explosive grammars than the server has threads, and requests without a grammar or with a known one."""
    monkeypatch.setattr(trial, "CPU_SECONDS", 0.3)
    refused: list = []
    with serving(eos_ids=(EOS,)) as served, ThreadPoolExecutor(12) as clients:

        def ask(**more) -> httpx.Response:
            return served.http.post("/v1/completions", json=GOOD | more)

        assert ask(guided_json=SCHEMA).status_code == 200
        for i in range(12):
            clients.submit(lambda i=i: refused.append(ask(guided_json=explosive(101 + i))))
        meanwhile = [0]
        while len(refused) < 12:
            before = len(refused)
            assert ask().status_code == ask(guided_json=SCHEMA).status_code == 200
            meanwhile.append(len(refused) - before)
    for answer in refused:
        assert "more than 0.3 s" in check_error(answer, 400, "guided_json")["message"]
    assert max(meanwhile) < 6  # who waits for a thread has seen most of them refused


def test_too_many_grammars_are_a_429(served, monkeypatch):
    """Which names the field, and costs those without a new grammar nothing."""
    asked = GOOD | {"guided_choice": ["one", "two"]}
    monkeypatch.setattr(compile_queue, "MOST", 0)
    refused = served.http.post("/v1/completions", json=asked)
    error = check_error(refused, 429, "guided_choice", "rate_limit_exceeded")
    assert error["type"] == "rate_limit_error" and refused.headers["retry-after"] in error["message"]
    assert served.http.post("/v1/completions", json=GOOD).status_code == 200
    monkeypatch.undo()
    assert served.http.post("/v1/completions", json=asked).status_code == 200
    monkeypatch.setattr(compile_queue, "MOST", 0)
    assert served.http.post("/v1/completions", json=asked).status_code == 200  # it is known now


def test_a_grammars_end_keeps_its_last_token():
    """The engine ends an answer with 'stop' once its grammar has ended: that token is text, unlike a stop token."""
    vocabulary = Vocabulary(TOKENIZER)
    ids = ids_of("ab")

    def said(last: int, **params) -> tuple[str, object]:
        choice = Choice(
            0, "m", Prompt((5,), None, "prompt"), SamplingParams(**params), vocabulary, frozenset([EOS]), True
        )
        text = choice.feed(TokenOutput(0, [ids[0]], "m")).text
        delta = choice.feed(TokenOutput(0, [last], "m", finish_reason="stop"))
        assert delta.finish_reason == "stop"
        return text + delta.text, delta.stop_reason

    assert len(ids) == 2
    assert said(ids[1]) == ("ab", None)
    assert said(ids[1], stop_token_ids=(ids[1],)) == ("a", ids[1])
    assert said(EOS) == ("a", None)
    assert said(EOS, ignore_eos=True) == ("a", None)  # special, so it is no text


def test_openapi_names_the_schema(served):
    schemas = served.http.get("/openapi.json").json()["components"]["schemas"]
    assert "schema" in schemas["JsonSchema"]["properties"]
    assert {"json", "regex", "choice", "grammar", "json_object"} <= set(schemas["StructuredOutputs"]["properties"])
