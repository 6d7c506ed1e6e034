"""The HTTP API over a double of the engine: real sockets and the official openai client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

from tests.server.served import EOS, LIMIT, TOKENIZER, Served, ids_of, serving, wait_for


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


# Models, health, tokens.


def test_models(served):
    cards = {card.id: card for card in served.openai.models.list()}
    assert list(cards) == ["trunk", "parrot", "broken"]
    assert (cards["trunk"].parent, cards["trunk"].kv) == (None, "base")
    assert (cards["parrot"].parent, cards["parrot"].root, cards["parrot"].kv) == ("trunk", "heads/parrot", "shared")
    assert served.openai.models.retrieve("broken").kv == "isolated"
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("nobody")


def test_health_and_version(served):
    assert served.http.get("/health").status_code == 200
    assert served.http.get("/version").json()["version"]


def test_tokenize_and_back(served):
    ids = ids_of("Hello café")
    got = served.http.post("/tokenize", json={"prompt": "Hello café", "return_token_strs": True}).json()
    strings = TOKENIZER.convert_ids_to_tokens(ids)
    assert got == {"count": len(ids), "max_model_len": LIMIT, "tokens": ids, "token_strs": strings}
    assert served.http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "Hello café"}
    messages = [{"role": "user", "content": "hi"}]
    got = served.http.post("/tokenize", json={"model": "parrot", "messages": messages}).json()
    assert got["tokens"] == ids_of("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert served.http.post("/tokenize", json={"prompt": "messages"}).status_code == 200


# Completions.


def test_completion(served):
    answer = served.openai.completions.create(model="parrot", prompt="Hello, world!", max_tokens=4, temperature=0)
    ids = ids_of("Hello, world!")
    assert answer.choices[0].text == TOKENIZER.decode(ids[:4])
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        len(ids),
        4,
        len(ids) + 4,
    )


@pytest.mark.parametrize(
    "prompt,wanted",
    [
        ("fox", [ids_of("fox")]),
        (["fox", "dog"], [ids_of("fox"), ids_of("dog")]),
        ([10, 11], [[10, 11]]),
        ([[10], [20, 21]], [[10], [20, 21]]),
    ],
)
def test_the_four_forms_of_a_prompt(served, prompt, wanted):
    answer = served.complete(prompt=prompt, max_tokens=2, n=2, return_token_ids=True)
    expected = [ids for ids in wanted for _ in range(2)]
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(wanted)))
    assert [c["prompt_token_ids"] for c in answer["choices"]] == expected
    assert [c["token_ids"] for c in answer["choices"]] == [[p[-1] + 1, p[-1] + 2] for p in expected]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, wanted))  # once a prompt, not once a choice
    assert answer["usage"]["completion_tokens"] == 4 * len(wanted)


def test_a_stream_names_its_prompts_tokens_once(served):
    request = {"model": "trunk", "prompt": [[10], [20, 21]], "max_tokens": 3, "stream": True}
    stream = served.openai.completions.create(**request, extra_body={"return_token_ids": True})
    told = {0: [], 1: []}
    for chunk in stream:
        for choice in chunk.choices:
            told[choice.index].append(getattr(choice, "prompt_token_ids", None))
    assert all(len(ids) > 1 for ids in told.values())
    assert told == {0: [[10]] + [None] * (len(told[0]) - 1), 1: [[20, 21]] + [None] * (len(told[1]) - 1)}


def test_defaults(served):
    served.http.post(
        "/v1/completions", json={"model": "trunk", "prompt": [5], "stop": None, "seed": None, "best_of": 1}
    )
    params = served.engine.requests[-1].params
    assert (params.max_tokens, params.temperature, params.top_p, params.seed, params.logprobs) == (
        16,
        1.0,
        1.0,
        None,
        None,
    )
    prompt = [5] * (LIMIT - 3)
    assert served.complete(prompt=prompt)["usage"]["completion_tokens"] == 3  # the default is what is left


def test_every_field_reaches_the_engine(served):
    sent = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 0.75,
        "seed": -3,
        "min_tokens": 1,
        "max_tokens": 2,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "prompt_logprobs": 2,
        "logprobs": 3,
    }
    served.complete(prompt=[5], logit_bias={"7": -100}, stop=["x", "y"], stop_token_ids=[9], **sent)
    params = served.engine.requests[-1].params
    assert {name: getattr(params, name) for name in sent} == sent
    assert (params.logit_bias, params.stop, params.stop_token_ids) == (((7, -100.0),), ("x", "y"), (9,))


def test_logprobs(served):
    choice = served.complete(prompt=[40], max_tokens=2, logprobs=2)["choices"][0]
    names = [TOKENIZER.decode([i]) for i in (41, 42, 43)]
    assert choice["logprobs"] == {
        "tokens": names[:2],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{names[0]: -0.5, names[1]: -1.5}, {names[1]: -0.5, names[2]: -1.5}],
        "text_offset": [0, len(names[0])],
    }
    assert served.complete(prompt=[40], logprobs=0)["choices"][0]["logprobs"]["top_logprobs"][0] == {names[0]: -0.5}


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_a_prompt_as_lm_eval_asks(served, max_tokens):
    ids = ids_of("Hello, world!")
    request = {
        "model": "trunk",
        "prompt": [ids],
        "echo": True,
        "logprobs": 1,
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    answer = served.openai.completions.create(**request, seed=1234)
    choice, logprobs = answer.choices[0], answer.choices[0].logprobs
    assert choice.text.startswith("Hello, world!")
    assert len(logprobs.tokens) == len(ids) + max_tokens
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs == [None, *(-float(j) for j in range(1, len(ids))), *[-0.5] * max_tokens]
    assert logprobs.top_logprobs[0] is None
    assert [list(top) for top in logprobs.top_logprobs[1:]] == [[name] for name in logprobs.tokens[1:]]
    assert [
        choice.text[at:][: len(t)] for at, t in zip(logprobs.text_offset, logprobs.tokens, strict=True)
    ] == logprobs.tokens
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == max_tokens


def test_echo_without_logprobs_and_streamed(served):
    choice = served.complete(prompt="Hello", echo=True, max_tokens=0)["choices"][0]
    assert (choice["text"], choice["logprobs"]) == ("Hello", None)
    whole = served.complete(prompt="Hello", echo=True, max_tokens=3, logprobs=1)["choices"][0]
    chunks = list(
        served.openai.completions.create(
            model="trunk", prompt="Hello", echo=True, max_tokens=3, logprobs=1, temperature=0, stream=True
        )
    )
    assert "".join(c.choices[0].text for c in chunks) == whole["text"]
    for field in ("tokens", "token_logprobs", "text_offset"):
        assert [x for c in chunks for x in getattr(c.choices[0].logprobs, field)] == whole["logprobs"][field]


def test_prompt_logprobs(served):
    shown = served.complete(prompt=[40, 41], max_tokens=1, prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert shown == [None, {"41": {"logprob": -1.0, "rank": 1, "decoded_token": TOKENIZER.decode([41])}}]


def test_stop_string_over_token_borders_frees_the_sequence():
    with serving(step_seconds=0.002) as served:
        prompt = "The quick brown fox jumps over the lazy dog."
        request = {"model": "parrot", "prompt": prompt, "max_tokens": 80, "temperature": 0, "stop": ["own fo", "zebra"]}
        answer = served.openai.completions.create(**request)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("The quick br", "stop")
        assert answer.choices[0].stop_reason == "own fo"
        assert answer.usage.completion_tokens < len(ids_of(prompt))
        chunks = list(served.openai.completions.create(**request, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == "The quick br"
        assert chunks[-1].choices[0].finish_reason == "stop"
        wait_for(lambda: served.engine.running == 0)
        assert served.engine.aborted == [0, 1]


def test_a_stopped_choice_leaves_the_others_running():
    with serving(step_seconds=0.005) as served:
        first, second = served.complete(prompt=[[40], [60]], max_tokens=20, stop=TOKENIZER.decode([42, 43]))["choices"]
        assert (first["text"], first["finish_reason"]) == (TOKENIZER.decode([41]), "stop")
        assert (second["text"], second["finish_reason"]) == (TOKENIZER.decode(list(range(61, 81))), "length")
        assert served.engine.aborted == [0]


def test_stop_tokens_are_counted_but_not_shown():
    with serving(eos_ids=(45,)) as served:
        eos, token = (served.complete(prompt=[40], **f)["choices"][0] for f in ({}, {"stop_token_ids": [43]}))
        assert eos["text"] == TOKENIZER.decode([41, 42, 43, 44])
        assert (eos["finish_reason"], eos["stop_reason"]) == ("stop", None)
        assert token["text"] == TOKENIZER.decode([41, 42])
        assert (token["finish_reason"], token["stop_reason"]) == ("stop", 43)
        first = served.complete(prompt=[44])  # a stream whose first token ends it
        assert (first["choices"][0]["text"], first["usage"]["completion_tokens"]) == ("", 1)
        assert len(served.complete(prompt=[44], ignore_eos=True)["choices"][0]["text"]) > 0


def test_special_tokens_are_shown_if_asked(served):
    hidden, shown = (
        served.complete(prompt=[EOS, 100], model="parrot", max_tokens=2, skip_special_tokens=skip)["choices"][0]["text"]
        for skip in (True, False)
    )
    assert shown == "<|im_end|>" + hidden


def test_cached_tokens(served):
    request = {"prompt": [50, 60, 70], "max_tokens": 1}
    details = [served.complete(**request)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert details == [0, 2]


def test_stream_is_server_sent_events(served):
    request = {"model": "trunk", "prompt": [100], "max_tokens": 2, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=request) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2])


def test_many_streams_at_once(served):
    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        parts = await client.completions.create(
            model="parrot", prompt=f"{i} The quick fox {i * 7}", max_tokens=40, temperature=0, stream=True
        )
        return "".join([part.choices[0].text async for part in parts])

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(24)))

    for i, text in enumerate(asyncio.run(everyone())):
        prompt = ids_of(f"{i} The quick fox {i * 7}")
        assert text == TOKENIZER.decode((prompt * 40)[:40])
