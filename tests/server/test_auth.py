"""API keys: who gets in, who may administer, and that tenants do not touch each other's sessions."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from icarus_jax.errors import UsageError
from icarus_jax.server.auth import ADMIN_PATHS, Keys, check_host, host_names
from icarus_jax.server.exchange import Caller
from tests.server.served import GOOD, Served, check_error, serving

ANN, BOB, ADMIN = "sk-ann-secret", "sk-bob-secret", "sk-admin-secret"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    keys = Keys([f"ann:{ANN}", f"bob:{BOB}"], [f"root:{ADMIN}"], "ann=2")
    origins = ["https://good.example"]
    with serving(keys=keys, head_folders=[tmp_path_factory.mktemp("heads")], cors_origins=origins) as server:
        yield server


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        bearer("sk-ann-secreT"),
        bearer(f"{ANN}x"),
        bearer("é".encode()),
        {"Authorization": ANN},
        {"Authorization": f"Basic {ANN}"},
        {"X-Api-Key": ANN},
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/metrics", "/v1/load_head", "/nowhere", "/docs"])
def test_nobody_gets_in_without_a_key(served, path, headers):
    method = "GET" if path in ("/v1/models", "/metrics", "/nowhere", "/docs") else "POST"
    answer = served.http.request(method, path, headers=headers)
    error = check_error(answer, 401, None, "invalid_api_key")
    assert answer.headers["WWW-Authenticate"] == "Bearer" and ANN not in error["message"]


def test_health_and_version_are_open(served):
    assert served.http.get("/health").status_code == served.http.get("/version").status_code == 200
    assert served.http.get("/healthy").status_code == 401


def test_a_key_gets_in(served):
    for key in (ANN, BOB, ADMIN):
        assert served.http.post("/v1/completions", json=GOOD, headers=bearer(key)).status_code == 200
    assert served.http.get("/v1/models", headers={"Authorization": f"bearer  {ANN}"}).status_code == 200
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=ANN, max_retries=0)
    assert client.completions.create(**GOOD).choices
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").completions.create(**GOOD)


def test_the_key_is_the_tenant(served):
    for key, tenant, weight in ((ANN, "ann", 2.0), (BOB, "bob", 1.0), (ADMIN, "root", 1.0)):
        served.http.post("/v1/completions", json=GOOD, headers=bearer(key))
        assert (served.engine.requests[-1].tenant, served.engine.requests[-1].weight) == (tenant, weight)


@pytest.mark.parametrize("path", ADMIN_PATHS)
def test_only_an_admin_may_administer(served, path):
    method = "GET" if path in ("/metrics", "/page/stats") else "POST"
    check_error(served.http.request(method, path, headers=bearer(ANN)), 403, None, "admin_key_required")
    assert served.http.request(method, path, headers=bearer(ADMIN)).status_code in (200, 400)  # 400: no body
    if method == "GET":
        assert served.http.head(path, headers=bearer(ANN)).status_code == 403


def test_every_endpoint_that_loads_heads_is_for_admins():
    with serving() as served:
        paths = {path for path in served.http.get("/openapi.json").json()["paths"] if "load" in path}
    assert len(paths) == 4 and paths < set(ADMIN_PATHS)


def release(served: Served, who: str, **body: str):
    return served.http.post("/v1/release_session", json=body, headers=bearer(who))


def test_sessions_are_of_a_key(served):
    mine = GOOD | {"session": {"id": "s", "retain": 5}}
    assert served.http.post("/v1/completions", json=mine, headers=bearer(ANN)).status_code == 200
    assert served.engine.requests[-1].session.id == "ann:s"
    assert release(served, BOB, id="s").json() == {"id": "s", "object": "session", "released": False}
    assert release(served, BOB, id="ann:s").json()["released"] is False
    check_error(release(served, BOB, id="s", key="ann"), 403, None, "admin_key_required")
    assert release(served, ADMIN, id="s").json()["released"] is False
    assert release(served, ADMIN, id="s", key="ann").json()["released"] is True
    assert release(served, ANN, id="s", key="ann").json()["released"] is True
    assert served.engine.released == ["bob:s", "bob:ann:s", "root:s", "ann:s", "ann:s"]
    for who, body in ((ANN, {"id": "s"}), (BOB, {"id": "s"}), (ADMIN, {"id": "s", "key": "ann"})):
        assert served.http.post("/v1/park_session", json=body, headers=bearer(who)).status_code == 200
    assert served.engine.parking.parked == ["ann:s", "bob:s", "ann:s"]
    foreign = served.http.post("/v1/park_session", json={"id": "s", "key": "ann"}, headers=bearer(BOB))
    check_error(foreign, 403, None, "admin_key_required")


def test_cors(served):
    asking = {"Origin": "https://good.example", "Access-Control-Request-Method": "POST"}
    answer = served.http.options(
        "/v1/completions", headers=asking | {"Access-Control-Request-Headers": "authorization"}
    )
    assert answer.status_code == 200, "a preflight has no key"
    assert answer.headers["Access-Control-Allow-Origin"] == "https://good.example"
    assert "authorization" in answer.headers["Access-Control-Allow-Headers"].lower()
    refused = served.http.get("/v1/models", headers={"Origin": "https://good.example"})
    assert refused.status_code == 401 and refused.headers["Access-Control-Allow-Origin"] == "https://good.example"
    assert "X-Request-Id" in refused.headers["Access-Control-Expose-Headers"]
    bad = served.http.get("/health", headers={"Origin": "https://bad.example"})
    assert "Access-Control-Allow-Origin" not in bad.headers


def test_without_keys_everybody_may_do_everything():
    with serving() as served:
        assert served.http.get("/metrics").status_code == 200
        assert "Access-Control-Allow-Origin" not in served.http.get("/health", headers={"Origin": "https://a"}).headers
        served.complete(prompt=[5], session={"id": "s"})
        assert (served.engine.requests[-1].session.id, served.engine.requests[-1].tenant) == ("s", "")


def test_keys_come_from_files_and_the_environment(tmp_path):
    users, admins = tmp_path / "users", tmp_path / "admins"
    users.write_text(f"# ours\n\n  ann:{ANN}  \nann:second\nplain-key\n")
    admins.write_text(f"root:{ADMIN}\n")
    environ = {"ICARUS_API_KEYS": f"bob:{BOB}, other ,", "ICARUS_ADMIN_KEYS": "boss:b"}
    keys = Keys.read(str(users), str(admins), "bob=0.5,ann=3", environ)
    assert keys.find(ANN) == keys.find("second") == Caller("ann", False, 3.0)
    assert keys.find(BOB) == Caller("bob", False, 0.5)
    assert keys.find(ADMIN) == Caller("root", True) and keys.find("b") == Caller("boss", True)
    plain, other = keys.find("plain-key"), keys.find("other")
    assert plain and other and plain.name != other.name and plain.name.startswith("key-") and not plain.admin
    assert [keys.find(wrong) for wrong in ("", "ann", "ann:" + ANN, "# ours", "ANN")] == [None] * 5
    assert not Keys.read("", "", "", {"ICARUS_API_KEYS": ""})


def test_keys_are_kept_hashed():
    keys = Keys([f"ann:{ANN}"], [ADMIN])
    assert ANN not in repr(vars(keys)) and ADMIN not in repr(vars(keys))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Keys(["a b:key"]), "name before ':'"),
        (lambda: Keys([":key"]), "name before ':'"),
        (lambda: Keys(["a:"]), "visible ASCII"),
        (lambda: Keys(["a:two words"]), "visible ASCII"),
        (lambda: Keys(["schlüssel"]), "visible ASCII"),
        (lambda: Keys(["a:key"], ["b:key"]), "admin key number 1: the same key"),
        (lambda: Keys(["a:key"], weights="b=2"), "'b'"),
        (lambda: Keys(["a:key"], weights="a"), "key_weights"),
        (lambda: Keys(["a:key"], weights="a=0"), "above 0"),
        (lambda: Keys(["a:key"], weights="a=inf"), "above 0"),
        (lambda: Keys(["a:key"], weights="a=nan"), "above 0"),
        (lambda: Keys.read("no/such/file", "", "", {}), "api_keys_file"),
        (lambda: Keys.read("", "no/such/file", "", {}), "admin_keys_file"),
    ],
)
def test_keys_that_make_no_sense(make, said):
    with pytest.raises(UsageError) as error:
        make()
    assert said in str(error.value) and "\n" not in str(error.value) and "two words" not in str(error.value)


def test_a_file_without_keys_does_not_open_the_server(tmp_path):
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n")
    with pytest.raises(UsageError, match="has no keys"):
        Keys.read(str(empty), "", "", {})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]"])
def test_without_keys_this_machine_may_be_served(host):
    check_host(host, Keys(), allow_remote_without_keys=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "example.com", "localhost.example.com"])
def test_without_keys_no_other_machine_is_served(host):
    with pytest.raises(UsageError, match=r"api_keys_file=FILE.*allow_remote_without_keys=True"):
        check_host(host, Keys(), allow_remote_without_keys=False)
    check_host(host, Keys(), allow_remote_without_keys=True)
    check_host(host, Keys(["key"]), allow_remote_without_keys=False)


@pytest.mark.parametrize(
    "origin, status",
    [
        (None, 200),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:8000", 200),
        ("http://[::1]:8000", 200),
        ("https://evil.example", 403),
        ("http://127.0.0.1.evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_pages_of_strangers_cannot_use_a_server_without_keys(origin, status):
    """A browser sends a simple POST to another origin without asking first."""
    with serving() as served:
        headers = {"Content-Type": "text/plain"} | ({"Origin": origin} if origin else {})
        answer = served.http.post("/v1/completions", content=json.dumps(GOOD), headers=headers)
        assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("Our.Name:80", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:8000", 403),
        ("192.168.1.5:8000", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_a_page_whose_name_means_this_machine_reads_nothing(host, status):
    """DNS rebinding: for the browser such a page and the server are the same, and it sends no Origin with a GET."""
    with serving(hosts=host_names("our.name", Keys(), False)) as served:
        for path in ("/v1/models", "/metrics", "/health"):
            answer = served.http.get(path, headers={"Host": host})
            assert answer.status_code == status, (path, answer.text)
        if status == 403:
            error = check_error(served.http.get("/v1/models", headers={"Host": host}), 403, None, "host_not_allowed")
            assert "server.allowed_hosts" in error["message"]


def test_which_names_are_checked():
    keys = Keys(["key"])
    assert host_names("", Keys(), False) == []
    assert host_names("", keys, False) is host_names("", Keys(), True) is host_names("a,*", Keys(), False) is None
    assert host_names("A, b,", keys, False) == host_names("a,b", Keys(), True) == ["a", "b"]
