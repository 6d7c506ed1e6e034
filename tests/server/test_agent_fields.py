"""Several models in one request over HTTP: side by side, in turn, measured against the trunk; and sessions."""

from __future__ import annotations

import math
from collections.abc import Iterator

import hypothesis
import hypothesis.strategies as st
import pytest

from icarus_jax.errors import RequestError
from icarus_jax.scheduling.request import SessionHint
from icarus_jax.server import api
from icarus_jax.server.agent_fields import HandoffRule
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.handoff import Handoff
from tests.server.served import CHAT, GOOD, TOKENIZER, Served, V, check_error, ids_of, serving

VOCABULARY = Vocabulary(TOKENIZER)
BOTH = {"models": ["trunk", "parrot"]}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


# Fan-out.


def test_each_model_answers_each_prompt(served):
    answer = served.openai.completions.create(
        model="parrot", prompt=[[40], [60, 61]], max_tokens=2, n=2, extra_body=BOTH | {"return_token_ids": True}
    )
    counted = [[41, 42], [41, 42], [40, 40], [40, 40], [62, 63], [62, 63], [60, 61], [60, 61]]
    assert [c.token_ids for c in answer.choices] == counted
    assert [c.model for c in answer.choices] == ["trunk", "trunk", "parrot", "parrot"] * 2
    assert [c.index for c in answer.choices] == list(range(8))
    assert answer.model == "parrot"  # the request's own
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 16)  # a prompt counts once
    assert answer.usage.by_model == {"trunk": {"completion_tokens": 8}, "parrot": {"completion_tokens": 8}}
    asked = served.engine.requests[-2:]
    assert [(r.models, r.n, r.prompt_ids) for r in asked] == [
        (("trunk", "parrot"), 2, (40,)),
        (("trunk", "parrot"), 2, (60, 61)),
    ]


def test_model_may_be_left_out(served):
    body = {"prompt": [40], "max_tokens": 1, "models": ["parrot", "trunk"]}
    answer = served.http.post("/v1/completions", json=body).json()
    assert (answer["model"], [c["model"] for c in answer["choices"]]) == ("parrot", ["parrot", "trunk"])
    plain = served.complete(prompt=[40], max_tokens=1)
    assert plain["choices"][0]["model"] == "trunk" and "by_model" not in plain["usage"]


def test_chat_with_several_models(served):
    messages = [{"role": "user", "content": "hi"}]
    request = {"model": "trunk", "messages": messages, "max_tokens": 3, "extra_body": BOTH}
    whole = served.openai.chat.completions.create(**request)
    prompt = ids_of("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    says = {"trunk": [prompt[-1] + k for k in (1, 2, 3)], "parrot": prompt[:3]}
    assert [c.model for c in whole.choices] == ["trunk", "parrot"]
    for choice in whole.choices:
        assert choice.message.content == TOKENIZER.decode(says[choice.model], skip_special_tokens=True)
    assert whole.usage.prompt_tokens == len(prompt)


def test_models_stream_together():
    with serving(step_seconds=0.01) as served:
        chunks = list(
            served.openai.completions.create(
                model="trunk",
                prompt=[40],
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=BOTH,
            )
        )
        assert chunks[-1].usage.by_model == {"trunk": {"completion_tokens": 8}, "parrot": {"completion_tokens": 8}}
        order = [c.choices[0].index for c in chunks[:-1]]
        assert order == [0, 1] * 8
        assert [c.choices[0].model for c in chunks[:-1]] == ["trunk", "parrot"] * 8
        assert {c.model for c in chunks} == {"trunk"}
        counts = {m: served.metric(f'icarus_generation_tokens_total{{model_name="{m}"}}') for m in BOTH["models"]}
        assert counts == {"trunk": 8, "parrot": 8}
        assert served.metric('icarus_requests_total{finished_reason="length",model_name="parrot"}') == 1


# Handoff.


def straddling(first: int, second: int) -> str:
    return TOKENIZER.decode([first, second])


def handed(served, prompt, rules, max_tokens=6, **fields) -> dict:
    fields = {"prompt": prompt, "max_tokens": max_tokens, "handoff": rules, "return_token_ids": True, **fields}
    return served.complete(**fields)


def test_handoff_on_a_text_cut_by_tokens(served):
    """'trunk' says 41, 42, 43, ...; from the token that completes the text on 'parrot' repeats its prompt, 40."""
    rules = [{"on": straddling(42, 43), "model": "parrot"}]
    answer = handed(served, [40], rules)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == [41, 42, 43, 40, 40, 40]
    assert (choice["model"], choice["handoffs"]) == ("trunk", [{"token": 3, "model": "parrot"}])
    assert answer["usage"]["by_model"] == {"trunk": {"completion_tokens": 3}, "parrot": {"completion_tokens": 3}}
    chunks = list(
        served.openai.completions.create(
            model="trunk", prompt=[40], max_tokens=6, temperature=0, stream=True, extra_body={"handoff": rules}
        )
    )
    assert [c.choices[0].model for c in chunks] == ["trunk"] * 3 + ["parrot"] * 3
    assert "".join(c.choices[0].text for c in chunks) == choice["text"]


def test_handoff_on_a_token_forth_and_back(served):
    rules = [{"on": 43, "model": "parrot"}, {"on": 40, "model": "trunk"}]
    (choice,) = handed(served, [40], rules)["choices"]
    assert choice["token_ids"] == [41, 42, 43, 40, 45, 46]  # output token 4 of 'trunk' is 40 + 1 + 4
    assert choice["handoffs"] == [{"token": 3, "model": "parrot"}, {"token": 4, "model": "trunk"}]


def test_handoff_to_the_same_model_is_nothing(served):
    answer = handed(served, [40], [{"on": 42, "model": "trunk"}, {"on": TOKENIZER.decode([43]), "model": "trunk"}])
    assert answer["choices"][0]["token_ids"] == [41, 42, 43, 44, 45, 46]
    assert answer["choices"][0]["handoffs"] == []
    assert answer["usage"]["by_model"] == {"trunk": {"completion_tokens": 6}}


def test_handoff_in_chat_names_the_writer_of_each_chunk(served):
    messages, last = [{"role": "user", "content": "hi"}], ids_of("assistant\n")[-1]
    chunks = served.openai.chat.completions.create(
        model="trunk", messages=messages, max_tokens=4, stream=True, extra_body={"handoff": [{"on": last + 2, **ACTOR}]}
    )
    assert [c.choices[0].model for c in chunks if c.choices][:3] == ["trunk", "trunk", "parrot"]


ACTOR = {"model": "parrot"}


def test_every_choice_watches_its_own_text(served):
    """Two choices in step: their tokens come in turn, and a watcher that they shared would find the text in neither."""
    answer = handed(served, [[40], [41]], [{"on": straddling(43, 44), **ACTOR}], n=2)
    assert [c["handoffs"] for c in answer["choices"]] == [[{"token": at, **ACTOR}] for at in (4, 4, 3, 3)]


def test_choices_that_no_rule_touches_have_no_handoff(served):
    answer = handed(served, [[40], [60]], [{"on": 300, **ACTOR}], n=2, **BOTH, model=None)
    assert [c["handoffs"] for c in answer["choices"]] == [[]] * 8
    scored = served.complete(prompt=[40], max_tokens=0, echo=True, n=2, **BOTH, model=None)["choices"]
    assert [c["model"] for c in scored] == ["trunk", "trunk", "parrot", "parrot"]  # though nobody wrote anything


def test_a_text_begun_in_the_prompt_does_not_count(served):
    assert handed(served, [41, 42], [{"on": straddling(42, 43), **ACTOR}])["choices"][0]["handoffs"] == []


ASCII = [i for i in range(V) if VOCABULARY.token_bytes(i).isascii() and i not in VOCABULARY.special_ids]
TOKENS = [i for i in ASCII if set(VOCABULARY.token_text(i)) <= set("helo wr")]


@hypothesis.example(ids=ids_of("l") * 5, texts=["ll"], token=TOKENS[0])  # occurrences do not overlap
@hypothesis.given(
    ids=st.lists(st.sampled_from(TOKENS), max_size=40),
    texts=st.lists(st.text("helo w", min_size=1, max_size=4), max_size=4, unique=True),
    token=st.sampled_from(TOKENS),
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_handoff_against_a_search_of_the_whole_text(ids, texts, token):
    rules = [HandoffRule(on=text, model=text) for text in texts] + [HandoffRule(on=token, model="by id")]
    watch = Handoff(rules, VOCABULARY, True, [])
    whole = "".join(VOCABULARY.token_text(i) for i in ids)
    ends: dict[int, str] = {}  # characters up to an occurrence's end -> the longest text that ends there
    for text in sorted(texts, key=len):
        at = whole.find(text)
        while at >= 0:
            ends[at + len(text)] = text
            at = whole.find(text, at + len(text))
    done = 0
    for i in ids:
        size = len(VOCABULARY.token_text(i))
        inside = [end for end in ends if done < end <= done + size]
        done += size
        want = "by id" if i == token else ends[max(inside)] if inside else None
        assert watch(i) == want


def test_handoff_waits_for_the_whole_character():
    ids = ids_of("日本語")
    assert len(ids) > 3  # bytes
    watch = Handoff([HandoffRule(on="本", model="x")], VOCABULARY, True, [])
    seen, text = [watch(i) for i in ids], ""
    for n, found in enumerate(seen, 1):
        text = TOKENIZER.decode(ids[:n])
        assert (found == "x") == ("本" in text and "本" not in TOKENIZER.decode(ids[: n - 1]))


def test_a_special_token_has_text_only_if_it_is_shown():
    (eos,) = ids_of("<|im_end|>")
    rules = [HandoffRule(on="<|im_end|>", model="x")]
    assert [Handoff(rules, VOCABULARY, skip, [])(eos) for skip in (True, False)] == [None, "x"]


# Reference log-probabilities: the double's tokens have -0.5, and under the trunk -2 unless it wrote them.


def test_reference_logprobs(served):
    answer = served.complete(prompt=[40], max_tokens=3, reference_logprobs=True, **BOTH, model=None)
    trunk, parrot = answer["choices"]
    assert trunk["logprobs"]["reference_logprobs"] == [-0.5] * 3
    assert parrot["logprobs"]["reference_logprobs"] == [-2.0] * 3
    assert parrot["logprobs"]["token_logprobs"] == [-0.5] * 3  # logprobs are shown without being asked for
    assert [list(top.values()) for top in parrot["logprobs"]["top_logprobs"]] == [[-0.5]] * 3
    assert (trunk["kl_to_base"], parrot["kl_to_base"]) == (0.0, 4.5)
    assert all(request.reference_logprobs for request in served.engine.requests[-1:])


def test_reference_logprobs_over_a_handoff_and_an_echo(served):
    rules = [{"on": 42, **ACTOR}]
    (choice,) = handed(served, [39, 40], rules, max_tokens=4, reference_logprobs=True, echo=True, logprobs=1)["choices"]
    assert choice["logprobs"]["reference_logprobs"] == [None, None, -0.5, -0.5, -2.0, -2.0]
    assert choice["kl_to_base"] == 3.0


def test_reference_logprobs_in_a_streamed_chat(served):
    request = {"model": "parrot", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    extra = {"extra_body": {"reference_logprobs": True}}
    whole = served.openai.chat.completions.create(**request, **extra).choices[0]
    assert [(t.logprob, t.reference_logprob, t.top_logprobs) for t in whole.logprobs.content] == [(-0.5, -2.0, [])] * 4
    assert whole.kl_to_base == 6.0
    chunks = [c.choices[0] for c in served.openai.chat.completions.create(**request, **extra, stream=True)]
    assert [t.reference_logprob for c in chunks for t in c.logprobs.content] == [-2.0] * 4
    assert [c.model_extra.get("kl_to_base") for c in chunks] == [None] * (len(chunks) - 1) + [6.0]


def test_a_stop_string_ends_the_sum(served):
    stopped = served.complete(
        model="parrot", prompt=[40, 41, 42], max_tokens=9, reference_logprobs=True, stop=TOKENIZER.decode([41])
    )
    assert stopped["choices"][0]["kl_to_base"] == 2 * 1.5


# Sessions.


@pytest.mark.parametrize(
    "session,hint",
    [
        ({"id": "x"}, SessionHint("x", None, None)),
        ({"id": "x", "retain": 60}, SessionHint("x", 60.0, None)),
        ({"id": "x", "retain": "pinned", "next_model": "parrot"}, SessionHint("x", math.inf, "parrot")),
    ],
)
def test_a_session_reaches_the_engine(served, session, hint):
    served.complete(prompt=[5], session=session)
    assert served.engine.requests[-1].session == hint
    answer = served.http.post("/v1/release_session", json={"id": "x"})
    assert (answer.status_code, answer.json()) == (200, {"id": "x", "object": "session", "released": True})
    assert served.engine.released[-1] == "x"
    assert served.http.post("/v1/release_session", json={"id": "y"}).json()["released"] is False


def park(served, **body):
    return served.http.post("/v1/park_session", json=body)


def test_a_session_is_parked(served, monkeypatch):
    answer = park(served, id="x")
    assert (answer.status_code, answer.json()) == (200, {"id": "x", "object": "session", "parked": True})
    assert park(served, id="x").json()["parked"] is False and served.engine.parking.parked == ["x", "x"]
    for error, status, param, code in (
        (OSError("there is no room"), 503, None, "page_store_error"),
        (RequestError("no page store", "id"), 400, "id", None),
        (RequestError("the engine is shutting down"), 503, None, "engine_unavailable"),
    ):
        monkeypatch.setattr(served.engine.parking, "fail", error)
        assert str(error) in check_error(park(served, id="x"), status, param, code)["message"]
    monkeypatch.undo()
    monkeypatch.setattr(served.engine.parking, "hangs", True)
    monkeypatch.setattr(api, "PARK_SECONDS", 0.1)
    assert "in 0.1 s" in check_error(park(served, id="x"), 503, None, "page_store_error")["message"]


# What is refused.

TWICE = [{"on": "a", "model": "trunk"}, {"on": "a", "model": "parrot"}]
BAD = [
    ({"models": []}, "models", 400),
    ({"models": "trunk"}, "models", 400),
    ({"models": ["trunk", "nobody"]}, "models", 404),
    ({"models": ["trunk", "parrot", "trunk"]}, "models", 400),
    ({"models": ["trunk"] * 129}, "models", 400),
    ({"models": ["parrot", "broken"]}, "model", 400),  # beside model=trunk
    ({"handoff": {"on": "a", "model": "parrot"}}, "handoff", 400),
    ({"handoff": [{"on": "", "model": "parrot"}]}, "handoff", 400),
    ({"handoff": [{"on": None, "model": "parrot"}]}, "handoff", 400),
    ({"handoff": [{"on": True, "model": "parrot"}]}, "handoff", 400),
    ({"handoff": [{"on": 1.5, "model": "parrot"}]}, "handoff", 400),
    ({"handoff": [{"on": V, "model": "parrot"}]}, "handoff", 400),
    ({"handoff": [{"on": -1, "model": "parrot"}]}, "handoff", 400),
    ({"handoff": [{"on": "a"}]}, "handoff", 400),
    ({"handoff": [{"on": "a", "model": "nobody"}]}, "handoff", 400),
    ({"handoff": TWICE}, "handoff", 400),
    ({"handoff": [{"on": str(i), "model": "parrot"} for i in range(17)]}, "handoff", 400),
    ({"handoff": [{"on": "a", "model": "broken"}], "reference_logprobs": True}, "handoff", 400),
    ({"model": "broken", "reference_logprobs": True}, "reference_logprobs", 400),
    ({"reference_logprobs": "yes"}, "reference_logprobs", 400),
    ({"session": "x"}, "session", 400),
    ({"session": {"id": ""}}, "session", 400),
    ({"session": {"retain": 5}}, "session", 400),
    ({"session": {"id": "x", "retain": -1}}, "session", 400),
    ({"session": {"id": "x", "retain": "forever"}}, "session", 400),
    ({"session": {"id": "x", "next_model": "nobody"}}, "session", 400),
]


@pytest.mark.parametrize("change,param,status", BAD, ids=lambda value: repr(value)[:50])
def test_what_is_refused(served, change, param, status):
    code = "model_not_found" if status == 404 else None
    before = len(served.engine.requests)
    for path, base in (("/v1/completions", GOOD), ("/v1/chat/completions", CHAT)):
        error = check_error(served.http.post(path, json=base | change), status, param, code)
        assert param in error["message"] or "nobody" in error["message"]
    assert len(served.engine.requests) == before


def test_too_many_choices_and_no_session_id(served):
    body = {"prompt": [[5]] * 20, "n": 30, "max_tokens": 1, **BOTH}
    check_error(served.http.post("/v1/completions", json=body), 400, "prompt")
    check_error(served.http.post("/v1/release_session", json={}), 400, "id")
    check_error(park(served, id=""), 400, "id")
