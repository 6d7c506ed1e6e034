"""A real headless Chromium, for tests of the web page."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
NEEDED = pytest.mark.skipif(
    not shutil.which(CHROMIUM), reason="the page is tested in a real browser: apt-get install chromium"
)
HANG_MS = 300_000  # a limit for hangs: a busy machine must not reach it


@contextlib.contextmanager
def browsing() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Browser, url: str, wait: bool = True, **options: Any) -> Iterator[Page]:
    """The page at a URL; wait: until it has listed its models, or says why it cannot.

    What the browser itself complains of (a script's fault, a breach of the content security policy) fails the test; a
    refused request is no such thing.
    """
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(HANG_MS)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    try:
        page.goto(url)
        if wait:
            page.locator("#models input, #error:visible").first.wait_for()
        yield page
    finally:
        context.close()
    complaints = [text for text in complaints if not text.startswith("Failed to load resource")]
    assert not complaints, complaints


def ask(page: Page, prompt: str, models: Sequence[str], **fields: object) -> None:
    """Fills the form in and sends it. fields: id of an input -> its value."""
    for box in page.locator("#models input").all():
        box.set_checked(box.input_value() in models)
    for name, value in fields.items():
        page.fill(f"#{name.replace('_', '-')}", str(value))
    page.fill("#prompt", prompt)
    page.click("#send")


def wait_until_answered(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("complete", timeout=HANG_MS)


def answer(page: Page, model: str) -> str:
    """The text of a model's column, without the marks of handoffs."""
    runs = page.locator(f'.answer[data-model="{model}"] .run').all()
    return "".join(run.text_content() or "" for run in runs)


# WCAG's contrast between each visible text and what lies behind it.
CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = channels(colour).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((channels(colour)[3] ?? 1) > 0) return colour;
    }
  };
  const texts = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.closest("svg") &&
    [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return texts.map((e) => {
    const [low, high] = [light(getComputedStyle(e).color), light(behind(e))].sort((a, b) => a - b);
    return [`${e.tagName}.${e.className} ${e.textContent.slice(0, 20)}`, (high + 0.05) / (low + 0.05)];
  });
}"""


def contrasts(page: Page) -> list[tuple[str, float]]:
    """Each visible text, and its contrast: 4.5 can be read well."""
    return [(text, contrast) for text, contrast in page.evaluate(CONTRASTS)]
