"""What a grammar accepts, what is refused, and that what is made to explode ends."""

from __future__ import annotations

import gc
import os
import random
import threading
import time

import numpy as np
import pytest

from icarus_jax.errors import RequestError
from icarus_jax.grammar.compiler import LIMITS, GrammarError, fill_masks
from icarus_jax.grammar.spec import GrammarSpec, StructuredOutputsParams
from icarus_jax.grammar.trial import Trial
from tests.grammar.following import EOS, TOKENIZER, accepts, make_compiler


@pytest.fixture(scope="module")
def compiler():
    made = make_compiler()
    made.compile(GrammarSpec.json_object("warm"))
    return made


CHOICES = ["a b", "new\nline", "<tag>", "é#&~-", "a|b", "x*", "a/b\\d", "tab\t", "日本", '"q"', "[a]", "^a$", ""]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_is_taken_literally(compiler, choice):
    grammar = compiler.compile(GrammarSpec.choice(CHOICES, "guided_choice"))
    assert accepts(grammar, choice) and not accepts(grammar, choice + "?") and not accepts(grammar, "xx")


@pytest.mark.parametrize(
    "asked, right, wrong",
    [
        ({"json": {"type": "integer", "maximum": 12}}, "12", "13"),
        ({"json": '{"enum": ["é"]}'}, '"é"', '"e"'),
        ({"json": {}}, '[1, {"a": null}]', "[1,"),
        ({"json_object": True}, '{"a": [1]}', "[1]"),
        ({"regex": r"^\d{2}-[ab]+$"}, "12-abba", "12-"),
        ({"choice": ["yes", "no"]}, "no", "noo"),
        ({"grammar": 'start: "a" start | "b"'}, "aab", "aa"),
        ({"grammar": '# GBNF\nroot ::= "a" root | b\nb ::= [bc]'}, "aac", "aa"),
        ({"grammar": 'start: "x ::= y"'}, "x ::= y", "x"),
    ],
)
def test_each_kind(compiler, asked, right, wrong):
    grammar = compiler.compile(StructuredOutputsParams(**asked).spec())
    assert accepts(grammar, right) and not accepts(grammar, wrong)


@pytest.mark.parametrize("asked", [{}, {"json_object": False}, {"regex": "a", "choice": ["a"]}])
def test_exactly_one_kind(asked):
    with pytest.raises(RequestError, match="must have one of json, regex, choice"):
        StructuredOutputsParams(**asked)


WRONG = {
    "no JSON": (GrammarSpec("json_schema", "{", "f"), "EOF"),
    "no schema": (GrammarSpec.json_schema({"type": "foo"}, "f"), "foo"),
    "not supported": (GrammarSpec.json_schema({"type": "array", "uniqueItems": True}, "f"), "uniqueItems"),
    "elsewhere": (GrammarSpec.json_schema({"$ref": "http://localhost/x"}, "f"), "http://localhost/x"),
    "nothing fits": (GrammarSpec.json_schema({"type": "integer", "minimum": 2, "maximum": 1}, "f"), "Unsatisfiable"),
    "regex": (GrammarSpec("regex", "(", "f"), "unclosed"),
    "look-around": (GrammarSpec("regex", "(?=a)b", "f"), "look-around"),
    "half a character": (GrammarSpec("regex", "\ud800", "f"), "surrogates"),
    "lark": (GrammarSpec("lark", "start: foo", "f"), "foo"),
    "gbnf": (GrammarSpec("lark", 'root ::= ("a', "f"), "Unexpected end"),
    "deep gbnf": (GrammarSpec("lark", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "f"), "recursion"),
    "gbnf without a rule": (GrammarSpec("lark", "root ::= foo", "f"), "foo"),
    "gbnf without an end": (GrammarSpec("lark", 'root ::= "\\', "f"), "f cannot be followed: "),
    "long": (GrammarSpec("regex", "a" * 200_001, "f"), "200001 characters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(compiler, name):
    spec, reason = WRONG[name]
    for _ in range(2):  # the second time from the cache
        with pytest.raises(RequestError, match=reason) as error:
            compiler.compile(spec)
        assert error.value.field == "f" and "\n" not in str(error.value)


def _nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        named = [{"anyOf": [schema, {"type": "object", "properties": {name: schema}}]} for name in "ab"]
        schema = {"allOf": named}
    return schema


EXPLOSIVE = {
    "intersected patterns": {
        "allOf": [{"type": "string", "pattern": f"(a|b){{{i},}}c.*d"} for i in range(1, 40)],
    },
    "multiples": {"allOf": [{"type": "integer", "multipleOf": p} for p in (97, 89, 83, 79)]},
    "many properties": {"type": "object", "properties": {f"property{i}": {"type": "string"} for i in range(5000)}},
    "more items than a row may have": {
        "type": "object",
        "properties": {f"property{i}": {"type": "string"} for i in range(1500)},
    },
    "products": {"allOf": [{"anyOf": [{"required": [f"{c}{i}"]} for c in "ab"]} for i in range(20)]},
    "nested products": _nested(5),
    "repeats": r"((x{1000}){1000}){10}",
}


@pytest.mark.parametrize("name", EXPLOSIVE)
def test_what_explodes_ends(compiler, name):
    """In about a second of processor time; the wall's limit is for busy machines. Other threads go on meanwhile."""
    asked = EXPLOSIVE[name]
    spec = GrammarSpec("regex", asked, "f") if isinstance(asked, str) else GrammarSpec.json_schema(asked, "f")
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.wait(0.01):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.monotonic()
    with pytest.raises(RequestError) as error:
        compiler.compile(spec)
    seconds = time.monotonic() - start
    done.set()
    thread.join()
    print(f"{name}: {seconds:.2f} s, {error.value}")
    assert seconds < 30
    assert len(ticks) >= (seconds - 0.5) * 10  # a thread that could not run would have none
    assert accepts(compiler.compile(GrammarSpec.choice(["on it goes"], "f")), "on it goes")


def test_the_ends_of_its_process_leave_no_files_open():
    made = make_compiler()
    made.compile(GrammarSpec.json_object("f"))
    before = len(os.listdir("/proc/self/fd"))
    for prime in (97, 101):
        factors = [{"type": "integer", "multipleOf": p} for p in (prime, 89, 83, 79)]
        with pytest.raises(RequestError, match="more than 1 s"):
            made.compile(GrammarSpec.json_schema({"allOf": factors}, "f"))
    made.compile(GrammarSpec.json_schema({"type": "integer"}, "f"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_equal_grammars_are_compiled_once(compiler):
    first, second = (GrammarSpec.json_schema({"type": "integer"}, field) for field in ("a", "b"))
    assert compiler.compile(first) is compiler.compile(second)


COMPLEX = "[ab]*a[ab]{14}c"  # the more of it is written, the more states it has
LETTERS = TOKENIZER.convert_tokens_to_ids(["a", "b"])


def written(matcher, most: int, seed: int = 0) -> int:
    """Writes a and b at random under the masks, and the end where neither is allowed; returns how many of them."""
    pick, mask = random.Random(seed), np.zeros((1, -(-len(TOKENIZER) // 32)), np.int32)
    for count in range(most):
        fill_masks([(0, matcher)], mask)
        allowed = [token for token in LETTERS if mask[0, token // 32] >> token % 32 & 1]
        try:
            matcher.accept(pick.choice(allowed) if allowed else EOS)
        except GrammarError as error:
            assert "too many states" in str(error) and not matcher.ended
            return count
    return most


def test_a_mask_that_cannot_be_made_is_no_end(compiler, monkeypatch):
    """Its only token is the end, which must not pass for the end of a whole answer."""
    monkeypatch.setitem(LIMITS, "max_lexer_states", 300)
    assert 50 < written(compiler.compile(GrammarSpec("regex", COMPLEX, "f")).start(), 1000) < 1000


def test_an_answer_that_is_too_complex_costs_no_other_one(monkeypatch):
    """Answers share states: those that run, and those that come later, must not pay for one that makes too many."""
    monkeypatch.setitem(LIMITS, "max_lexer_states", 300)
    grammar = make_compiler().compile(GrammarSpec("regex", COMPLEX, "f"))
    beside = grammar.start()
    assert written(beside, 20, seed=1) == 20
    assert written(grammar.start(), 1000) < 1000
    later = grammar.start()
    for matcher in (beside, later):
        assert written(matcher, 20, seed=2) == 20
        for token in TOKENIZER.encode("aaaaaaaaaaaaaaac"):
            matcher.accept(token)
        assert matcher.ended


def test_one_answer_at_the_limit_is_compiled_anew_in_a_step(monkeypatch):
    """All rows of a step wait for it. Another answer that reaches the limit in the same step ends."""
    monkeypatch.setitem(LIMITS, "max_lexer_states", 300)
    grammar = make_compiler().compile(GrammarSpec("regex", COMPLEX, "f"))
    made, make = [], grammar.make
    grammar.make = lambda: made.append(1) or make()
    answers, pick = [grammar.start() for _ in range(3)], random.Random(0)
    masks = np.zeros((3, -(-len(TOKENIZER) // 32)), np.int32)
    with pytest.raises(GrammarError, match="too many states"):
        for _ in range(1000):
            before = len(made)
            fill_masks(list(enumerate(answers)), masks)
            assert len(made) - before <= 1
            allowed = [token for token in LETTERS if masks[0, token // 32] >> token % 32 & 1]
            token = pick.choice(allowed)
            for matcher in answers:  # the same text, so that all reach the limit in one step
                matcher.accept(token)
    assert made


def test_what_failed_is_not_tried_again(compiler, monkeypatch):
    tried = []
    monkeypatch.setattr(Trial, "error", lambda trial, grammar: tried.append(grammar) or "it is bad")
    spec = GrammarSpec("regex", "never seen", "f")
    for find in (compiler.compile, compiler.find, compiler.compile):
        with pytest.raises(RequestError, match="it is bad"):
            find(spec)
    assert len(tried) == 1 and compiler.find(GrammarSpec("regex", "nor this", "f")) is None


def test_a_compiler_that_died_may_have_died_of_something_else(compiler, monkeypatch):
    spec = GrammarSpec.choice(["dies"], "f")
    monkeypatch.setattr(Trial, "_try", lambda trial, grammar: None)
    with pytest.raises(RequestError, match="failed on it twice"):
        compiler.compile(spec)
    monkeypatch.undo()
    assert accepts(compiler.compile(spec), "dies")


def test_the_cache_is_bounded(compiler, monkeypatch):
    monkeypatch.setattr("icarus_jax.grammar.compiler.CACHED", 2)
    specs = [GrammarSpec.choice([name], "f") for name in ("one", "two", "three")]
    for spec in (specs[0], specs[1], specs[0], specs[2]):
        compiler.compile(spec)
    assert [compiler.find(spec) is not None for spec in specs] == [True, False, True]  # the one used last is kept


def test_it_goes_on_after_its_process_was_killed(compiler):
    for trial in compiler._trials.queue:
        if trial._process is not None:
            trial._process.kill()
            trial._process.wait()
    assert accepts(compiler.compile(GrammarSpec.choice(["after"], "f")), "after")


def test_its_process_ends_with_it():
    made = make_compiler()
    made.compile(GrammarSpec.json_object("f"))
    (process,) = [trial._process for trial in made._trials.queue if trial._process]
    assert process.poll() is None
    del made
    gc.collect()
    assert process.wait(60) is not None


def test_a_tokenizer_that_cannot_be_read_is_said():
    made = make_compiler()
    made._json = "{}"
    with pytest.raises(RequestError, match="f cannot be followed"):
        made.compile(GrammarSpec.json_object("f"))
