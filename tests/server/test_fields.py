"""Every field of a request: served, refused by name, or accepted because it only describes; and all are documented."""

from __future__ import annotations

import logging
import pathlib
import re
from collections.abc import Iterator

import pytest

from icarus_jax.server.other_fields import ANSWER_FIELDS, DESCRIBING_FIELDS, GENERATION_FIELDS, PROMPT_FIELDS
from icarus_jax.server.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from tests.server.served import CHAT, GOOD, Served, check_error, serving

DOCUMENTED = (pathlib.Path(__file__).parents[2] / "docs" / "from_vllm.md").read_text()
APIS = {"/v1/completions": (CompletionRequest, GOOD), "/v1/chat/completions": (ChatRequest, CHAT)}
REFUSED = [
    (path, name) for path, (body, _) in APIS.items() for name in GENERATION_FIELDS if name not in body.model_fields
]
NAMED = (
    *("allowed_token_ids", "structural_tag", "bad_words", "truncate_prompt_tokens", "use_beam_search"),
    *("functions", "function_call", "length_penalty"),
    *("logits_processors", "prompt_embeds", "chat_template", "documents", "modalities", "audio", "prediction"),
    *("verbosity", "web_search_options", "suffix"),
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.mark.parametrize("path,name", REFUSED)
def test_what_is_not_served_is_refused_by_name(served, path, name):
    good, neutral = APIS[path][1], GENERATION_FIELDS[name]
    error = check_error(served.http.post(path, json=good | {name: "surely not neutral"}), 400, name)
    assert name in error["message"]
    for value in (None, *neutral):
        answer = served.http.post(path, json=good | {name: value})
        assert answer.status_code == 200, (value, answer.text)


def test_the_table_names_what_clients_send():
    assert set(NAMED) <= set(PROMPT_FIELDS) | set(ANSWER_FIELDS)
    assert not DESCRIBING_FIELDS & set(GENERATION_FIELDS)
    for name in ("echo", "best_of", "messages", "prompt"):
        assert all(name in body.model_fields or name in GENERATION_FIELDS for body, _ in APIS.values())


@pytest.mark.parametrize("name", sorted(DESCRIBING_FIELDS))
@pytest.mark.parametrize("path", APIS)
def test_what_only_describes_is_accepted(served, path, name):
    assert served.http.post(path, json=APIS[path][1] | {name: "anything"}).status_code == 200


def test_an_unknown_field_is_accepted_and_logged_once(served, caplog):
    with caplog.at_level(logging.DEBUG, "icarus_jax.server.body"):
        for _ in range(2):
            assert served.http.post("/v1/completions", json=GOOD | {"from_the_future": 1, "user": "x"}).is_success
    assert [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()] == [
        "requests carry the unknown field 'from_the_future'; it is ignored"
    ]


def test_tokenize_refuses_what_changes_the_prompt(served):
    body = {"messages": CHAT["messages"]}
    check_error(served.http.post("/tokenize", json=body | {"chat_template": "{{ 1 }}"}), 400, "chat_template")
    assert served.http.post("/tokenize", json=body | {"guided_json": {"type": "object"}}).status_code == 200


@pytest.mark.parametrize("path", APIS)
def test_best_of(served, path):
    good = APIS[path][1]
    check_error(served.http.post(path, json=good | {"n": 2, "best_of": 3}), 400, "best_of")
    assert served.http.post(path, json=good | {"n": 2, "best_of": 2}).status_code == 200


@pytest.mark.parametrize("path", APIS)
def test_the_cache_salt_reaches_the_engine(served, path):
    assert served.http.post(path, json=APIS[path][1] | {"cache_salt": "mine"}).status_code == 200
    assert served.engine.requests[-1].cache_salt == "mine"
    assert served.http.post(path, json=APIS[path][1]).status_code == 200
    assert served.engine.requests[-1].cache_salt == ""


def test_every_field_is_documented():
    known = {name for body, _ in APIS.values() for name in body.model_fields} | set(TokenizeRequest.model_fields)
    known |= set(GENERATION_FIELDS) | DESCRIBING_FIELDS
    assert not [name for name in sorted(known) if not re.search(rf"`{name}[`.]", DOCUMENTED)]
