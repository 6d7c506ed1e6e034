"""The Responses API, with OpenAI's client: its own types judge every event and every object."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import threading
from array import array
from collections.abc import Iterator

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item_list import ResponseItemList

from icarus_jax.server import response_routes
from icarus_jax.server.auth import Keys
from icarus_jax.server.body import ApiError
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.prompts import Prompt
from icarus_jax.server.protocol import RETAIN_SECONDS
from icarus_jax.server.response_store import ResponseStore, Stored
from icarus_jax.server.response_transcript import Transcript
from icarus_jax.weights import tokenizer
from tests import doubles, tiny
from tests.engine.harness import SMALL, make_engine
from tests.server.served import EOS, TOKENIZER, Served, check_error, ids_of, serving, wait_for
from tests.server.test_event_loop import watched
from tests.server.test_tools import CITY, LOOK, LOOK_ARGUMENTS, SHUT, Said, look

PATH = "/v1/responses"
GOOD = {"model": "trunk", "input": "hi", "max_output_tokens": 4, "temperature": 0}
TOOLS = [
    {"type": "function", "name": "look", "description": "Looks.", "parameters": CITY},
    {"type": "function", "name": "shut", "parameters": None},
]
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(eos_ids=(EOS,)) as server:
        yield server


@pytest.fixture(scope="module")
def made() -> Iterator[Said]:
    said = Said()
    with contextlib.closing(said.served):
        yield said


@pytest.fixture
def said(made) -> Said:
    made.shows("<tool_call>")
    return made


def whole(server: Served, **fields) -> dict:
    """A response, checked by the client's type."""
    answer = server.http.post(PATH, json={**GOOD, **fields})
    assert answer.status_code == 200, answer.text
    Response.model_validate(answer.json())
    return answer.json()


def streamed(server: Served, **fields) -> list[dict]:
    """The events of a response. Each has the client's type, its number, and says what the ones before it said."""
    answer = server.http.post(PATH, json={**GOOD, **fields, "stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.text
    events = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        assert type(EVENT.validate_python(events[-1])).model_fields["type"].annotation, events[-1]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def put_together(events: list[dict]) -> list[dict]:
    """The output, of the deltas alone; checks that what is done says the same."""
    output: list[dict] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(output) and event["item"]["status"] == "in_progress"
            output.append({**event["item"], "said": ""})
        elif kind.endswith(".delta"):
            assert event["item_id"] == output[-1]["id"] and event["output_index"] == len(output) - 1
            output[-1]["said"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == output[-1]["said"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == output[-1]["said"]
        elif kind == "output_item.done":
            assert event["item"]["id"] == output[-1]["id"]
            output[-1] = event["item"]
    return output


def plain(output: list[dict]) -> list[tuple]:
    """What the items say, without their ids."""
    names = ("type", "status", "name", "arguments")
    return [(*map(item.get, names), *(part["text"] for part in item.get("content") or ())) for item in output]


def test_a_text(served):
    response = whole(served, metadata={"a": "b"}, user="me")
    assert response["status"] == "incomplete" and response["incomplete_details"] == {"reason": "max_output_tokens"}
    chat = served.http.post(
        "/v1/chat/completions",
        json={"model": "trunk", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0},
    ).json()
    assert plain(response["output"]) == [
        ("message", "incomplete", None, None, chat["choices"][0]["message"]["content"])
    ]
    shown = {"metadata": {"a": "b"}, "user": "me", "temperature": 0, "top_p": 1, "store": True, "tools": []}
    shown |= {"text": {"format": {"type": "text"}}, "max_output_tokens": 4, "truncation": "disabled"}
    assert shown.items() <= response.items()
    num = chat["usage"]["prompt_tokens"]
    assert response["usage"] == {
        "input_tokens": num,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": num},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num + 4,
    }


def test_the_events_of_a_text(served):
    events = streamed(served)
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas >= 2
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert [event["response"]["status"] for event in events[:2]] == ["in_progress"] * 2
    assert events[0]["response"]["output"] == []
    last = events[-1]["response"]
    assert put_together(events) == last["output"] and plain(last["output"]) == plain(whole(served)["output"])
    assert served.http.get(f"{PATH}/{last['id']}").json() == last


def test_reasoning_text_and_calls(said):
    said.shows("<tool_call> <think>")
    text = f"<think>\nSo, so.\n</think>\n\nWell: <tool_call>\n{LOOK}\n</tool_call>\n<tool_call>\n{SHUT}\n</tool_call>"
    fields = {"model": "parrot", "input": text, "tools": TOOLS, "max_output_tokens": None}
    want = [
        ("reasoning", "completed", None, None, "So, so."),
        ("message", "completed", None, None, "Well: "),
        ("function_call", "completed", "look", LOOK_ARGUMENTS),
        ("function_call", "completed", "shut", "{}"),
    ]
    response, events = whole(said.served, **fields), streamed(said.served, **fields)
    assert plain(response["output"]) == plain(put_together(events)) == want
    assert response["status"] == events[-1]["response"]["status"] == "completed" and response["completed_at"]
    kinds = [event["type"].removeprefix("response.") for event in events]
    for kind in ("reasoning_text", "output_text", "function_call_arguments"):
        assert kinds.count(f"{kind}.delta") > 1 and kinds.index(f"{kind}.delta") < kinds.index(f"{kind}.done")
    thought = len(said.tokenizer.encode("<think>\nSo, so.\n</think>\n\n"))
    for made in (response, events[-1]["response"]):
        assert abs(made["usage"]["output_tokens_details"]["reasoning_tokens"] - thought) <= 1


def test_what_the_length_cuts_off(said):
    cut = len(said.tokenizer.encode(f"<tool_call>{LOOK}".partition("rich")[0]))
    fields = {"model": "parrot", "input": f"<tool_call>{LOOK}</tool_call>", "tools": TOOLS, "max_output_tokens": cut}
    for response in (whole(said.served, **fields), streamed(said.served, **fields)[-1]["response"]):
        assert plain(response["output"]) == [("function_call", "incomplete", "look", '{"city": "Zü')]
        assert response["status"] == "incomplete"


def test_an_empty_answer_is_an_empty_message(said):
    said.tokenizer.chat_template = "<|im_end|>"
    for response in (whole(said.served, model="parrot"), streamed(said.served, model="parrot")[-1]["response"]):
        assert plain(response["output"]) == [("message", "completed", None, None, "")]


class Place(pydantic.BaseModel):
    city: str


def test_the_clients_helpers(said):
    responses = said.served.openai.responses
    text = f"Well: <tool_call>{LOOK}</tool_call>"
    tool = openai.pydantic_function_tool(look)["function"] | {"type": "function"}
    with responses.stream(model="parrot", input=text, temperature=0, tools=[tool]) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.output_text.delta", "response.function_call_arguments.done", "response.completed"} <= kinds
    assert final.output_text == "Well: " and final.output[1].arguments == LOOK_ARGUMENTS
    parsed = responses.parse(model="parrot", input='{"city": "Bern"}', temperature=0, text_format=Place)
    assert parsed.output_parsed == Place(city="Bern")
    assert said.engine.requests[-1].grammar is not None
    assert responses.create(model="parrot", input="Hi", temperature=0).output_text == "Hi"


def test_log_probabilities(served):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    (part,) = whole(served, **fields)["output"][0]["content"]
    assert len(part["logprobs"]) == 4 and all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]
    events = streamed(served, **fields)
    pieces = [entry for event in events if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    assert pieces == part["logprobs"] == events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert events[3]["part"]["logprobs"] == [] and whole(served)["output"][0]["content"][0]["logprobs"] == []


def test_a_handoff(served):
    at = ids_of("assistant\n")[-1] + 2  # the trunk counts
    response = whole(served, handoff=[{"on": at, "model": "parrot"}])
    assert response["handoffs"] == [{"token": 2, "model": "parrot"}]
    assert response["usage"]["by_model"] == {"trunk": {"output_tokens": 2}, "parrot": {"output_tokens": 2}}
    assert streamed(served, handoff=[{"on": at, "model": "parrot"}])[-1]["response"]["handoffs"] == response["handoffs"]


def test_an_error_within_a_stream_is_its_last_event(served):
    first = TOKENIZER.encode("<|im_start|>")[0]
    fields = {"model": "broken", "max_output_tokens": first + 20}
    check_error(served.http.post(PATH, json=GOOD | fields), 500, None, "engine_error")
    events = streamed(served, **fields)
    last = events[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error" and last["response"]["error"]["message"]
    check_error(served.http.get(f"{PATH}/{last['response']['id']}"), 404, "response_id", "response_not_found")
    # What was being written is done before that, and says so.
    kinds = [event["type"].removeprefix("response.") for event in events[-4:]]
    assert kinds == ["output_text.done", "content_part.done", "output_item.done", "failed"]
    (item,) = put_together(events)
    assert item["status"] == "incomplete" and item["content"][0]["text"] == events[-4]["text"] != ""
    assert last["response"]["output"] == [item]


def test_an_error_before_the_first_item_makes_none(served, monkeypatch):
    step = served.engine._step
    failing = lambda *args: dataclasses.replace(step(*args), token_ids=[], finish_reason="error")  # noqa: E731
    monkeypatch.setattr(served.engine, "_step", failing)
    events = streamed(served)
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]
    assert events[-1]["response"]["output"] == []


def test_a_grammar_that_gives_up_fails_the_response(served, monkeypatch):
    step = served.engine._step

    def gives_up(*args):
        output = step(*args)
        return dataclasses.replace(output, finish_reason=output.finish_reason and "grammar_error")

    monkeypatch.setattr(served.engine, "_step", gives_up)
    events = streamed(served)
    assert events[-1]["type"] == "response.failed" and events[-2]["type"] == "response.output_item.done"
    for response in (whole(served), events[-1]["response"]):
        assert response["status"] == "failed" and "too complex" in response["error"]["message"]
        assert plain(response["output"])[0][:2] == ("message", "incomplete") and response["usage"]["output_tokens"] == 4
        wait_for(lambda: response["id"] in served.engine.released)  # noqa: B023
    monkeypatch.undo()
    whole(served, input="on", previous_response_id=response["id"])
    session = served.engine.requests[-1].session.id
    assert session != response["id"] and session not in served.engine.released


def test_a_client_that_goes_away_stops_the_model():
    with serving(step_seconds=0.02) as slow:
        stream = slow.openai.responses.create(model="trunk", input="hi", stream=True)
        next(event for event in stream if event.type == "response.output_text.delta")
        stream.close()
        wait_for(lambda: slow.engine.aborted)


# ---- items and what the model reads of them


def chat_ids(server: Served, messages: list[dict], **fields) -> tuple[int, ...]:
    body = {"model": "trunk", "messages": messages, "max_tokens": 1, **fields}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return server.engine.requests[-1].prompt_ids


CALLS = "{% for m in messages %}[{{ m.role }}|{{ m.content }}|{{ m.reasoning_content }}|{{ m.tool_calls }}]{% endfor %}"


def test_items_are_messages(said):
    said.tokenizer.chat_template = "{# tools #}" + CALLS
    output = whole(said.served, store=False)["output"]
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": t} for t in "ab"]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Well", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": LOOK_ARGUMENTS, "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "shut", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "done"}]},
        *output,
        {"role": "user", "content": "c"},
    ]
    calls = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, name, arguments in (("c1", "look", LOOK_ARGUMENTS), ("c2", "shut", "{}"))
    ]
    messages = [
        {"role": "system", "content": "Instructions."},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "Well", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "done"},
        {"role": "assistant", "content": output[0]["content"][0]["text"]},
        {"role": "user", "content": "c"},
    ]
    want = chat_ids(said.served, messages)
    whole(said.served, input=items, instructions="Instructions.")
    assert said.engine.requests[-1].prompt_ids == want


def test_tools_and_formats_are_those_of_chats(said):
    said.shows("")
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "shut"}]}
    for choice in ("required", {"type": "function", "name": "shut"}, allowed):
        whole(said.served, tools=TOOLS, tool_choice=choice)
        assert said.engine.requests[-1].grammar is not None
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    for form in ({"type": "json_object"}, {"type": "json_schema", "name": "n", "schema": schema, "strict": True}):
        response = whole(said.served, text={"format": form, "verbosity": "low"})
        assert said.engine.requests[-1].grammar is not None and response["text"] == {"format": form}
    text = f"{LOOK} {SHUT}"
    fields = {"model": "parrot", "tools": TOOLS, "input": text, "max_output_tokens": None}
    assert len(whole(said.served, **fields)["output"]) == 2
    assert len(whole(said.served, **fields, parallel_tool_calls=False)["output"]) == 1
    assert plain(whole(said.served, **fields, tool_choice="none")["output"])[0][4] == text


@pytest.mark.parametrize(
    "change,param",
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
        ({"input": "x" * 5000}, "input"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "dig"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "odd"}}}}, "text"),
        ({"truncation": "middle"}, "truncation"),
        ({"include": ["web_search_call.results"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 1000, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"max_output_tokens": 1000}, "max_output_tokens"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"reasoning": {"effort": "huge"}}, "reasoning"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"prompt_cache_key": "x" * 300}, "prompt_cache_key"),
        ({"handoff": [{"on": "x", "model": "nobody"}]}, "handoff"),
        ({"timeout": -1.0}, "timeout"),
        ({"messages": []}, "messages"),
        ({"n": 2}, "n"),
        ({"models": ["trunk"]}, "models"),
        ({"stop": ["x"]}, "stop"),
        ({"seed": 1}, "seed"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_what_is_refused_names_the_field(served, change, param):
    body = {name: value for name, value in (GOOD | change).items() if value is not None}
    answer = served.http.post(PATH, json=body)
    long = answer.status_code == 400 and "the context holds" in answer.json()["error"]["message"]
    error = check_error(answer, 400, param, "context_length_exceeded" if long else None)
    names = {"messages", "max_tokens", "max_completion_tokens", "response_format"} - set(change)
    assert not names & set(re.findall(r"\w+", error["message"]))


def test_an_unknown_model_is_a_404(served):
    check_error(served.http.post(PATH, json=GOOD | {"model": "nobody"}), 404, "model", "model_not_found")


def test_what_asks_for_nothing_is_accepted(served):
    nothing = {"background": False, "n": 1, "stop": [], "truncation": "disabled", "service_tier": "auto"}
    nothing |= {"stream_options": {"include_obfuscation": False}, "top_logprobs": 0}
    whole(served, **nothing, tools=[], reasoning={"summary": "auto"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "slow", [(response_routes, "parse"), (Transcript, "read_on"), (ResponseStore, "add")], ids=["parse", "read", "keep"]
)
def test_what_takes_long_runs_off_the_loop(served, monkeypatch, slow, stream):
    on_loop = watched(monkeypatch, *slow, served)
    assert served.http.post(PATH, json=GOOD | {"stream": stream}).status_code == 200
    assert on_loop == [False]


# ---- what is kept


def test_a_response_is_kept_until_it_is_deleted(served):
    responses = served.openai.responses
    made = responses.create(**GOOD)
    assert responses.retrieve(made.id) == made
    check_error(served.http.get(f"{PATH}/{made.id}?stream=true"), 400, "stream")
    responses.delete(made.id)
    for answer in (
        served.http.get(f"{PATH}/{made.id}"),
        served.http.delete(f"{PATH}/{made.id}"),
        served.http.get(f"{PATH}/{made.id}/input_items"),
    ):
        check_error(answer, 404, "response_id", "response_not_found")
    body = GOOD | {"previous_response_id": made.id}
    check_error(served.http.post(PATH, json=body), 404, "previous_response_id", "response_not_found")
    unkept = whole(served, store=False)
    check_error(served.http.get(f"{PATH}/{unkept['id']}"), 404, "response_id", "response_not_found")


def test_the_input_items_are_all_that_was_read(served):
    first = whole(served, input=[{"role": "user", "content": "one"}, {"role": "user", "content": "two"}])
    second = whole(served, input="three", previous_response_id=first["id"])
    at = f"{PATH}/{second['id']}/input_items"
    listed = served.http.get(at, params={"order": "asc"}).json()
    ResponseItemList.model_validate(listed)
    texts = [item["content"][0]["text"] for item in listed["data"]]
    assert texts == ["one", "two", first["output"][0]["content"][0]["text"], "three"]
    assert listed["data"][2]["id"] == first["output"][0]["id"] and not listed["has_more"]
    pages = served.openai.responses.input_items.list(second["id"], limit=3)
    assert [item.id for item in pages] == [item["id"] for item in reversed(listed["data"])]
    for query, param in (({"order": "up"}, "order"), ({"limit": "0"}, "limit"), ({"after": "x"}, "after")):
        check_error(served.http.get(at, params=query), 400, param)


def test_nobody_reads_the_responses_of_another():
    keys = Keys(["ann:sk-ann", "bob:sk-bob"])
    with serving(keys=keys) as server:
        ann, bob = ({"Authorization": f"Bearer sk-{name}"} for name in ("ann", "bob"))
        made = server.http.post(PATH, json=GOOD, headers=ann).json()
        assert server.engine.requests[-1].session.id == f"ann:{made['id']}"
        assert server.http.get(f"{PATH}/{made['id']}", headers=ann).status_code == 200
        body = GOOD | {"previous_response_id": made["id"]}
        for method, path, json_body, param in (
            ("GET", f"{PATH}/{made['id']}", None, "response_id"),
            ("GET", f"{PATH}/{made['id']}/input_items", None, "response_id"),
            ("DELETE", f"{PATH}/{made['id']}", None, "response_id"),
            ("POST", PATH, body, "previous_response_id"),
        ):
            answer = server.http.request(method, path, json=json_body, headers=bob)
            check_error(answer, 404, param, "response_not_found")
        assert server.http.post(PATH, json=body, headers=ann).status_code == 200


def test_the_oldest_responses_of_a_tenant_go_first():
    store = ResponseStore(max_count=3, max_bytes=1000)

    def add(tenant: str, name: str, size: int = 100) -> list[str]:
        whole = Transcript("text" * 5, array("i", [1, 2]))
        return store.add(tenant, name, Stored(b"r" * (size - 60), b"c" * 30, whole, None, name.replace("c", "b")))

    def kept(tenant: str) -> str:
        names = []
        for name in "abcdefgh":
            with contextlib.suppress(ApiError):
                assert store.get(tenant, name, "response_id")
                names.append(name)
        return "".join(names)

    add("other", "h", 900)
    assert [add("", name) for name in "abcd"] == [[], [], [], ["a"]]
    assert kept("") == "bcd"
    assert add("", "e", 850) == ["b"]  # the chain of b and c
    assert kept("") == "de" and store.has("", "d") and not store.has("", "b") and not store.has("other", "d")
    assert store.delete("", "e", "response_id") == ["e"]
    add("", "f", 850)
    assert kept("") == "df"
    assert add("", "g", 2000) == ["d", "f", "g"]
    assert (kept(""), kept("other")) == ("", "h")


# ---- the conversation and its pages


def test_the_next_turn_has_the_tokens_of_the_last(said):
    """The trunk counts through the vocabulary: encoded anew, its text would have other tokens."""
    said.tokenizer.chat_template = doubles.CHAT_TEMPLATE
    encode = functools.partial(said.tokenizer.encode, add_special_tokens=False)
    first = whole(said.served, max_output_tokens=60)
    ids = said.engine.requests[-1].prompt_ids
    wrote = tuple(range(ids[-1] + 1, ids[-1] + 61))
    text = first["output"][0]["content"][0]["text"]
    assert encode(text) != list(wrote)
    second = whole(said.served, input="and", previous_response_id=first["id"])
    read = said.engine.requests[-1].prompt_ids
    tail = "<|im_end|>\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n"
    assert read == ids + wrote + tuple(encode(tail))
    assert second["previous_response_id"] == first["id"]
    third = whole(said.served, input="so", previous_response_id=second["id"])
    assert said.engine.requests[-1].prompt_ids[: len(read) + 4] == read + tuple(range(read[-1] + 1, read[-1] + 5))
    # The instructions are not those of the turn before, and stand first: all is encoded anew.
    whole(said.served, input="so", previous_response_id=first["id"], instructions="Be brief.")
    turns = [("system", "Be brief."), ("user", "hi"), ("assistant", text), ("user", "so")]
    changed = said.engine.requests[-1].prompt_ids
    assert changed == chat_ids(said.served, [{"role": role, "content": words} for role, words in turns])
    assert third["id"] != second["id"]


def test_the_output_of_a_call_goes_on_with_the_call(said):
    said.tokenizer.chat_template = "{# tools #}{{ messages[0].content }}<|im_end|>" + CALLS
    first = whole(said.served, model="parrot", input=LOOK, tools=TOOLS, max_output_tokens=None)
    (call,) = first["output"]
    told = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    whole(said.served, input=[told], previous_response_id=first["id"])
    read = said.engine.requests[-1].prompt_ids
    function = {"name": "look", "arguments": LOOK_ARGUMENTS}
    messages = [
        {"role": "user", "content": LOOK},
        {"role": "assistant", "tool_calls": [{"id": call["call_id"], "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call["call_id"], "content": "sunny"},
    ]
    assert read == chat_ids(said.served, messages)


THINKS = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"


@pytest.mark.parametrize("kept", [THINKS, ""], ids=["keeps", "forgets"])
def test_what_the_template_does_with_reasoning_is_obeyed(said, kept):
    said.tokenizer.chat_template = (
        "{{ messages[0].content }}<|im_end|>{% for m in messages[1:] %}"
        + kept
        + "{{ m.content }}<|im_end|>{% endfor %}{# <think> #}"
    )
    thought = "<think>a</think>"
    first = whole(said.served, model="parrot", input=f"{thought}b", max_output_tokens=None)
    assert [item["type"] for item in first["output"]] == ["reasoning", "message"]
    whole(said.served, model="parrot", input="c", previous_response_id=first["id"])
    text = f"{thought}b<|im_end|>{thought if kept else ''}b<|im_end|>c<|im_end|>"
    assert said.engine.requests[-1].prompt_ids == tuple(said.tokenizer.encode(text))


def test_a_hidden_special_token_is_not_read_again(said):
    """It would begin or end a turn that nobody has seen. The next turn has what the items say."""
    said.tokenizer.chat_template = doubles.CHAT_TEMPLATE
    first = whole(said.served, input="one", max_output_tokens=4)
    read = said.engine.requests[-1].prompt_ids
    before = read + tuple(range(read[-1] + 1, read[-1] + 5))
    second = whole(said.served, model="parrot", input="two", max_output_tokens=40, previous_response_id=first["id"])
    read = said.engine.requests[-1].prompt_ids
    special = Vocabulary(said.tokenizer).special_ids
    assert read[: len(before)] == before and special.intersection(read[:40])  # which the parrot said
    (words,) = (part["text"] for part in second["output"][0]["content"])
    assert words and not Vocabulary(said.tokenizer).holds_special(words)
    third = whole(said.served, input="three", previous_response_id=second["id"])
    ids = said.engine.requests[-1].prompt_ids
    tail = f"<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n{words}<|im_end|>\n"
    tail += "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    assert ids == before + tuple(said.tokenizer.encode(tail, add_special_tokens=False))
    # The conversation goes on token for token from there.
    whole(said.served, input="four", previous_response_id=third["id"])
    assert said.engine.requests[-1].prompt_ids[: len(ids) + 4] == ids + tuple(range(ids[-1] + 1, ids[-1] + 5))


def test_the_beginning_of_a_transcript():
    """It ends where an answer does and a special token follows: there the rest may be encoded by itself."""
    vocabulary = Vocabulary(TOKENIZER)
    empty = Transcript()
    one = empty.with_answer(Prompt((1, 2, 3), "<|im_start|>", "messages"), "ab", [4, 5])
    two = one.with_answer(Prompt((1, 2, 3, 4, 5, 6), "<|im_start|>ab<|im_end|>", "messages"), "cd", [7, 8, 9])
    assert (two.text, two.ids.tolist()) == ("<|im_start|>ab<|im_end|>cd", list(range(1, 10)))
    assert two.beginning_of(two.text + "<|im_end|>more", vocabulary) == two
    for text in (two.text + "more", two.text[:-1] + "x<|im_end|>", one.text + "<|im_end|>"):
        assert two.beginning_of(text, vocabulary) == one
    for text in ("<|im_start|>", one.text, "else", one.text + "more"):
        assert two.beginning_of(text, vocabulary) == empty


def test_a_chain_has_a_session(served):
    def session(**fields):
        response = whole(served, **fields)
        return response["id"], served.engine.requests[-1].session

    first, hint = session()
    assert (hint.id, hint.retain_s, hint.next_model) == (first, RETAIN_SECONDS, None)
    second, hint = session(previous_response_id=first)
    assert hint.id == first and session(previous_response_id=second)[1].id == first
    assert session(store=False)[1] is None
    named, hint = session(prompt_cache_key="mine")
    assert (hint.id, hint.retain_s) == ("mine", RETAIN_SECONDS)
    named, hint = session(session={"id": "ours", "retain": 5.0, "next_model": "parrot"}, previous_response_id=named)
    assert (hint.id, hint.retain_s, hint.next_model) == ("ours", 5.0, "parrot")
    assert session(previous_response_id=named)[1] == hint


def test_the_cache_key_of_a_chat_names_a_session(served):
    chat_ids(served, [{"role": "user", "content": "hi"}], prompt_cache_key="mine")
    hint = served.engine.requests[-1].session
    assert (hint.id, hint.retain_s) == ("mine", RETAIN_SECONDS)
    chat_ids(served, [{"role": "user", "content": "hi"}], prompt_cache_key="mine", session={"id": "ours"})
    assert served.engine.requests[-1].session.id == "ours"


PAGE = SMALL.page_size


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[Served]:
    """A random trunk and a head, and few pages. A token is a byte, if it has a text at all."""
    path = tmp_path_factory.mktemp("model")
    folder = tiny.tiny_model("llama", path)
    config = dataclasses.replace(SMALL, max_num_seqs=2, max_model_len=160, num_pages=64)
    engine = make_engine(folder, {"a": (tiny.tiny_adapter(folder, path), "shared")}, config)
    with contextlib.closing(Served(engine, tokenizer.load_tokenizer(folder))) as server:
        yield server


def test_nothing_that_was_said_is_prefilled_again(real):
    before, turn = None, None
    for i, model in enumerate(("trunk", "a", "trunk", "a")):
        previous = {} if before is None else {"previous_response_id": before["id"]}
        turn = whole(real, model=model, input=f"turn {i}", max_output_tokens=11 + i, **previous)
        if before is not None:
            said = before["usage"]["input_tokens"] + before["usage"]["output_tokens"] - 1  # the last one is not stored
            assert said // PAGE * PAGE <= turn["usage"]["input_tokens_details"]["cached_tokens"] <= said
        before = turn


def test_a_chain_keeps_its_pages_while_others_come_and_go(real):
    first = whole(real, input="keep this", max_output_tokens=12)
    for i in range(6):
        whole(real, input=f"{i}" * 60, max_output_tokens=12, store=False)
    second = whole(real, model="a", input="on", previous_response_id=first["id"])
    said = first["usage"]["input_tokens"] + first["usage"]["output_tokens"] - 1
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= said // PAGE * PAGE


def sessions(real: Served) -> set[str]:
    return set(real.engine.scheduler.sessions._held)


def test_the_pages_of_a_chain_go_with_its_last_response(real):
    first = whole(real, input="one")
    second = whole(real, model="a", input="two", previous_response_id=first["id"])
    named = whole(real, input="three", prompt_cache_key="mine")
    assert {first["id"], "mine"} <= sessions(real)
    for response, left in ((first, {first["id"], "mine"}), (second, {"mine"}), (named, {"mine"})):
        assert real.http.delete(f"{PATH}/{response['id']}").status_code == 200
        assert sessions(real) & {first["id"], "mine"} == left  # what the client has named is the client's to end
    assert real.engine.release_session("mine")


def test_the_pages_of_a_response_that_is_not_kept_go_at_once(real):
    before = sessions(real)
    answer = real.http.post(PATH, json=GOOD | {"max_output_tokens": 100, "timeout": 0.001})
    check_error(answer, 408, "timeout", "request_timeout")
    stream = real.openai.responses.create(model="trunk", input="hi", max_output_tokens=100, stream=True)
    next(event for event in stream if event.type == "response.output_item.added")
    stream.close()
    wait_for(lambda: not real.engine.scheduler.running and sessions(real) == before)


def test_a_turn_that_is_not_kept_costs_its_chain_nothing(real):
    first = whole(real, input="keep this too", max_output_tokens=12)
    stream = real.openai.responses.create(
        model="trunk", input="hi", max_output_tokens=60, stream=True, previous_response_id=first["id"]
    )
    next(event for event in stream if event.type == "response.output_item.added")
    stream.close()
    wait_for(lambda: not real.engine.scheduler.running)
    assert first["id"] in sessions(real)
    assert whole(real, input="on", previous_response_id=first["id"])["status"] == "incomplete"


def test_what_is_pushed_out_lets_its_pages_go(real, monkeypatch):
    kept = whole(real, input="the oldest")
    assert kept["id"] in sessions(real)
    monkeypatch.setattr(ResponseStore, "add", lambda self, *args: [kept["id"]])
    whole(real, input="another")
    assert kept["id"] not in sessions(real)


def test_chains_side_by_side(real):
    """Each goes on with its own words, whoever else does at the same time."""
    alone = [chain(real, name) for name in "xy"]
    together: dict[str, list[str]] = {}
    threads = [threading.Thread(target=lambda n=name: together.update({n: chain(real, n)})) for name in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[name] for name in "xy"] == alone


def chain(server: Served, name: str) -> list[str]:
    said, previous = [], {}
    for i in range(3):
        response = whole(server, input=f"{name}{i}", max_output_tokens=8, **previous)
        previous = {"previous_response_id": response["id"]}
        said.append(response["output"][0]["content"][0]["text"])
    return said
