"""icarus_jax.LLM: what it says is what the engine says, in the forms that vLLM's users know."""

from __future__ import annotations

import asyncio
import json
import sys

import httpx
import pytest
import torch

import icarus_jax
from icarus_jax import LLM, SamplingParams, StructuredOutputsParams
from icarus_jax.errors import RequestError, UsageError
from tests import tiny
from tests.engine import harness

ENGINE = {
    "page_size": 4,
    "num_pages": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_model_len": 128,
    "writer_adapters": True,
}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
TEXT = "The quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    trunk = tiny.tiny_model("llama", folder)
    return trunk, {name: tiny.tiny_adapter(trunk, folder, seed=seed) for seed, name in enumerate("ab", 1)}


@pytest.fixture(scope="module")
def llm(files):
    trunk, heads = files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["icarus_jax.cli.composition"], "enable_compilation_cache", lambda: None)
        with LLM(trunk, heads, trunk_name="trunk", max_loras=3, **ENGINE) as made:
            yield made


@pytest.fixture(scope="module")
def wanted(files):
    """model -> the greedy tokens of an engine that is stepped by hand."""
    trunk, heads = files
    engine = harness.make_engine(trunk, {name: (path, "shared") for name, path in heads.items()})
    ids = list(TEXT.encode())
    tokens = tiny.tiny_tokenizer()(TEXT)["input_ids"]
    assert len(tokens) == len(ids)  # bytes
    return {name: harness.generate(engine, name, tokens, max_tokens=8).token_ids for name in ("trunk", "a", "b")}


def test_every_model_says_what_the_engine_says(llm, wanted):
    (answer,) = llm.generate(TEXT, llm.models, GREEDY)
    assert answer.prompt == TEXT and [o.model for o in answer.outputs] == ["trunk", "a", "b"]
    for output in answer.outputs:
        assert output.token_ids == wanted[output.model]
        assert output.text == llm.tokenizer.decode(output.token_ids).rstrip("\ufffd")  # without an unfinished character
        assert output.finish_reason == "length" and output.logprobs is None
    assert [o.cached_tokens > 0 for o in answer.outputs[1:]] == [True, True]


def test_a_trunk_with_an_adapter_of_its_own_is_pefts(llm, files, wanted, monkeypatch):
    monkeypatch.setattr(sys.modules["icarus_jax.cli.composition"], "enable_compilation_cache", lambda: None)
    trunk, heads = files
    ids = torch.tensor([llm.tokenizer(TEXT)["input_ids"]])
    merged = tiny.hf_model(trunk, heads["a"]).generate(ids, max_new_tokens=8, do_sample=False)
    with LLM(trunk, trunk_adapter=heads["a"], **ENGINE) as tuned:
        (answer,) = tuned.generate(TEXT, sampling_params=GREEDY)
    assert answer.outputs[0].token_ids == merged[0, ids.shape[1] :].tolist() != wanted["trunk"]


def test_all_forms_of_prompts(llm, wanted):
    ids = llm.tokenizer(TEXT)["input_ids"]
    for prompts, count in ((TEXT, 1), ([TEXT, TEXT], 2), (ids, 1), ([ids, ids, ids], 3), ([TEXT, ids], 2), ([], 0)):
        answers = llm.generate(prompts, "a", GREEDY, use_tqdm=False)
        assert [a.outputs[0].token_ids for a in answers] == [wanted["a"]] * count
    assert answers == []
    assert llm.generate(ids, sampling_params=GREEDY)[0].prompt is None


def test_a_stop_string_ends_an_answer_and_its_work(llm, wanted):
    text = llm.tokenizer.decode(wanted["a"])
    stop = text[3:5]
    (answer,) = llm.generate(TEXT, "a", SamplingParams(temperature=0, max_tokens=60, stop=(stop,)))
    (output,) = answer.outputs
    assert output.text == text[: text.index(stop)] and (output.finish_reason, output.stop_reason) == ("stop", stop)
    llm.generate(TEXT, "a", GREEDY)  # runs after what was aborted
    assert llm.engine.stats.pages_used == 0


def test_logprobs_and_the_trunks_own(llm):
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2)
    (answer,) = llm.generate(TEXT, ["trunk", "a"], params, reference_logprobs=True)
    trunk, head = answer.outputs
    assert all(len(entry.top) >= 2 for entry in head.logprobs)
    assert trunk.reference_logprobs == pytest.approx([entry.logprob for entry in trunk.logprobs])
    assert head.reference_logprobs != pytest.approx([entry.logprob for entry in head.logprobs])


def test_n_answers_differ_and_a_seed_repeats_them(llm):
    params = SamplingParams(temperature=1.0, max_tokens=8, seed=7)
    first, second = (llm.generate(TEXT, ["a", "b"], params, n=2)[0].outputs for _ in range(2))
    assert [o.index for o in first] == [0, 1, 2, 3] and [o.model for o in first] == ["a", "a", "b", "b"]
    assert [o.token_ids for o in first] == [o.token_ids for o in second]
    assert first[0].token_ids != first[1].token_ids


def test_a_handoff(llm, wanted):
    on = wanted["trunk"][2]
    (answer,) = llm.generate(TEXT, sampling_params=GREEDY, handoff=[{"on": on, "model": "b"}])
    (output,) = answer.outputs
    first = wanted["trunk"].index(on) + 1
    assert output.handoffs == [(first, "b")] and output.token_ids[:first] == wanted["trunk"][:first]


def test_a_chat_is_the_template_and_several_are_a_list(llm):
    messages = [{"role": "user", "content": "Hi"}]
    (one,) = llm.chat(messages, "a", GREEDY)
    prompt = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert one.prompt == prompt
    (direct,) = llm.generate(prompt, "a", GREEDY, add_special_tokens=False)
    assert one.outputs[0].token_ids == direct.outputs[0].token_ids
    assert [a.prompt for a in llm.chat([messages, messages], "a", GREEDY)] == [prompt, prompt]


def test_answers_follow_what_is_asked(llm):
    whole = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {"type": "object", "properties": {"a": whole}, "required": ["a"]}
    asked = StructuredOutputsParams(json=schema | {"additionalProperties": False})
    params = SamplingParams(temperature=1.0, max_tokens=60, seed=1)
    for output in llm.generate(TEXT, llm.models, params, n=2, structured_outputs=asked)[0].outputs:
        assert output.finish_reason == "stop" and output.stop_reason in (None, llm.tokenizer.eos_token_id)
        assert 0 <= json.loads(output.text)["a"] < 100
    choice = StructuredOutputsParams(choice=["yes", "no"])
    (answer,) = llm.chat([{"role": "user", "content": "?"}], "a", GREEDY, structured_outputs=choice)
    assert answer.outputs[0].text in ("yes", "no")
    with pytest.raises(RequestError, match="unclosed") as error:
        llm.generate(TEXT, structured_outputs=StructuredOutputsParams(regex="("))
    assert error.value.field == "structured_outputs"


def test_heads_come_and_go(llm, files):
    llm.load_head("late", files[1]["a"], "shared")
    a, late = llm.generate(TEXT, ["a", "late"], GREEDY)[0].outputs
    assert a.token_ids == late.token_ids and "late" in llm.models
    llm.unload_head("late")
    assert "late" not in llm.models
    with pytest.raises(ValueError, match="late"):
        llm.unload_head("late")


@pytest.mark.parametrize(
    "asked, field",
    [
        ({"prompts": "x" * 4000}, "prompts"),
        ({"prompts": ""}, "prompts"),
        ({"prompts": [[400]]}, "prompts"),
        ({"prompts": TEXT, "models": "nobody"}, "models"),
        ({"prompts": TEXT, "handoff": [{"on": "", "model": "a"}]}, "handoff"),
        ({"prompts": TEXT, "handoff": [{"on": 99999, "model": "a"}]}, "handoff"),
        ({"prompts": TEXT, "handoff": [{"on": "x", "model": "nobody"}]}, "handoff"),
        ({"prompts": TEXT, "handoff": [{"model": "a"}]}, "handoff"),
        ({"prompts": TEXT, "n": 0}, "n"),
    ],
)
def test_what_cannot_be_asked(llm, asked, field):
    with pytest.raises(RequestError) as error:
        llm.generate(**asked)
    assert error.value.field == field
    with pytest.raises(RequestError):
        llm.chat([{"content": "no role"}])
    assert llm.generate(TEXT, "a", GREEDY)[0].outputs[0].finish_reason == "length"  # it goes on


def test_the_http_api_over_the_same_engine(llm, wanted):
    async def ask() -> dict:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(llm.asgi()), base_url="http://llm") as client:
            body = {"model": "a", "prompt": TEXT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
            return (await client.post("/v1/completions", json=body)).json()

    assert asyncio.run(ask())["choices"][0]["token_ids"] == wanted["a"]


def test_forms_of_sampling_params():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(logit_bias={5: 1.0}).logit_bias == ((5, 1.0),)


def test_reference_logprobs_need_the_trunks_kv_behind_a_handoff_too(llm, files):
    llm.load_head("own", files[1]["a"], "isolated")
    with pytest.raises(RequestError, match="makes its own"):
        llm.generate(TEXT, "a", GREEDY, handoff=[{"on": "x", "model": "own"}], reference_logprobs=True)
    llm.unload_head("own")


def test_what_cannot_be_opened(files):
    with pytest.raises(UsageError, match="num_pages"):
        LLM(files[0], num_pages="4096")
    with pytest.raises(UsageError, match=r"max_seqs.*did you mean max_num_seqs"):
        LLM(files[0], max_seqs=4)
    with pytest.raises(UsageError, match="nowhere"):
        LLM(files[0], {"a": "nowhere"})
    assert issubclass(UsageError, ValueError)


def test_the_package_names_its_public_parts():
    assert all(getattr(icarus_jax, name) is not None for name in icarus_jax.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = icarus_jax.nothing
