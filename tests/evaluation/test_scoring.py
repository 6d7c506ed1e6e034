"""Scores worked out by hand."""

import json
import sqlite3
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from icarus_jax import tasks
from icarus_jax.evaluation import scoring
from icarus_jax.evaluation.tool_scores import score_tools

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
    assert scoring.score_slots(tasks.TASKS["slots"].answer(SONG)["content"], SONG)["exact_match"]
    row = {"question": "?", "answer": "3 apples at $400 are <<3*400=1200>>1,200\n#### 1,200"}
    assert scoring.score_math(tasks.TASKS["math"].answer(row)["content"], row)["accuracy"]
    assert scoring.score_intent(tasks.TASKS["intent"].answer({"category": "a_b"})["content"], {"category": "a_b"})


def test_figures_of_many_samples():
    assert scoring.summarise([{"accuracy": True}, {"accuracy": False}, {"accuracy": True}]) == {"accuracy": 0.6667}
    scores = [{"exact_match": True, "slots": [2, 2, 2]}, {"exact_match": False, "slots": [1, 4, 2], "error": "x"}]
    # micro: precision 3/6, recall 3/4; the mean of the two samples' F1 would be 0.6667
    assert scoring.summarise(scores) == {"exact_match": 0.5, "slot_f1": 0.6}
    assert scoring.summarise([{"exact_match": True, "slots": [0, 0, 0]}])["slot_f1"] == 1.0


# ---- tools

WANTED = [{"name": "f", "arguments": {"n": 5, "to": ["a", "b"]}}, {"name": "g", "arguments": {}}]


def called(*calls):
    return json.dumps([{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls])


@pytest.mark.parametrize(
    "text, functions, exact, counts",
    [
        (called(("g", {}), ("f", {"to": ["a", "b"], "n": "5"})), True, True, [2, 2, 2]),  # in any order, as texts
        (called(("f", {"n": 5, "to": ["b", "a"]}), ("g", {})), True, False, [1, 2, 2]),
        (called(("f", {"n": 5, "to": ["a", "b"]})), False, False, [1, 1, 2]),
        (called(("g", {}), ("g", {}), ("f", {"n": 5, "to": ["a", "b"]})), False, False, [2, 3, 2]),
        ("I do not know.", False, False, [0, 0, 2]),
        ('[{"name": "f", "arguments": "{"}]', False, False, [0, 0, 2]),  # cut off
        ("5", False, False, [0, 0, 2]),
        ('[{"name": 1, "arguments": "{}"}, {"name": "a", "arguments": "{}"}]', False, False, [0, 2, 2]),  # of any type
    ],
)
def test_tools(text, functions, exact, counts):
    want = {"functions": functions, "exact_match": exact, "called": counts[1] > 0, "calls": counts}
    assert score_tools(text, {"calls": WANTED}) == want


def test_single_calls_have_a_figure_of_their_own():
    right, wrong = {"calls": WANTED[1:]}, {"calls": WANTED[:1]}
    scores = [score_tools(called(("g", {})), row) for row in ({"calls": WANTED}, right, wrong)]
    assert [score.get("single_call") for score in scores] == [None, True, False]
    assert scoring.summarise(scores) == {
        "functions": 0.3333,
        "exact_match": 0.3333,
        "called": 1.0,
        "call_f1": 0.5714,  # 2 right, 3 made, 4 wanted
        "single_call": 0.5,
    }


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


def test_the_counts_are_of_pairs():
    assert scoring.parse_slots('{"intent":"a","slots":{"x":["1","1"]}}') == ("a", Counter({("x", "1"): 2}))
