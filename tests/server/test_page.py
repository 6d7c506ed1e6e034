"""The web page in a real browser, in front of the real engine with a tiny trunk and two heads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re

import pytest
from playwright.sync_api import expect

from icarus_jax.weights import tokenizer
from tests import tiny
from tests.engine.harness import SMALL, make_engine
from tests.server import browsing
from tests.server.browsing import HANG_MS, answer, ask, opened, wait_until_answered
from tests.server.served import Served, wait_for

pytestmark = browsing.NEEDED
MODELS = ("trunk", "a", "b")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Random models: a token is a byte, and what they write is no text. A grammar makes them say what a test needs."""
    path = tmp_path_factory.mktemp("model")
    folder = tiny.tiny_model("llama", path)
    heads = {name: (tiny.tiny_adapter(folder, path, seed=seed), "shared") for seed, name in enumerate("ab", 1)}
    config = dataclasses.replace(SMALL, max_num_seqs=8, max_model_len=768, num_pages=1600)
    text = tokenizer.load_tokenizer(folder)
    ends = (text.eos_token_id,)
    with contextlib.closing(Served(make_engine(folder, heads, config, ends), text, ends)) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with browsing.browsing() as made:
        yield made


@pytest.fixture
def page(browser, served):
    with opened(browser, served.url) as made:
        yield made


def let_them_say(page, text: str, **more: object) -> None:
    """The models can write nothing but this text from now on. more: other fields of the request."""

    def change(route):
        body = route.request.post_data_json | {"structured_outputs": {"choice": [text]}} | more
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", change)


def style(locator, name: str) -> str:
    return locator.evaluate("(element, name) => getComputedStyle(element)[name]", name)


def alone(served, model: str, prompt: str, max_tokens: int) -> str:
    messages = [{"role": "user", "content": prompt}]
    request = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
    return served.openai.chat.completions.create(**request).choices[0].message.content


def test_a_fan_out_streams_into_the_columns(served, page):
    sent = []
    page.on("request", lambda request: sent.append(request) if request.method == "POST" else None)
    page.evaluate(
        """() => {
          window.seen = [];
          new MutationObserver((records) => {
            for (const { target, type } of records) {
              const column = target.closest?.(".answer");
              if (column) seen.push([column.dataset.model, type === "attributes" ? "end" : "text"]);
            }
          }).observe(document.querySelector("#answers"),
                     { childList: true, subtree: true, attributes: true, attributeFilter: ["aria-busy"] });
        }"""
    )
    ask(page, "one prompt", MODELS, max_tokens=24)
    wait_until_answered(page)
    (request,) = sent
    assert request.post_data_json["models"] == list(MODELS)
    for model in MODELS:
        assert answer(page, model) == alone(served, model, "one prompt", 24)
        assert "24 tokens" in page.locator(f'[data-model="{model}"] .hint').inner_text()
    seen = [tuple(event) for event in page.evaluate("seen")]
    first_end = min(seen.index((model, "end")) for model in MODELS)
    assert max(seen.index((model, "text")) for model in MODELS) < first_end, "one after the other"


def test_each_token_shows_how_far_it_is_from_the_trunk(page):
    ask(page, "how far", MODELS, max_tokens=16)
    wait_until_answered(page)
    marks = {
        model: page.locator(f'[data-model="{model}"] .run > span').evaluate_all(
            "spans => spans.map((span) => [span.className, span.title])"
        )
        for model in MODELS
    }
    assert {level for level, _ in marks["trunk"]} == {"kl-0"}, "the trunk is as far from itself as nothing"
    assert {level for level, _ in marks["a"]} != {"kl-0"}
    inf = float("inf")
    ends = {"kl-minus": (-inf, -0.1), "kl-0": (-0.1, 0.1), "kl-1": (0.1, 0.5), "kl-2": (0.5, 2.0), "kl-3": (2.0, inf)}
    for level, title in marks["a"]:
        # A token whose bytes are no character yet is shown with the next ones; the title rounds each of them.
        numbers = [float(number) for number in re.findall(r"(-?\d+\.\d+) nats \(a ", title)]
        low, high = ends[level]
        assert low - 0.005 * len(numbers) <= sum(numbers) <= high + 0.005 * len(numbers), (level, title)
    lines = page.locator("#legend li span").evaluate_all("spans => spans.map(s => getComputedStyle(s).textDecoration)")
    assert page.locator("#legend").is_visible() and len({line.partition("rgb")[0] for line in lines}) == 5


def test_a_handoff_changes_the_colour(page):
    let_them_say(page, "plan, then act")
    page.click("#add-rule")
    page.locator("#rules input").fill("then")
    page.locator("#rules select").select_option("b")
    ask(page, "who acts?", ("a",))
    wait_until_answered(page)
    column = page.locator('[data-model="a"]')
    before, after = column.locator(".run").all()
    assert (before.text_content(), after.text_content()) == ("plan, then", " act")
    mark = column.locator(".handoff")
    assert mark.text_content() == "→ b" and style(mark, "color") == style(after, "color")
    assert style(before, "color") != style(after, "color")
    assert column.locator("h3").inner_text() == "a → b"


@pytest.mark.parametrize("kl", [True, False])
def test_what_a_model_writes_is_inert(page, kl):
    text = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'><b>&amp;</b>"
    let_them_say(page, text, stop=[f"{text}!"])  # until it can be no stop any more, it is held back: it comes at once
    page.locator("#kl").set_checked(kl)
    ask(page, text, ("a", "b"), max_tokens=120)
    wait_until_answered(page)
    assert answer(page, "a") == answer(page, "b") == text
    page.get_by_role("button", name="Continue with a").click()
    assert page.locator("#turns .you").text_content() == text
    assert page.locator("main :is(script, img, b)").count() == 0 and page.evaluate("window.hit") is None


def test_the_conversation_goes_on_from_the_cache(page):
    said = "what was said"
    let_them_say(page, said)
    ask(page, "the first question", MODELS)
    wait_until_answered(page)
    page.get_by_role("button", name="Continue with a").click()
    assert page.evaluate("document.activeElement.id") == "prompt" and said in page.locator("#turns").text_content()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "and then?", ("b",))
    assert [m["role"] for m in sent.value.post_data_json["messages"]] == ["user", "assistant", "user"]
    assert sent.value.post_data_json["messages"][1]["content"] == said
    wait_until_answered(page)
    words = page.locator("#cost li").all_inner_texts()
    counts = {label: int(number) for number, _, label in (word.partition(" ") for word in words)}
    assert counts["cached: written by a"] > 0 and counts["cached: a prompt of this conversation"] > 0
    total, cached, computed = map(int, re.findall(r"\d+", page.locator("#cost-text").inner_text())[:3])
    assert (
        (sum(counts.values()), counts["prefilled for this request"])
        == (total, computed)
        == (cached + computed, computed)
    )
    page.click("#restart")
    assert page.locator("#turns li").count() == 0


def test_an_error_is_readable(served, page):
    ask(page, "too long", ("a",), max_tokens=100000)
    alert = page.get_by_role("alert")
    alert.wait_for()
    body = {"model": "a", "messages": [{"role": "user", "content": "too long"}], "max_tokens": 100000}
    refused = served.http.post("/v1/chat/completions", json=body)
    assert alert.inner_text() == refused.json()["error"]["message"]
    assert page.locator(".answer .hint").inner_text() == "0 tokens · ended: error"
    ask(page, "shorter", ("a",), max_tokens=4)
    wait_until_answered(page)
    assert not alert.is_visible()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "nobody is there", ("a",))
    expect(alert).to_contain_text("does not answer", timeout=HANG_MS)
    ask(page, "nobody is asked", ())
    expect(alert).to_contain_text("at least one model", timeout=HANG_MS)


def test_the_live_view_moves(served, page):
    def number(name: str) -> int:
        return int(page.locator(f'#numbers dt:text-is("{name}") + dd').inner_text())

    page.locator("#live").wait_for()
    before = number("tokens generated"), number("fan-out requests")
    ask(page, "numbers that move", MODELS, max_tokens=20)
    wait_until_answered(page)
    wait_for(lambda: number("tokens generated") >= before[0] + 60)
    wait_for(lambda: number("sequences running") == 0)
    assert number("fan-out requests") == before[1] + 1
    shown = {
        label: int(count) for count, _, label in (t.partition(" ") for t in page.locator("#live li").all_inner_texts())
    }
    assert shown["cached, written for another model"] == served.metric(
        'icarus_prefix_cache_hit_tokens_total{source="cross_model"}'
    )
    assert shown["kept for later prompts"] == served.metric('icarus_kv_pages{state="cached"}') > 0
    assert sum(list(shown.values())[:3]) == served.metric("icarus_kv_pages_capacity")
    owners = page.locator("#owners li").all_inner_texts()
    assert sum(int(text.split()[0]) for text in owners) >= shown["kept for later prompts"]
    assert {text.split()[-1] for text in owners} <= set(MODELS)
    assert "," in page.locator("#chart polyline").get_attribute("points")


@pytest.mark.parametrize("scheme, is_dark", [("light", False), ("dark", True)])
def test_light_and_dark_can_be_read(browser, served, scheme, is_dark):
    with opened(browser, served.url, color_scheme=scheme) as page:
        channels = [int(c) for c in re.findall(r"\d+", style(page.locator("body"), "backgroundColor"))]
        assert (max(channels) < 64) is is_dark and (min(channels) > 192) is not is_dark
        page.locator("#live").wait_for()
        ask(page, "contrast", MODELS, max_tokens=4)
        wait_until_answered(page)
        # Every model's colour on every mark of a token.
        page.evaluate(
            """() => {
              for (let i = 0; i < 8; i++) for (const level of ["minus", "0", "1", "2", "3"]) {
                const run = document.querySelector(".run").cloneNode();
                const mark = document.createElement("span");
                run.className = `run model-${i}`;
                Object.assign(mark, { className: `kl-${level}`, textContent: `${i}` });
                run.append(mark);
                document.querySelector(".answer .text").append(run);
              }
              document.querySelector("#error").hidden = false;
              document.querySelector("#error").append("an error");
            }"""
        )
        contrasts = browsing.contrasts(page)
        assert len(contrasts) > 80
        assert not [entry for entry in contrasts if entry[1] < 4.5]


def test_by_keyboard_only(served, page):
    def focused(expression: str):
        return page.evaluate(f"(e => {expression})(document.activeElement)")

    def tab_to(condition: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            assert focused("e === document.body || getComputedStyle(e).outlineStyle !== 'none'"), (
                "the focus is not visible"
            )
            if focused(condition):
                return
        raise AssertionError(f"Tab does not lead to {condition}")

    order = []
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(focused("e.id || e.value || e.textContent"))
    assert order == [*("API key", "trunk", "a", "b", "prompt", "max-tokens", "temperature", "kl"), *order[8:]]
    assert order[8:11] == ["add-rule", "send", "stop"]
    page.evaluate("document.activeElement.blur()")
    tab_to("e.value === 'trunk'")
    page.keyboard.press("Space")
    tab_to("e.id === 'prompt'")
    page.keyboard.type("no mouse")
    tab_to("e.id === 'max-tokens'")
    page.keyboard.type("6")
    tab_to("e.id === 'send'")
    page.keyboard.press("Enter")
    wait_until_answered(page)
    assert focused("e.id") == "send", "the focus stays where it was"
    assert page.locator(".answer").count() == 2
    tab_to("e.textContent === 'Continue with b'")
    page.keyboard.press("Enter")
    assert focused("e.id") == "prompt"
    page.keyboard.type("on")
    page.keyboard.press("Control+Enter")
    wait_until_answered(page)
    unnamed = page.locator("input, textarea, select, button").evaluate_all(
        "all => all.filter((e) => !e.labels?.length && !e.ariaLabel && !e.textContent.trim()).map((e) => e.outerHTML)"
    )
    assert not unnamed
    assert page.locator("[aria-live], [role=status]").count() == 1, "a screen reader reads the status, not each token"


def test_on_a_phone(browser, served):
    with opened(browser, served.url, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True) as page:
        let_them_say(page, "W" * 100)
        page.click("#add-rule")
        page.locator("#rules input").fill("WW")
        page.locator("#live").wait_for()
        ask(page, "w" * 100, MODELS, max_tokens=110)
        wait_until_answered(page)
        wide = page.evaluate(
            "[...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() && !e.closest('svg') &&"
            " e.getBoundingClientRect().right > 360).map((e) => e.outerHTML.slice(0, 80))"
        )
        assert not wide and page.evaluate("document.documentElement.scrollWidth") == 360
        lefts = page.locator(".answer").evaluate_all("all => all.map((e) => e.getBoundingClientRect().left)")
        assert len(lefts) == 3 and len(set(lefts)) == 1, "one below the other"
