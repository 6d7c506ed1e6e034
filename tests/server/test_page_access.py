"""The web page's files and rights, in a real browser, in front of the double: keys, a stop, a stream that fails."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from icarus_jax.server.auth import Keys
from icarus_jax.server.page_routes import FOLDER, PAGE_FILES
from tests.server import browsing
from tests.server.browsing import HANG_MS, ask, opened
from tests.server.served import GOOD, check_error, serving, wait_for

USER, ADMIN = "sk-user-secret", "sk-admin-secret"


@pytest.fixture(scope="module")
def guarded():
    with serving(keys=Keys([f"ann:{USER}"], [f"root:{ADMIN}"])) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with browsing.browsing() as made:
        yield made


def test_the_page_needs_no_key_and_what_it_shows_does(guarded):
    for path in PAGE_FILES:
        answer = guarded.http.get(path)
        assert answer.status_code == guarded.http.head(path).status_code == 200, path
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
    assert guarded.http.get("/").headers["content-type"].startswith("text/html")
    assert "javascript" in guarded.http.get("/page/main.js").headers["content-type"]
    for path in ("/page/nowhere.js", "/page/", "/page/index.html", "/page/..%2fauth.py", "/page/stats"):
        check_error(guarded.http.get(path), 401, None, "invalid_api_key")
    check_error(
        guarded.http.get("/page/stats", headers={"Authorization": f"Bearer {USER}"}), 403, None, "admin_key_required"
    )
    assert guarded.http.get("/page/stats", headers={"Authorization": f"Bearer {ADMIN}"}).json()["pages_total"] > 0


def test_nothing_else_in_the_folder_is_served():
    with serving() as served:
        for path in ("/page/nowhere.js", "/page/", "/page/..%2fauth.py", "/page/%2e%2e/auth.py"):
            assert served.http.get(path).status_code == 404, path
        assert not [path for path in served.http.get("/openapi.json").json()["paths"] if path in PAGE_FILES]


@pytest.mark.parametrize("file", sorted(FOLDER.iterdir()), ids=lambda file: file.name)
def test_the_files_are_short_and_make_no_html(file):
    text = file.read_text()
    assert len(text.splitlines()) < 300
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|style=|\son\w+=", text
    )
    assert not re.search(r"(?:https?:)?//[a-z]", text.replace('xmlns="http://www.w3.org/2000/svg"', ""))


@browsing.NEEDED
def test_a_key_is_entered_once(browser, guarded):
    with opened(browser, guarded.url) as page:
        alert, models, live = page.get_by_role("alert"), page.locator("#models input"), page.locator("#live")
        assert "there is no API key" in alert.inner_text()
        assert page.evaluate("document.activeElement.id") == "key-input"
        page.keyboard.type("sk-wrong")
        page.keyboard.press("Enter")
        expect(alert).to_contain_text("the API key is not known", timeout=HANG_MS)
        page.keyboard.type(USER)
        page.keyboard.press("Enter")
        expect(models).to_have_count(3, timeout=HANG_MS)
        assert not alert.is_visible() and not page.locator("#key-form").is_visible()
        expect(page.locator("#live-note")).to_have_text("this needs an admin key", timeout=HANG_MS)
        ask(page, "x", ["parrot"], max_tokens=2)
        browsing.wait_until_answered(page)
        assert guarded.engine.requests[-1].tenant == "ann"
        page.reload()
        expect(models).to_have_count(3, timeout=HANG_MS)
        page.click("#key summary")
        page.fill("#key-input", ADMIN)
        page.keyboard.press("Enter")
        live.wait_for()
        assert "secret" not in page.content() and page.evaluate("localStorage.length") == 0
        assert page.context.cookies() == []
        another = page.context.new_page()
        another.goto(guarded.url)
        expect(another.get_by_role("alert")).to_contain_text("there is no API key", timeout=HANG_MS)


@browsing.NEEDED
def test_all_comes_from_the_server(browser, guarded):
    with opened(browser, "about:blank", wait=False) as page:
        answers = []
        page.on("response", lambda response: answers.append((response.url, response.status)))
        page.goto(guarded.url)
        page.get_by_role("alert").wait_for()
        found = {url.removeprefix(guarded.url): status for url, status in answers}
        assert {path for path, status in found.items() if status == 200} <= set(PAGE_FILES)
        assert {path for path in PAGE_FILES if path.endswith((".js", ".css"))} | {"/"} <= set(found)
        assert all(status == 401 for path, status in found.items() if path not in PAGE_FILES)


@browsing.NEEDED
def test_stop(browser):
    with serving(step_seconds=0.05) as served, opened(browser, served.url) as page:
        ask(page, "hello", ["trunk", "parrot"], max_tokens=90)
        page.locator('[data-model="parrot"] .run').wait_for()
        page.focus("#stop")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_have_text("Stopped.", timeout=HANG_MS)
        wait_for(lambda: len(served.engine.aborted) == 2)
        for hint in page.locator(".answer .hint").all_inner_texts():
            assert hint.endswith("ended: stopped") and not hint.startswith("90")
        assert page.locator(".answer button:visible").count() == 0, "half an answer cannot be continued"
        assert page.evaluate("document.activeElement.id") == "stop" and not page.get_by_role("alert").is_visible()


@browsing.NEEDED
def test_a_stream_that_fails_says_why(browser):
    with serving() as served, opened(browser, served.url) as page:
        ask(page, "hello", ["trunk", "broken"], max_tokens=90)
        alert = page.get_by_role("alert")
        expect(alert).to_have_text("the engine failed while it worked on this request", timeout=HANG_MS)
        assert page.locator('[data-model="broken"] .hint').inner_text().endswith("ended: error")
        assert served.http.post("/v1/completions", json=GOOD).status_code == 200
