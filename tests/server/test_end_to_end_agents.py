"""What only a shared cache can do, over HTTP and the real engine: fan-out, handoff, heads at run time, sessions."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading

import numpy as np
import pytest

from icarus_jax.server.metrics import Metrics
from icarus_jax.server.timeline import Timeline
from icarus_jax.weights import tokenizer
from tests import tiny
from tests.engine.harness import SMALL, generate, make_engine
from tests.server.served import Served, check_error, wait_for

PROMPT = list(b"a plan, and then an action")
INVOCATION = list(b"<go>")
CONFIG = dataclasses.replace(
    SMALL, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64, num_pages=256, writer_adapters=True, max_loras=3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trunk, and beside it the heads that may be loaded: c, d, and an aLoRA."""
    path = tmp_path_factory.mktemp("model")
    trunk = tiny.tiny_model("llama", path)
    for seed, name in enumerate(("a", "b", "c", "d")):
        shutil.move(tiny.tiny_adapter(trunk, path, seed=seed), path / name)
    targets = ("q_proj", "k_proj", "v_proj")
    shutil.move(tiny.tiny_adapter(trunk, path, targets, seed=9, alora_invocation_tokens=INVOCATION), path / "alora")
    shutil.move(trunk, path / "trunk")
    return path


@pytest.fixture(scope="module")
def served(folder):
    heads = {"a": ("a", "shared"), "b": ("b", "shared"), "x": ("a", "isolated")}
    heads = {name: (str(folder / path), kv) for name, (path, kv) in heads.items()}
    engine = make_engine(str(folder / "trunk"), heads, CONFIG)
    with contextlib.closing(
        Served(engine, tokenizer.load_tokenizer(folder / "trunk"), head_folders=[folder])
    ) as server:
        yield server


def ask(served, model="trunk", prompt=PROMPT, max_tokens=12, **fields):
    fields = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True, **fields}
    return served.complete(ignore_eos=True, **fields)


def ids(answer, choice=0):
    return answer["choices"][choice]["token_ids"]


def test_fan_out_says_what_each_model_says_alone(served):
    models = ["trunk", "a", "b", "x"]
    before = served.metric("icarus_prefill_tokens_total")
    prompt = [*PROMPT, 33]
    together = ask(served, prompt=prompt, models=models)
    # one prefill for the three that share the trunk's K/V, one for 'x', which has its own
    assert served.metric("icarus_prefill_tokens_total") - before == 2 * len(prompt)
    assert [c["model"] for c in together["choices"]] == models
    alone = [ids(ask(served, model, prompt)) for model in models]
    assert [ids(together, i) for i in range(4)] == alone
    assert len({tuple(a) for a in alone}) == 4
    assert served.metric("icarus_fan_out_requests_total") == 1


def test_handoff_says_what_two_requests_say(served):
    first = ids(ask(served, "a"))
    at = next(i for i in range(3, 12) if first[i] not in first[:i])
    rest = ids(ask(served, "b", [*PROMPT, *first[: at + 1]], 12 - at - 1))
    before = served.metric("icarus_prefill_tokens_total"), served.metric("icarus_handoffs_total")
    answer = ask(served, "a", handoff=[{"on": first[at], "model": "b"}])
    assert ids(answer) == first[: at + 1] + rest
    assert answer["choices"][0]["handoffs"] == [{"token": at + 1, "model": "b"}]
    assert answer["usage"]["by_model"] == {"a": {"completion_tokens": at + 1}, "b": {"completion_tokens": 11 - at}}
    after = served.metric("icarus_prefill_tokens_total"), served.metric("icarus_handoffs_total")
    assert (after[0] - before[0], after[1] - before[1]) == (0, 1)


def test_handoff_on_a_text_of_two_tokens(served):
    """Bytes are tokens here: a text of two is cut by a token border."""
    first = ids(ask(served, "a", max_tokens=30))
    shown = [i for i in range(2, 29) if max(first[i - 1 : i + 1]) < 256]
    text = served.http.post("/detokenize", json={"tokens": first}).json()["prompt"]
    at = next(i for i in shown if "\ufffd" not in _decode(served, first[i - 1 : i + 1]))
    on = _decode(served, first[at - 1 : at + 1])
    assert on in text
    (choice,) = ask(served, "a", max_tokens=30, handoff=[{"on": on, "model": "trunk"}])["choices"]
    cut = choice["handoffs"][0]["token"]
    assert cut <= at + 1 and choice["token_ids"][:cut] == first[:cut]
    assert _decode(served, first[:cut]).endswith(on) and on not in _decode(served, first[: cut - 1])


def _decode(served, tokens):
    return served.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]


def test_reference_logprobs_are_the_trunks_own(served):
    answer = ask(served, "a", max_tokens=8, reference_logprobs=True, models=["a", "trunk"])
    for choice in answer["choices"]:
        scored = choice["logprobs"]
        text = [*PROMPT, *choice["token_ids"]]
        echo = ask(served, "trunk", text, 0, echo=True, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"]
        np.testing.assert_allclose(scored["reference_logprobs"], echo[-8:], rtol=1e-3, atol=1e-4)
        gap = sum(scored["token_logprobs"]) - sum(scored["reference_logprobs"])
        np.testing.assert_allclose(choice["kl_to_base"], gap, atol=1e-9)
    head, trunk = (choice["kl_to_base"] for choice in answer["choices"])
    assert abs(trunk) < 1e-3 < head
    body = {"model": "x", "prompt": PROMPT, "reference_logprobs": True}
    check_error(served.http.post("/v1/completions", json=body), 400, "reference_logprobs")


def test_a_head_loaded_later_is_a_head_given_at_the_start(served, folder):
    for kv in ("shared", "isolated"):
        answer = served.http.post("/v1/load_head", json={"name": f"c-{kv}", "path": "c", "kv": kv})
        assert (answer.status_code, answer.json()["kv"]) == (200, kv), answer.text
    adapter = str(folder / "c")
    early = make_engine(str(folder / "trunk"), {kv: (adapter, kv) for kv in ("shared", "isolated")}, CONFIG)
    for kv in ("shared", "isolated"):
        assert ids(ask(served, f"c-{kv}")) == generate(early, kv, PROMPT, max_tokens=12).token_ids


def test_an_alora_is_loaded_as_activated(served):
    answer = served.http.post("/v1/load_lora_adapter", json={"lora_name": "go", "lora_path": "alora"})
    assert answer.status_code == 200, answer.text
    assert served.openai.models.retrieve("go").kv == "activated"
    assert ids(ask(served, "go")) == ids(ask(served, "trunk"))  # not invoked
    invoked = [*PROMPT, *INVOCATION, 33]
    assert ids(ask(served, "go", invoked)) != ids(ask(served, "trunk", invoked))


def load(served, path):
    answer = served.http.post("/v1/load_head", json={"name": "live", "path": path, "kv": "shared"})
    assert answer.status_code == 200, answer.text


def test_reloads_under_load(served):
    """A head changes under running requests: none fails, each is one version's throughout, and no page is lost."""
    says = {}
    for path in ("c", "d"):
        load(served, path)
        says[path] = ids(ask(served, "live"))
    assert says["c"] != says["d"]
    evictions = served.metric("icarus_page_evictions_total")
    answers, stop = [], threading.Event()

    def client():
        while not stop.is_set():
            answers.append(ask(served, "live"))

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(12):
        load(served, "cd"[i % 2])
        seen = len(answers)
        wait_for(lambda seen=seen: len(answers) >= seen + 2)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert {tuple(ids(answer)) for answer in answers} == {tuple(a) for a in says.values()}
    whole_pages = len(PROMPT) // CONFIG.page_size * CONFIG.page_size
    assert all(a["usage"]["prompt_tokens_details"]["cached_tokens"] >= whole_pages for a in answers)
    assert served.metric("icarus_page_evictions_total") == evictions
    assert served.metric("icarus_head_loads_total") >= 14


def test_where_a_requests_time_goes(served, monkeypatch):
    """Of four choices two run at a time: the others are in the queue meanwhile."""
    timelines: list[Timeline] = []
    finished = Metrics.finished

    def noting(metrics: Metrics, model: str, timeline: Timeline) -> None:
        timelines.append(timeline)
        finished(metrics, model, timeline)

    monkeypatch.setattr(Metrics, "finished", noting)
    name = 'icarus_request_{}_time_seconds_{}{{model_name="b"}}'
    names = [name.format(phase, part) for phase in ("queue", "prefill", "decode") for part in ("count", "sum")]
    before = [served.metric(name) for name in names]
    ask(served, "b", [[*PROMPT, 90], [*PROMPT, 91]], n=2)
    after = [served.metric(name) for name in names]
    assert [round(b - a) for a, b in zip(before[::2], after[::2], strict=True)] == [4, 4, 4]
    phases = [(t.queue_seconds, t.prefill_seconds, t.decode_seconds) for t in timelines]
    sums = [b - a for a, b in zip(before[1::2], after[1::2], strict=True)]
    assert sums == pytest.approx([sum(phase) for phase in zip(*phases, strict=True)]) and min(sums) > 0
    for timeline, times in zip(timelines, phases, strict=True):
        assert min(times) > 0 and sum(times) <= timeline.ended - timeline.arrival
    admitted = sorted(timeline.admitted for timeline in timelines)
    assert admitted[1] < min(timeline.last_token for timeline in timelines) < admitted[2]


def test_a_session_is_retained_and_released(served):
    ask(served, "a", session={"id": "s", "retain": "pinned", "next_model": "b"})
    wait_for(lambda: served.metric("icarus_sessions") == 1)
    assert served.metric('icarus_kv_pages{state="used"}') > 0
    released = [served.http.post("/v1/release_session", json={"id": "s"}).json()["released"] for _ in range(2)]
    assert released == [True, False]
    ask(served, max_tokens=1)  # gauges are those of the last step
    wait_for(lambda: served.metric('icarus_kv_pages{state="used"}') == 0)
    assert served.metric("icarus_sessions") == 0
