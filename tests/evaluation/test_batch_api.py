"""/v1/files and /v1/batches with the official openai client: answers, errors, limits, tenants, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from icarus_jax.evaluation import batch_table, batch_worker
from icarus_jax.evaluation.batch import Job
from icarus_jax.evaluation.batch_routes import BatchRoutes
from icarus_jax.evaluation.batch_store import BatchLimits, BatchStore, Full
from icarus_jax.evaluation.batch_worker import BatchWorker
from icarus_jax.evaluation.result_file import ResultFile
from icarus_jax.server.auth import Keys
from icarus_jax.server.limits import Limits
from icarus_jax.weights import tokenizer
from tests import tiny
from tests.engine.harness import SMALL, make_engine
from tests.evaluation.test_evaluate import ROOT, TOKENIZER, batch_request
from tests.server.served import GOOD, Served, check_error, serving, wait_for
from tests.server.test_event_loop import watched
from tests.server.test_fuzz import ODD_VALUES

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ANN, BOB = "sk-ann-secret", "sk-bob-secret"


def options(folder: Path, limits: BatchLimits | None = None, in_flight: int = 2) -> dict[str, Any]:
    """The options of create_app that switch batches on."""
    worker = BatchWorker(BatchStore(folder, limits), in_flight)
    return {"extra": [BatchRoutes(worker)], "lifespan": worker.lifespan}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    with serving(**options(tmp_path_factory.mktemp("batches"))) as server:
        yield server


def lines(requests: list) -> bytes:
    return "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in requests).encode()


def upload(client: openai.OpenAI, requests: list | bytes):
    content = requests if isinstance(requests, bytes) else lines(requests)
    return client.files.create(file=("requests.jsonl", io.BytesIO(content)), purpose="batch")


def create(client: openai.OpenAI, requests: list | bytes, endpoint: str = COMPLETIONS, window: str = "24h", **more):
    file = upload(client, requests)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window, **more)


def wait(client: openai.OpenAI, batch_id: str, *statuses: str):
    wait_for(lambda: client.batches.retrieve(batch_id).status in statuses)
    return client.batches.retrieve(batch_id)


ENDS = ("completed", "failed", "expired", "cancelled")


def content(client: openai.OpenAI, file_id: str | None) -> dict[str, dict]:
    """The lines of a batch's file, by custom_id; none is there twice."""
    if file_id is None:
        return {}
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    by_id = {line["custom_id"]: line for line in found}
    assert len(by_id) == len(found)
    assert all(list(line) == ["id", "custom_id", "response", "error"] for line in found)
    return by_id


def counted(token: int, num: int = 3) -> str:
    return TOKENIZER.decode([token + 1 + i for i in range(num)], skip_special_tokens=True)


def said(line: dict) -> str:
    return line["response"]["body"]["choices"][0]["text"]


# ---- a batch from end to end


def test_on_the_real_engine(tmp_path):
    folder = tiny.tiny_model("llama", tmp_path)
    adapter = tiny.tiny_adapter(folder, tmp_path, seed=1)
    engine = make_engine(folder, {"a": (adapter, "shared")}, SMALL)
    more = options(tmp_path / "batches")
    with contextlib.closing(Served(engine, tokenizer.load_tokenizer(folder), **more)) as server:
        client = server.openai
        ask = {"max_tokens": 6, "temperature": 0}
        bodies = {
            f"{model} {i}": {"model": model, "messages": [{"role": "user", "content": f"say {i}"}], **ask}
            for i in range(4)
            for model in ("trunk", "a")
        }
        requests = [batch_request(name, CHAT, **body) for name, body in bodies.items()]
        batch = create(client, requests, CHAT, metadata={"of": "a test"})
        assert (batch.status, batch.object, batch.endpoint) == ("validating", "batch", CHAT)
        done = wait(client, batch.id, *ENDS)
        assert (done.status, done.error_file_id, done.errors) == ("completed", None, None)
        assert dict(done.request_counts) == {"total": 8, "completed": 8, "failed": 0}
        assert done.metadata == {"of": "a test"} and done.in_progress_at and done.finalizing_at and done.completed_at
        answers = content(client, done.output_file_id)
        for name, body in bodies.items():
            want = client.chat.completions.create(**body)
            response = answers[name]["response"]
            assert response["status_code"] == 200 and answers[name]["error"] is None
            got = openai.types.chat.ChatCompletion.model_validate(response["body"])
            assert got.choices[0].message.content == want.choices[0].message.content, name
        body = {"model": "a", "input": "hi", "max_output_tokens": 16}
        asked = {"custom_id": "r", "method": "POST", "url": "/v1/responses", "body": body}
        created = create(client, [asked], "/v1/responses")
        (line,) = content(client, wait(client, created.id, *ENDS).output_file_id).values()
        assert line["response"]["body"]["object"] == "response"


def test_a_refused_request_costs_no_other(served):
    client = served.openai
    requests = [
        batch_request("good", prompt=[5]),
        batch_request("no model", model="nobody", prompt=[5]),
        batch_request("other endpoint", CHAT, messages=[{"role": "user", "content": "hi"}]),
        batch_request("stream", prompt=[5], stream=True),
        batch_request("half", prompt="Thanks \ud83d"),
        batch_request("temperature", prompt=[5], temperature=-1),
    ]
    done = wait(client, create(client, requests).id, *ENDS)
    assert (done.status, dict(done.request_counts)) == ("completed", {"total": 6, "completed": 1, "failed": 5})
    assert {name: said(line) for name, line in content(client, done.output_file_id).items()} == {"good": counted(5)}
    bad = content(client, done.error_file_id)
    assert list(bad) != [] and bad["no model"]["response"]["status_code"] == 404
    assert bad["no model"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert bad["temperature"]["response"]["status_code"] == 400
    for name, why in (("other endpoint", COMPLETIONS), ("stream", "stream"), ("half", "surrogate")):
        assert bad[name]["response"] is None and why in bad[name]["error"]["message"]
        assert bad[name]["error"]["code"] == "invalid_request"


@pytest.mark.parametrize(
    "requests, code, line, why",
    [
        ([batch_request("a", prompt=[5]), "\n", "{broken\n"], "invalid_line", 3, "broken JSON"),
        ([batch_request("a", prompt=[5]), "[1]"], "invalid_line", 2, "JSON object"),
        ([batch_request("a", prompt=[5]), batch_request("a", prompt=[6])], "invalid_line", 2, "'a' is there twice"),
        ([{"method": "POST", "url": COMPLETIONS, "body": GOOD}], "invalid_line", 1, "custom_id"),
        ([], "empty_file", None, "no requests"),
        (["\n\n"], "empty_file", None, "no requests"),
        ([b"\xff\xfe\x00\n".decode("latin-1")], "invalid_line", 1, "broken JSON"),
        ([batch_request("a", prompt=[5]), f"[{'[],' * 200_000}0]"], "invalid_line", 2, "200001 brackets"),
        ([f"[{'0,' * 2_000_001}0]"], "invalid_line", 1, "2000001 commas"),
        ([f'{{"custom_id": "{"a" * (32 << 20)}"}}'], "invalid_line", 1, "bytes; at most"),
        ([batch_request("b" * 5000, prompt=[5])] * 2, "invalid_line", 2, "is there twice"),
    ],
)
def test_a_file_with_a_line_that_cannot_be_answered_for_fails(served, requests, code, line, why):
    client = served.openai
    before = len(served.engine.requests)
    done = wait(client, create(client, requests).id, *ENDS)
    assert done.status == "failed" and done.failed_at and done.output_file_id is done.error_file_id is None
    (error,) = done.errors.data
    assert (error.code, error.line) == (code, line) and why in error.message
    assert "/" not in error.message and len(error.message) < 200 and len(served.engine.requests) == before


def test_only_the_first_hundred_errors_are_shown(served):
    done = wait(served.openai, create(served.openai, b"{\n" * 150).id, *ENDS)
    assert [error.line for error in done.errors.data] == list(range(1, 101))


# ---- files


def test_files(served):
    client = served.openai
    made = [upload(client, b"{}\n" * (i + 1)) for i in range(3)]
    assert made[1].bytes == 6 and made[1].filename == "requests.jsonl" and made[1].purpose == "batch"
    assert made[1].object == "file" and made[1].status == "processed" and made[1].created_at
    assert client.files.retrieve(made[1].id) == made[1]
    assert client.files.content(made[1].id).content == b"{}\n" * 2
    listed = [file.id for file in client.files.list(limit=2)]  # it asks for all pages
    assert [name for name in listed if name in {file.id for file in made}] == [file.id for file in reversed(made)]
    oldest = [file.id for file in client.files.list(limit=1, order="asc", after=made[0].id)]
    assert oldest[:2] == [made[1].id, made[2].id]
    first = client.files.list(limit=1)
    assert first.has_more and len(first.data) == 1
    assert not client.files.list(purpose="vision").data
    assert client.files.delete(made[1].id).deleted
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            gone(made[1].id)
    assert made[1].id not in [file.id for file in client.files.list()]


def test_an_input_in_use_is_kept(tmp_path):
    with serving(step_seconds=0.05, **options(tmp_path)) as served:
        batch = create(served.openai, [batch_request("a", prompt=[5], max_tokens=100)])
        with pytest.raises(openai.ConflictError, match=batch.id):
            served.openai.files.delete(batch.input_file_id)
        served.openai.batches.cancel(batch.id)
        wait(served.openai, batch.id, "cancelled")
        assert served.openai.files.delete(batch.input_file_id).deleted


FILE = {"file": ("a.jsonl", b"{}\n")}
# In some encodings the file's name is half a character, which no answer can hold.
CONTENT_TYPE = "multipart/form-data; boundary=x"
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="\\ud83d"\r\n\r\n{}\n\r\n--x--\r\n'
)


@pytest.mark.parametrize(
    "sent, param, why",
    [
        ({"json": {}}, None, "multipart/form-data"),
        ({"content": b"x"}, None, "multipart/form-data"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, None, "boundary"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=a"}}, None, "form"),
        ({"files": FILE}, "purpose", "'batch'"),
        ({"files": FILE, "data": {"purpose": "vision"}}, "purpose", "'batch'"),
        ({"files": {"other": FILE["file"]}, "data": {"purpose": "batch"}}, "file", "file of JSON lines"),
        ({"files": {"x": (None, "y")}, "data": {"purpose": "batch", "file": "text"}}, "file", "file of JSON lines"),
        ({"files": [("file", FILE["file"])] * 2, "data": {"purpose": "batch"}}, None, "Too many files"),
        ({"files": FILE, "data": {"purpose": "batch", "expires_after[anchor]": "x"}}, "expires_after[anchor]", "stay"),
        *(
            ({"content": FORM, "headers": {"Content-Type": f"{CONTENT_TYPE}; charset={name}"}}, None, "charset")
            for name in ("undefined", "punycode", "unicode_escape", "utf-16")
        ),
    ],
)
def test_forms_that_are_refused(served, sent, param, why):
    error = check_error(served.http.post("/v1/files", **sent), 400, param)
    assert why in error["message"]


@pytest.mark.parametrize(
    "change, param, status",
    [
        ({"input_file_id": "file-none"}, "input_file_id", 404),
        ({"input_file_id": 5}, "input_file_id", 400),
        ({"endpoint": "/v1/embeddings"}, "endpoint", 400),
        ({"completion_window": "soon"}, "completion_window", 400),
        ({"completion_window": "0h"}, "completion_window", 400),
        ({"completion_window": None}, "completion_window", 400),
        ({"metadata": {"a": 1}}, "metadata", 400),
        ({"metadata": {"a" * 65: "x"}}, "metadata", 400),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", 400),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after", 400),
    ],
)
def test_batches_that_are_refused(served, change, param, status):
    file = upload(served.openai, [])
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | change
    check_error(served.http.post("/v1/batches", json=body), status, param, "file_not_found" if status == 404 else None)


def test_a_file_whose_content_is_deleted_meanwhile_is_not_found(served, monkeypatch):
    file, find = upload(served.openai, []), BatchStore.find

    def slow_find(store: BatchStore, *args: Any):
        found = find(store, *args)
        store.path(file.id).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(BatchStore, "find", slow_find)
    check_error(served.http.get(f"/v1/files/{file.id}/content"), 404, "file_id", "file_not_found")


def test_whatever_is_sent_is_no_500(served):
    file = upload(served.openai, [])
    good = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", "metadata": {}}
    for field in good:
        for value in ODD_VALUES:
            answer = served.http.post("/v1/batches", content=json.dumps(good | {field: value}))
            assert answer.status_code in (200, 400, 404), answer.text
    for odd in ("%00", "%ff", "%ed%a0%bd", "a" * 5000, "%27%20OR%201=1", "x%0a"):
        for path in (f"/v1/files/{odd}", f"/v1/batches/{odd}", f"/v1/files?after={odd}", f"/v1/batches?limit={odd}"):
            assert served.http.get(path).status_code in (400, 404), path
        served.http.get(f"/v1/files?purpose={odd}").raise_for_status()


def test_what_is_not_there(served):
    for path in ("/v1/batches/batch_x", "/v1/files/file-x", "/v1/files/file-x/content"):
        kind = path.split("/")[2].removesuffix("es").removesuffix("s")
        kind = {"batch": "batch", "fil": "file"}[kind]
        check_error(served.http.get(path), 404, f"{kind}_id", f"{kind}_not_found")
    check_error(served.http.post("/v1/batches/batch_x/cancel"), 404, "batch_id", "batch_not_found")
    check_error(served.http.get("/v1/batches?after=x"), 404, "after", "batch_not_found")
    check_error(served.http.get("/v1/files/..%2f..%2fbatches.sqlite/content"), 404, None)
    for query in ("limit=0", "limit=101", "limit=x", "limit=-1", "limit=%00", "limit=99999999999"):
        check_error(served.http.get(f"/v1/batches?{query}"), 400, "limit")
    check_error(served.http.get("/v1/files?order=up"), 400, "order")


def test_pages_of_batches(served):
    client = served.openai
    file = upload(client, [batch_request("a", prompt=[5])])
    made = [
        client.batches.create(input_file_id=file.id, endpoint=COMPLETIONS, completion_window="1h") for _ in range(5)
    ]
    assert [batch.id for batch in client.batches.list(limit=2)][:5] == [batch.id for batch in reversed(made)]
    for batch in made:
        assert wait(client, batch.id, *ENDS).status == "completed"


# ---- off, limits, tenants


def test_without_a_folder_a_message_says_how_to_switch_it_on():
    with serving(extra=[BatchRoutes(None)]) as served:
        paths = ("/v1/files", "/v1/batches", "/v1/files/x", "/v1/files/x/content", "/v1/batches/x")
        for answer in [*map(served.http.get, paths), *map(served.http.post, paths[:2]), served.http.delete(paths[2])]:
            assert "--config.server.batch_folder" in check_error(answer, 403, None, "batches_off")["message"]


def test_there_are_no_embeddings(served):
    with pytest.raises(openai.NotFoundError, match="generation only"):
        served.openai.embeddings.create(model="trunk", input="hello")


def test_limits(tmp_path):
    limits = BatchLimits(file_bytes=1000, requests=3, files=6, total_bytes=2500, batches=2)
    with serving(step_seconds=0.05, **options(tmp_path, limits)) as served:
        client = served.openai
        for num_bytes in (1001, 5 << 20):  # beyond the file alone, and beyond the form
            with pytest.raises(openai.APIStatusError, match="larger than 1000 bytes") as caught:
                upload(client, b"x" * num_bytes)
            assert caught.value.status_code == 413
        four = [batch_request(f"{i}", prompt=[5]) for i in range(4)]
        done = wait(client, create(client, four).id, *ENDS)
        assert done.status == "failed" and done.errors.data[0].code == "too_many_requests"
        slow = upload(client, [batch_request("a", prompt=[5], max_tokens=100)])
        ask = {"input_file_id": slow.id, "endpoint": COMPLETIONS, "completion_window": "24h"}
        two = [client.batches.create(**ask) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="at most 2 may be"):
            client.batches.create(**ask)
        for batch in two:
            client.batches.cancel(batch.id)
            wait(client, batch.id, "cancelled")
        upload(client, b"x" * 1000)
        with pytest.raises(openai.RateLimitError, match="2500 bytes are kept"):
            upload(client, b"x" * 1000)
        for file in list(client.files.list()):
            client.files.delete(file.id)
        for _ in range(6):
            upload(client, b"x")
        with pytest.raises(openai.RateLimitError, match="at most 6 files"):
            upload(client, b"x")
        assert not list((tmp_path / "contents").glob("*.part")) and len(list((tmp_path / "contents").iterdir())) == 6


def test_files_on_their_way_have_a_limit_together(tmp_path):
    """They lie on the disk before anything else counts them. One who is slow leaves room for other tenants."""
    limits = BatchLimits(file_bytes=3000, sent_bytes=6000)
    keys = Keys([f"ann:{ANN}", f"bob:{BOB}"])
    with serving(keys=keys, **options(tmp_path, limits)) as served:
        ann, bob = (served.openai.with_options(api_key=key) for key in (ANN, BOB))
        host, port = served.url.removeprefix("http://").split(":")
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ANN}\r\nContent-Length: 2500\r\n"
        head += f"Content-Type: {CONTENT_TYPE}\r\n\r\n--x\r\n"
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(head.encode())
            wait_for(lambda: refused(ann))
            with pytest.raises(openai.RateLimitError, match="2500 bytes of uploads wait, 2500 of them yours") as caught:
                upload(ann, b"x" * 2500)
            assert int(caught.value.response.headers["Retry-After"]) >= 1
            assert upload(bob, b"x" * 2500).bytes == 2500
        wait_for(lambda: not refused(ann))
        with pytest.raises(openai.APIStatusError, match="larger than 3000 bytes"):
            upload(ann, b"x" * (2 << 20))


def refused(client: openai.OpenAI) -> bool:
    try:
        return not upload(client, b"x" * 2500)
    except openai.RateLimitError:
        return True


def test_limits_hold_for_those_who_come_at_once(tmp_path):
    """All of them have been told that there is room."""
    store = BatchStore(tmp_path, BatchLimits(files=2))
    store.check_room("ann")
    for _ in range(2):
        store.add_file("ann", "a", "batch", io.BytesIO(b"x"))
    with pytest.raises(Full, match="at most 2 files"):
        store.add_file("ann", "a", "batch", io.BytesIO(b"x"))
    assert len(list((tmp_path / "contents").iterdir())) == 2
    store.add_file("bob", "b", "batch", io.BytesIO(b"x"))
    store.close()


def test_batches_make_no_files_without_end(tmp_path):
    """The same input may be run again and again, and its answers are kept."""
    with serving(**options(tmp_path, BatchLimits(files=4))) as served:
        client = served.openai
        file = upload(client, [batch_request("a", prompt=[5])])
        ask = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"}
        for _ in range(3):
            done = wait(client, client.batches.create(**ask).id, *ENDS)
        with pytest.raises(openai.RateLimitError, match="at most 4 files"):
            client.batches.create(**ask)
        client.files.delete(done.output_file_id)
        assert wait(client, client.batches.create(**ask).id, *ENDS).status == "completed"


def test_tenants_see_their_own_only(tmp_path):
    keys = Keys([f"ann:{ANN}", f"ann:{ANN}2", f"bob:{BOB}"], weights="ann=2")
    with serving(keys=keys, **options(tmp_path)) as served:
        ann, ann2, bob = (served.openai.with_options(api_key=key) for key in (ANN, f"{ANN}2", BOB))
        mine = create(ann, [batch_request("a", prompt=[5])])
        done = wait(ann, mine.id, *ENDS)
        assert done.status == "completed"
        assert [(r.tenant, r.weight) for r in served.engine.requests] == [("ann", 2.0)]
        assert wait(ann2, mine.id, *ENDS).output_file_id == done.output_file_id  # another key of the same tenant
        for call in (
            lambda: bob.batches.retrieve(mine.id),
            lambda: bob.batches.cancel(mine.id),
            lambda: bob.files.retrieve(mine.input_file_id),
            lambda: bob.files.content(done.output_file_id),
            lambda: bob.files.delete(mine.input_file_id),
            lambda: bob.files.list(after=mine.input_file_id),
            lambda: bob.batches.create(input_file_id=mine.input_file_id, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        assert not bob.files.list().data and not bob.batches.list().data
        with pytest.raises(openai.AuthenticationError):
            served.openai.with_options(api_key="wrong").files.list()


def test_the_batch_of_a_key_that_is_gone_gets_no_answers(tmp_path):
    many = [batch_request(f"{i}", prompt=[i + 1], max_tokens=20) for i in range(10)]
    with serving(step_seconds=0.02, keys=Keys([f"ann:{ANN}", f"bob:{BOB}"]), **options(tmp_path)) as served:
        create(served.openai.with_options(api_key=ANN), many)
        wait_for(lambda: served.engine.requests)
    with serving(keys=Keys([f"bob:{BOB}"]), **options(tmp_path)) as served:
        wait_for(lambda: stored(tmp_path, "batch")[0]["status"] == "completed")
        assert not served.engine.requests
    (batch,) = stored(tmp_path, "batch")
    bad = (tmp_path / "contents" / batch["error_file_id"]).read_text()
    assert (
        batch["request_counts"]["failed"] >= 8 and bad.count('"status_code":401') == batch["request_counts"]["failed"]
    )


def stored(folder: Path, kind: str) -> list[dict]:
    """What the database of a running server holds."""
    with contextlib.closing(sqlite3.connect(folder / "batches.sqlite")) as db:
        return [json.loads(row) for (row,) in db.execute("SELECT shown FROM objects WHERE kind = ?", [kind])]


def test_clients_that_wait_are_not_held_up(tmp_path):
    """Two tenants' batches together keep no more than the given places."""
    keys = Keys([f"ann:{ANN}", f"bob:{BOB}"])
    with serving(step_seconds=0.01, keys=keys, **options(tmp_path, in_flight=2)) as served:
        clients = [served.openai.with_options(api_key=key) for key in (ANN, BOB)]
        many = [batch_request(f"{i}", prompt=[i + 1], max_tokens=20) for i in range(12)]
        batches = [(client, create(client, many)) for client in clients]
        most, ended = 0, 0
        while ended < 2:
            most = max(most, served.engine.running)
            ended = sum(client.batches.retrieve(batch.id).status in ENDS for client, batch in batches)
        assert most <= 2
        tenants = [request.tenant for request in served.engine.requests]
        assert {"ann", "bob"} == set(tenants[:6]), "they take turns"


@pytest.mark.parametrize("more", [{"n": 2}, {"models": ["trunk", "parrot"], "model": None}, {"prompt": [[5], [6]]}])
def test_every_choice_of_a_request_takes_a_place(tmp_path, more):
    with serving(step_seconds=0.01, **options(tmp_path, in_flight=4)) as served:
        many = [batch_request(f"{i}", **{"prompt": [i + 1], "max_tokens": 20, **more}) for i in range(8)]
        batch, most = create(served.openai, many), 0
        while (now := served.openai.batches.retrieve(batch.id)).status not in ENDS:
            most = max(most, served.engine.running)
        assert now.request_counts.completed == 8 and most <= 4


def test_a_large_request_gets_its_places_among_small_ones(tmp_path):
    """They took every place that came free, so that all were never free together."""

    async def run() -> int:
        worker, done, ended = BatchWorker(BatchStore(tmp_path), 4), 0, False

        async def small(seconds: float) -> None:
            nonlocal done
            while not ended:
                async with worker._place(SimpleNamespace(sequences=1)):
                    await asyncio.sleep(seconds)
                    done += 1

        async with asyncio.TaskGroup() as tasks:
            for i in range(8):
                tasks.create_task(small(0.001 * (i + 1)))
            await asyncio.sleep(0.02)
            before = done
            async with asyncio.timeout(60), worker._place(SimpleNamespace(sequences=4)):
                ended = True
        return done - before

    assert asyncio.run(run()) < 20


def test_a_server_without_room_is_asked_again(tmp_path):
    """What the limits on waiting requests refuse is no answer."""
    limits = Limits(max_waiting_requests=1)
    with serving(step_seconds=0.05, limits=limits, **options(tmp_path, in_flight=4)) as served:
        many = [batch_request(f"{i}", prompt=[i + 1]) for i in range(8)]
        done = wait(served.openai, create(served.openai, many).id, *ENDS)
        assert dict(done.request_counts) == {"total": 8, "completed": 8, "failed": 0}
        assert served.metric('icarus_requests_rejected_total{key=""}') > 0


# ---- the end of a batch before its time


def test_cancel(tmp_path):
    with serving(step_seconds=0.02, **options(tmp_path)) as served:
        client = served.openai
        requests = [batch_request(f"{i}", prompt=[i + 1], max_tokens=3 if i < 4 else 100) for i in range(40)]
        batch = create(client, requests)
        wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 4)
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        done = wait(client, batch.id, *ENDS)
        assert done.status == "cancelled" and done.cancelling_at and done.cancelled_at
        good, bad = content(client, done.output_file_id), content(client, done.error_file_id)
        assert len(good) >= 4 and len(good) + len(bad) == 40
        assert good.keys() | bad.keys() == {f"{i}" for i in range(40)}
        assert {line["error"]["code"] for line in bad.values()} == {"batch_cancelled"}
        assert dict(done.request_counts) == {"total": 40, "completed": len(good), "failed": len(bad)}
        wait_for(lambda: served.engine.running == 0)
        assert client.batches.cancel(batch.id).status == "cancelled"  # again
        finished = wait(client, create(client, requests[:1]).id, *ENDS)
        with pytest.raises(openai.ConflictError, match="'completed'"):
            client.batches.cancel(finished.id)


def test_a_batch_expires(tmp_path):
    with serving(step_seconds=0.05, **options(tmp_path)) as served:
        client = served.openai
        long = [batch_request(f"{i}", prompt=[i + 1], max_tokens=120) for i in range(1000)]
        done = wait(client, create(client, long, window="3s").id, *ENDS)
        assert done.status == "expired" and done.expired_at >= done.expires_at
        if done.in_progress_at:  # the machine was not too busy
            bad = content(client, done.error_file_id)
            assert bad["999"]["error"]["code"] == "batch_expired"
            assert done.request_counts.total == 1000 == len(bad) + done.request_counts.completed


# ---- restarts


def check_complete(client: openai.OpenAI, batch_id: str, count: int, tokens: int, prefix: str = "") -> None:
    done = wait(client, batch_id, *ENDS)
    assert (done.status, done.request_counts.total, done.request_counts.failed) == ("completed", count, 0)
    answers = content(client, done.output_file_id)
    assert {name: said(line) for name, line in answers.items()} == {
        f"{prefix}{i}": counted(i + 1, tokens) for i in range(count)
    }


def test_a_restart_goes_on(tmp_path):
    many = [batch_request(f"{i}", prompt=[i + 1], max_tokens=10) for i in range(30)]
    with serving(step_seconds=0.01, **options(tmp_path)) as served:
        first, second = (create(served.openai, many) for _ in range(2))
        wait_for(lambda: served.openai.batches.retrieve(first.id).request_counts.completed >= 5)
    asked = len(served.engine.requests)
    assert 5 <= asked < 30 and served.engine.running == 0
    with serving(step_seconds=0.001, **options(tmp_path)) as served:
        for batch in (first, second):
            check_complete(served.openai, batch.id, 30, 10)
        assert len(served.engine.requests) <= 60 - asked + 2, "only what was in flight is asked again"
    assert not list((tmp_path / "contents").glob("batch_*"))


@pytest.mark.parametrize("status", ["finalizing", "cancelling", "validating", "in_progress"])
def test_a_restart_at_any_status(status, tmp_path):
    requests = [batch_request(f"{i}", prompt=[i + 1]) for i in range(3)]
    store = BatchStore(tmp_path)
    with serving(**options_of(store)) as served:
        done = wait(served.openai, create(served.openai, requests).id, *ENDS)
    store = BatchStore(tmp_path)
    changes = {f"{name}_at": None for name in ("finalizing", "completed")} | {"output_file_id": None, "status": status}
    if status == "cancelling":
        changes["cancelling_at"] = 5
    if status == "validating":
        changes["in_progress_at"] = None
    store.change(done.id, ENDS, changes)
    with serving(**options_of(store)) as served:
        again = wait(served.openai, done.id, *ENDS)
        if status in ("validating", "in_progress"):
            check_complete(served.openai, done.id, 3, 3)
        else:
            assert again.status == {"cancelling": "cancelled", "finalizing": "expired"}[status]
            assert len(content(served.openai, again.error_file_id)) == 3 and not served.engine.requests


def options_of(store: BatchStore) -> dict[str, Any]:
    worker = BatchWorker(store, 2)
    return {"extra": [BatchRoutes(worker)], "lifespan": worker.lifespan}


def test_a_drain_stops_batches_at_once(tmp_path):
    """Requests of clients end; those of batches are left for the next start."""
    apps, more = [], options(tmp_path)
    lifespan = more.pop("lifespan")
    with serving(step_seconds=0.5, lifespan=lambda app: apps.append(app) or lifespan(app), **more) as served:
        batch = create(served.openai, [batch_request(f"{i}", prompt=[5], max_tokens=110) for i in range(100)])
        wait_for(lambda: served.engine.running == 2)
        (app,) = apps
        app.state.drain.begin()
        wait_for(lambda: app.state.drain.in_flight == 0)
        wait_for(lambda: len(served.engine.aborted) == 2)  # else they end by themselves, after 55 s
    (left,) = stored(tmp_path, "batch")
    assert (left["id"], left["status"]) == (batch.id, "in_progress")


def test_a_fault_of_the_disk_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_worker, "PAUSE_SECONDS", 0.01)
    real, fails = BatchWorker._finish, [OSError(28, "No space left on device"), ValueError("torn")]

    def finish(self, tenant, batch):
        if fails:
            raise fails.pop()
        return real(self, tenant, batch)

    monkeypatch.setattr(BatchWorker, "_finish", finish)
    with serving(**options(tmp_path)) as served:
        batch = create(served.openai, [batch_request("0", prompt=[1])])
        check_complete(served.openai, batch.id, 1, 3)


def remade(folder: Path, requests: list, **changes) -> str:
    """A folder with a batch that has ended and is to be taken up again. Returns the batch's id."""
    store = BatchStore(folder)
    with serving(**options_of(store)) as served:
        done = wait(served.openai, create(served.openai, requests).id, *ENDS)
    store = BatchStore(folder)
    blank = {f"{name}_at": None for name in ("finalizing", "completed")} | {"output_file_id": None}
    store.change(done.id, ENDS, blank | changes)
    store.close()
    return done.id


LINE = {"id": "batch_req_0", "custom_id": "x", "response": {"status_code": 200}, "error": None}


@pytest.mark.parametrize("status", ["in_progress", "finalizing", "cancelling"])
@pytest.mark.parametrize(
    "held, why",
    [
        ('{"id":"batch_req_1"\n{}\n', "line 1"),
        (json.dumps(LINE) + "\n[1]\n", "line 2: no JSON object"),
        (json.dumps(LINE) + "\n" + json.dumps(LINE | {"response": {}}) + "\n", "line 2: it is no line"),
        (json.dumps(LINE) + "\n" + json.dumps(LINE | {"id": 5}) + "\n", "line 2: it is no line"),
        (json.dumps(LINE) + "\n", "answers to 4 requests, and the input file has 3"),
    ],
)
def test_a_broken_file_of_answers_fails_the_batch(status, held, why, tmp_path):
    batch_id = remade(tmp_path, [batch_request(f"{i}", prompt=[i + 1]) for i in range(3)], status=status)
    (tmp_path / "contents" / batch_id).write_text(held)
    with serving(**options(tmp_path)) as served:
        done = wait(served.openai, batch_id, *ENDS)
        (error,) = done.errors.data
        assert (done.status, error.code) == ("failed", "broken_file") and done.failed_at
        assert why in error.message and "/" not in error.message
        check_complete(served.openai, create(served.openai, [batch_request("0", prompt=[1])]).id, 1, 3)


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing"])
@pytest.mark.parametrize("content", [None, "{broken\n", "\n"])
def test_an_input_that_is_lost_fails_the_batch(status, content, tmp_path):
    begun = {} if status != "validating" else {"in_progress_at": None}
    batch_id = remade(tmp_path, [batch_request("0", prompt=[1])], status=status, **begun)
    (batch,) = stored(tmp_path, "batch")
    path = tmp_path / "contents" / batch["input_file_id"]
    path.unlink() if content is None else path.write_text(content)
    with serving(**options(tmp_path)) as served:
        done = wait(served.openai, batch_id, *ENDS)
        assert done.status == "failed" and len(done.errors.data) == 1


def test_little_of_a_batch_is_in_memory(tmp_path, monkeypatch):
    """A window of the requests, and none of the answers."""
    monkeypatch.setattr(batch_worker, "WINDOW_JOBS", 4)
    count, alive = 60, []

    def ours(value: dict) -> bool:  # what other tests have left in memory is not counted
        return str(value.get("custom_id")).startswith("memory-")

    with serving(step_seconds=0.01, **options(tmp_path)) as served:
        many = [batch_request(f"memory-{i}", prompt=[i + 1], max_tokens=2) for i in range(count)]
        created = create(served.openai, many)
        many.clear()
        while (batch := served.openai.batches.retrieve(created.id)).status not in ENDS:
            if batch.request_counts.completed > 20:
                found = gc.get_objects()
                jobs = sum(type(value) is Job for value in found)
                alive.append((jobs, sum(type(value) is dict and ours(value) for value in found)))
                del found  # it would keep alive until the next look what it lists
        check_complete(served.openai, created.id, count, 2, "memory-")
    if alive:  # the machine was not too busy
        # Two windows of 4 at most, the one before included, and what is in flight.
        assert max(jobs for jobs, _ in alive) < 20 and max(held for _, held in alive) < 20, alive


def test_answers_are_written_off_the_loop(served, monkeypatch):
    on_loop = watched(monkeypatch, ResultFile, "append", served)
    wait(served.openai, create(served.openai, [batch_request(f"{i}", prompt=[5]) for i in range(3)]).id, *ENDS)
    assert on_loop == [False] * 3


def test_the_disk_has_the_answers_before_the_batch_is_completed(tmp_path, monkeypatch):
    """Their content and their names: a power failure leaves no batch that has ended without them."""
    done: list[str] = []
    fsync, change = os.fsync, batch_table.change

    def noting_fsync(fd: int) -> None:
        fsync(fd)
        done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")

    def noting_change(db, batch_id, allowed, changes) -> dict:
        done.append(changes.get("status", ""))
        return change(db, batch_id, allowed, changes)

    with serving(**options(tmp_path)) as served:
        file = upload(served.openai, [batch_request("a", prompt=[5]), batch_request("b", prompt=[5], temperature=-1)])
        monkeypatch.setattr(os, "fsync", noting_fsync)
        monkeypatch.setattr(batch_table, "change", noting_change)
        ask = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"}
        wait(served.openai, served.openai.batches.create(**ask).id, *ENDS)
    assert done[done.index("finalizing") :] == ["finalizing", "file", "file", "folder", "completed"]


def test_what_cannot_be_finished_leaves_nothing(tmp_path):
    """Else every try fills the disk with another copy of the answers."""
    store = BatchStore(tmp_path)

    def full() -> Iterator[bytes]:
        yield b"{}\n"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.finish("batch_x", "", {"output_file_id": [b"{}\n"], "error_file_id": full()}, {})
    assert not list((tmp_path / "contents").iterdir())
    store.close()


def test_a_full_disk(tmp_path):
    """The database has no room for another row."""
    store = BatchStore(tmp_path)
    with serving(**options_of(store)) as served:
        form = {"files": {"file": ("a" * 250, b"{}\n")}, "data": {"purpose": "batch"}}
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        for _ in range(100):
            answer = served.http.post("/v1/files", **form)
            if answer.status_code != 200:
                break
        assert "full" in check_error(answer, 507, None, "disk_error")["message"]
        files = served.openai.files.list().data
        assert {path.name for path in (tmp_path / "contents").iterdir()} == {file.id for file in files} != set()
        body = {"endpoint": CHAT, "completion_window": "24h", "metadata": {str(i): "x" * 500 for i in range(16)}}
        check_error(
            served.http.post("/v1/batches", json=body | {"input_file_id": files[0].id}), 507, None, "disk_error"
        )


def test_a_folder_is_one_servers(tmp_path):
    store = BatchStore(tmp_path)
    with pytest.raises(ValueError, match="used by another server"):
        BatchStore(tmp_path)
    store.close()
    BatchStore(tmp_path).close()
    (tmp_path / "batches.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(ValueError, match=r"batches.sqlite: file is not a database"):
        BatchStore(tmp_path)


def test_leftovers_of_a_kill_are_swept(tmp_path):
    store = BatchStore(tmp_path)
    kept = store.add_file("", "a", "batch", io.BytesIO(b"x"))
    store.close()
    for name in (f"file-{'0' * 32}", f"file-{'1' * 32}.part", f"batch_{'2' * 32}", "mine.txt"):
        (tmp_path / "contents" / name).write_text("x")
    BatchStore(tmp_path).close()
    assert {path.name for path in (tmp_path / "contents").iterdir()} == {kept["id"], "mine.txt"}


# ---- kill -9


@contextlib.contextmanager
def process(folder: Path, step_seconds: float) -> Iterator[tuple[subprocess.Popen, openai.OpenAI]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    args = [sys.executable, "-m", "tests.evaluation.served_batches", str(port), str(folder), str(step_seconds)]
    running = subprocess.Popen(args, cwd=ROOT, stderr=subprocess.DEVNULL)

    def ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        return False

    try:
        wait_for(ready)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield running, client
    finally:
        running.kill()
        running.wait()


@pytest.mark.full
def test_killed_again_and_again_no_line_is_lost_or_doubled(tmp_path):
    count, tokens = 60, 10
    requests = [batch_request(f"{i}", prompt=[i + 1], max_tokens=tokens) for i in range(count)]
    batch_id, seen = "", 0
    for kill in range(3):
        with process(tmp_path, 0.01) as (running, client):
            batch_id = batch_id or create(client, requests).id
            wait_for(lambda: client.batches.retrieve(batch_id).request_counts.completed > seen + 8)  # noqa: B023
            running.send_signal(signal.SIGKILL)
            running.wait()
        left = (tmp_path / "contents" / batch_id).read_bytes()
        assert seen + 8 < left.count(b"\n") < count, kill
        seen = left.count(b"\n")
    with process(tmp_path, 0.001) as (running, client):
        check_complete(client, batch_id, count, tokens)
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) == 0


@pytest.mark.full
def test_sigterm_ends_the_process_while_a_batch_runs(tmp_path):
    with process(tmp_path, 1.0) as (running, client):
        create(client, [batch_request("0", prompt=[1], max_tokens=100)])
        wait_for(lambda: client.batches.list().data[0].status == "in_progress")
        threading.Event().wait(0.5)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0  # its request would run for 100 s, and the drain for 120


def test_an_upload_that_stops_leaves_its_room_to_others(tmp_path):
    limits = BatchLimits(file_bytes=3000, sent_bytes=6000)
    keys = Keys([f"ann:{ANN}"])
    with serving(keys=keys, body_timeout=1.0, **options(tmp_path, limits)) as served:
        ann = served.openai.with_options(api_key=ANN)
        host, port = served.url.removeprefix("http://").split(":")
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ANN}\r\nContent-Length: 2500\r\n"
        head += f"Content-Type: {CONTENT_TYPE}\r\n\r\n--x\r\n"
        with socket.create_connection((host, int(port))) as slow:  # it stays open
            slow.sendall(head.encode())
            wait_for(lambda: refused(ann))
            assert slow.recv(65536).startswith(b"HTTP/1.1 408 ")
            assert not refused(ann)
