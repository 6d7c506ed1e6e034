"""Scores worked out by hand, and the sandbox against programs that do not stop, hoard, phone home or write."""

import socket
import sqlite3
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from icarus_jax import tasks
from icarus_jax.evaluation import sandbox, scoring

# ---- intent, slots


@pytest.mark.parametrize(
    "text, right",
    [("card_lost", True), (" card_lost\n", True), ("Card_lost", False), ("card_lost.", False), ("", False)],
)
def test_intent(text, right):
    assert scoring.score_intent(text, {"category": "card_lost"}) == {"accuracy": right}


SONG = {
    "intent": "PlayMusic",
    "data": [
        {"text": "play "},
        {"text": "blue ", "entity": "track"},
        {"text": " and "},
        {"text": "red", "entity": "track"},
        {"text": " by "},
        {"text": "ann", "entity": "artist"},
    ],
}


@pytest.mark.parametrize(
    "text, exact, intent, valid, counts",
    [
        ('{"intent":"PlayMusic","slots":{"track":["blue","red"],"artist":"ann"}}', True, True, True, [3, 3, 3]),
        ('{"slots": {"artist": "ann ", "track": ["red", "blue"]}, "intent": "PlayMusic"}', True, True, True, [3, 3, 3]),
        (
            '```json\n{"intent":"PlayMusic","slots":{"track":["blue","red"],"artist":"ann"}}\n```',
            True,
            True,
            True,
            [3, 3, 3],
        ),
        ('{"intent":"PlayMusic","slots":{"track":"blue","artist":"ann"}}', False, True, True, [2, 2, 3]),
        ('{"intent":"PlayMusic","slots":{"track":["blue","blue"],"artist":"ann"}}', False, True, True, [2, 3, 3]),
        ('{"intent":"PlayMusic","slots":{"artist":["blue","red"],"track":"ann"}}', False, True, True, [0, 3, 3]),
        ('{"intent":"AddMusic","slots":{"track":["blue","red"],"artist":"ann"}}', False, False, True, [3, 3, 3]),
        ('{"intent":"PlayMusic","slots":{}}', False, True, True, [0, 0, 3]),
        ('{"intent":"PlayMusic","slots":{"track":["blue","red"],"artist":"ann"}', False, False, False, [0, 0, 3]),
        ('{"intent":"PlayMusic","slots":{"track":1}}', False, False, False, [0, 0, 3]),
        ('{"intent":"PlayMusic"}', False, False, False, [0, 0, 3]),
        ('{"slots":{}}', False, False, False, [0, 0, 3]),
        ('["PlayMusic"]', False, False, False, [0, 0, 3]),
        ("[" * 100_000, False, False, False, [0, 0, 3]),
        ("", False, False, False, [0, 0, 3]),
    ],
)
def test_slots(text, exact, intent, valid, counts):
    score = scoring.score_slots(text, SONG)
    assert score.pop("error", None) is None or not valid
    assert score == {"exact_match": exact, "intent_accuracy": intent, "valid_json": valid, "slots": counts}


def test_the_tasks_own_answers_are_right():
    """What training teaches is what scoring asks for."""
    assert scoring.score_slots(tasks.TASKS["slots"].completion(SONG), SONG)["exact_match"]
    row = {"question": "?", "answer": "3 apples at $400 are <<3*400=1200>>1,200\n#### 1,200"}
    assert scoring.score_math(tasks.TASKS["math"].completion(row), row)["accuracy"]
    assert scoring.score_intent(tasks.TASKS["intent"].completion({"category": "a_b"}), {"category": "a_b"})


def test_figures_of_many_samples():
    assert scoring.summarise([{"accuracy": True}, {"accuracy": False}, {"accuracy": True}]) == {"accuracy": 0.6667}
    scores = [{"exact_match": True, "slots": [2, 2, 2]}, {"exact_match": False, "slots": [1, 4, 2], "error": "x"}]
    # micro: precision 3/6, recall 3/4; the mean of the two samples' F1 would be 0.6667
    assert scoring.summarise(scores) == {"exact_match": 0.5, "slot_f1": 0.6}
    assert scoring.summarise([{"exact_match": True, "slots": [0, 0, 0]}])["slot_f1"] == 1.0


# ---- sql


@pytest.fixture
def database(tmp_path) -> Path:
    path = tmp_path / "a b#?.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE city (name TEXT, state TEXT, size INT)")
        rows = [("ada", "ohio", 3), ("bex", "ohio", 5), ("cor", "utah", 5)]
        connection.executemany("INSERT INTO city VALUES (?, ?, ?)", rows)
    connection.close()
    return path


@pytest.mark.parametrize(
    "query, right",
    [
        ("SELECT name FROM city WHERE state = 'ohio'", True),
        ('SELECT C.name FROM city AS C WHERE C.state = "ohio" ORDER BY C.size DESC ;', True),
        ("```sql\nSELECT name FROM city WHERE size < 5 OR name = 'bex'\n```", True),
        ("WITH o AS (SELECT * FROM city WHERE state = 'ohio') SELECT name FROM o", True),
        ("SELECT name, state FROM city WHERE state = 'ohio'", False),
        ("SELECT name FROM city", False),
        ("SELECT name FROM city WHERE state = 'ohio' UNION ALL SELECT 'ada'", False),  # a multiset, not a set
        ("SELECT name FROM city WHERE state = 'iowa'", False),
    ],
)
def test_sql_compares_results(database, query, right):
    row = {"sql": 'SELECT name FROM city WHERE state = "ohio"'}
    assert scoring.score_sql(query, row, database) == {"execution_accuracy": right, "executable": True}


@pytest.mark.parametrize(
    "query, said",
    [
        ("SELEC name FROM city", "syntax error"),
        ("SELECT nme FROM city", "no such column"),
        ("", "no SELECT"),
        ("SELECT 1; SELECT 2", "one statement"),
        ("DELETE FROM city", "not authorized"),
        ("DROP TABLE city", "not authorized"),
        ("CREATE TABLE x (y)", "not authorized"),
        ("PRAGMA query_only = OFF", "not authorized"),
        ("ATTACH 'elsewhere.sqlite' AS other", "not authorized"),
        ("SELECT load_extension('x')", "not authorized"),
        ("SELECT hex(zeroblob(1000000000))", "too big"),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n", "limit of 1 s"),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n", "rows"),
    ],
)
def test_sql_that_is_none_or_harms(database, query, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = database.read_bytes()
    monkeypatch.setattr(scoring, "MAX_RESULT_ROWS", 1000)
    seconds = 1.0 if "limit" in said else 60.0
    score = scoring.score_sql(query, {"sql": "SELECT name FROM city"}, database, seconds)
    assert said in score.pop("error")
    assert score == {"execution_accuracy": False, "executable": False}
    assert database.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [database.name]


def test_a_gold_query_that_fails_makes_nobody_right(database):
    score = scoring.score_sql("SELECT nothing FROM city", {"sql": "SELECT nothing FROM city"}, database)
    assert not score["execution_accuracy"] and "gold" in score["error"]


# ---- math


@pytest.mark.parametrize(
    "text, number",
    [
        ("so\n#### 1200", "1200"),
        ("#### 1,200", "1200"),
        ("#### $1,200.00", "1200"),
        ("####1200.", "1200"),
        ("#### 1200 dollars", "1200"),
        ("#### -12", "-12"),
        ("#### -$12", "-12"),
        ("#### $-12", "-12"),
        ("#### 0.5", "0.5"),
        ("#### .5", "0.5"),
        ("#### 5\n#### 6", "5"),
        ("#### 5%", "5"),
        ("the answer is 1200", None),
        ("####\n1200", "1200"),
        ("#### none", None),
        ("#### x\n7", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert scoring.final_number(text) == (None if number is None else Decimal(number))


def test_math():
    row = {"answer": "2*600\n#### 1,200"}
    assert scoring.score_math("#### 1200.", row) == {"accuracy": True, "last_number": True}
    assert scoring.score_math("It is 600 twice: $1200.", row) == {"accuracy": False, "last_number": True}
    assert scoring.score_math("#### 1201", row) == {"accuracy": False, "last_number": False}
    assert scoring.score_math("", row) == {"accuracy": False, "last_number": False}


# ---- humaneval and the sandbox

DOUBLE = {
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "test": "def check(f):\n    assert f(2) == 4\n    assert f(0) == 0\n",
    "entry_point": "double",
}


@pytest.mark.parametrize(
    "text, error",
    [
        ("\n    return 2 * x\n", None),
        ("\n    return x + 2\n", "AssertionError"),
        ("\n    return y\n", "NameError"),
        ("\n    return (\n", "SyntaxError"),
        ("", "AssertionError"),
        ("\n    return 2 * x\n\nimport sys; sys.exit(0)", "SystemExit"),  # before the tests
        ("\n    import os; os._exit(0)", "without a word"),
        ("\n    import os; os.write(3, b'x'); os._exit(0)", "wrote into the interpreter's answer"),
    ],
)
def test_humaneval(text, error):
    score = scoring.score_humaneval(text, DOUBLE, sandbox.run_program)
    assert score["pass@1"] == (error is None)
    assert ("error" not in score) if error is None else (error in score["error"])


@pytest.fixture(params=["namespaces", "hook alone"])
def kernel(request, monkeypatch):
    """Both ways that the sandbox can run in."""
    if request.param == "hook alone":
        monkeypatch.setattr(sandbox, "is_isolated", lambda: False)
    elif not sandbox.is_isolated():
        pytest.skip("this system grants no namespaces")
    return request.param


@pytest.mark.parametrize(
    "program, said",
    [
        ("while True: pass", "1 s of processor time"),
        ("while True:\n  try:\n    while True: pass\n  except BaseException: pass", "1 s of processor time"),
        ("import time\ntime.sleep(60)", "limit of 2 s"),
        ("import time, signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(60)", "limit of 2 s"),
        ("x = []\nwhile True: x.append(bytes(1 << 20))", "MemoryError"),
        ("x = bytes(1 << 40)", "MemoryError"),
        ("print('x' * 100_000_000)", ""),
        ("import os\nos.fork()", "os.fork"),
        ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen"),
        ("import os\nos.system('true')", "os.system"),
        ("import os\nos.kill(os.getppid(), 9)", "os.kill"),
        ("import ctypes", "ctypes"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "resource.setrlimit"),
        ("import numpy", "ModuleNotFoundError"),  # the standard library only
    ],
)
def test_a_program_ends_at_its_limits(program, said, kernel):
    """A busy program gets the processor late where others are busy too: only one that sleeps ends by the clock."""
    wall = 2 if "sleep" in program else 60
    outcome = sandbox.run_program(program, cpu_seconds=1, wall_seconds=wall, memory_bytes=256 << 20)
    assert outcome.passed == (said == "")
    assert said in outcome.error and "\n" not in outcome.error


UNGUARDED = """
import json, sys
try:
    exec(json.load(sys.stdin)["program"])
    print(json.dumps({"passed": True}))
except OSError as error:
    print(json.dumps({"passed": False, "error": str(error)}))
"""
CONNECT = "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).sendall(b'hello')"


def test_no_program_reaches_the_network(kernel):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = CONNECT.format(port=server.getsockname()[1])
        assert "socket" in sandbox.run_program(program).error
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.skipif(not sandbox.is_isolated(), reason="this system grants no namespaces")
def test_the_kernel_keeps_it_off_the_network_without_the_hook(monkeypatch, tmp_path):
    unguarded = tmp_path / "unguarded.py"
    unguarded.write_text(UNGUARDED)
    monkeypatch.setattr(sandbox, "__file__", str(unguarded))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        outcome = sandbox.run_program(CONNECT.format(port=server.getsockname()[1]))
        assert "unreachable" in outcome.error
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "open({path!r}, 'r+b')",
        "import os; os.open({path!r}, os.O_WRONLY | os.O_CREAT)",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, 'x')",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.chmod({path!r}, 0)",
        "import shutil; shutil.rmtree({folder!r})",
        "import pathlib; pathlib.Path({folder!r}, 'new').mkdir()",
        "import os; os.symlink({folder!r}, 'link'); open('link/kept', 'w')",
        "open('../' * 20 + {path!r}, 'w')",
    ],
)
def test_no_write_outside_its_folder(attempt, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    outcome = sandbox.run_program(attempt.format(path=str(kept), folder=str(tmp_path)))
    assert "PermissionError" in outcome.error, outcome
    assert kept.read_text() == "as it was" and [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_its_own_folder_is_small_and_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(sandbox.tempfile, "tempdir", None)
    assert sandbox.run_program("open('a', 'w').write('x')\nassert open('a').read() == 'x'").passed
    assert "File too large" in sandbox.run_program("open('a', 'wb').write(bytes(5 << 20))").error
    assert list(tmp_path.iterdir()) == []


def test_the_counts_are_of_pairs():
    assert scoring.parse_slots('{"intent":"a","slots":{"x":["1","1"]}}') == ("a", Counter({("x", "1"): 2}))
