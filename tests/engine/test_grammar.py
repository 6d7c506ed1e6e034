"""Answers that follow a grammar: with heads, seeds, log-probabilities, handoff, overlap, preemption."""

from __future__ import annotations

import json

import numpy as np
import pytest

from icarus_jax.grammar.compiler import Compiler, GrammarError
from icarus_jax.grammar.spec import GrammarSpec
from tests.doubles import byte_level_tokenizer
from tests.engine.harness import drain, submit
from tests.engine.test_agents import PROMPT, after, make, world  # noqa: F401 (a fixture)

VOCAB, END = 320, 258  # of the tiny model
TOKENIZER = byte_level_tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["city", "river"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 1},
    },
    "required": ["kind", "count", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammar():
    compiler = Compiler(TOKENIZER.backend_tokenizer.to_str(), VOCAB, [END])
    return compiler.compile(GrammarSpec.json_schema(SCHEMA, "response_format"))


def check(result) -> None:
    assert result.finish_reason == "stop"
    value = json.loads(TOKENIZER.decode([t for t in result.token_ids if t != END]))
    assert value["kind"] in ("city", "river") and 0 <= value["count"] <= 99
    assert len(value["tags"]) <= 1 and all(isinstance(tag, bool) for tag in value["tags"])
    assert list(value) == ["kind", "count", "tags"]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "changes", [{"num_pages": 600}, {"num_pages": 70, "max_num_seqs": 3, "max_num_batched_tokens": 8}]
)
def test_every_answer_parses(world, grammar, overlap, changes):  # noqa: F811
    engine = make(world, "abx", async_scheduling=overlap, max_model_len=260, **changes)
    free = submit(engine, "a", PROMPT, max_tokens=30)
    bound = [
        *submit(engine, ("trunk", "a", "x"), PROMPT, max_tokens=220, grammar=grammar),
        *submit(engine, "b", PROMPT, n=2, max_tokens=220, grammar=grammar, temperature=1.5, seed=3, top_p=0.9),
        *submit(engine, "a", PROMPT[:9], max_tokens=220, grammar=grammar, logprobs=2, frequency_penalty=0.5),
        *submit(engine, "a", PROMPT, max_tokens=220, grammar=grammar, handoff=after(5, "b")),
        *submit(engine, "a", PROMPT, max_tokens=220, grammar=grammar, handoff=after(5, "x"), temperature=1.0, seed=1),
    ]
    drain(engine)
    for result in bound:
        check(result)
    assert bound[-2].models[:6] == ["a"] * 5 + ["b"] and bound[-1].models[:6] == ["a"] * 5 + ["x"]
    alone = make(world, "abx", async_scheduling=False)
    (want,) = submit(alone, "a", PROMPT, max_tokens=30)
    drain(alone)
    assert free[0].token_ids == want.token_ids, "a row without a grammar is masked"
    assert engine.scheduler.pool.num_used == 0 and engine.stats.step_failures == 0


def test_both_ways_of_stepping_say_the_same(world, grammar):  # noqa: F811
    said = []
    for overlap in (True, False):
        engine = make(world, "a", async_scheduling=overlap, max_model_len=260, num_pages=300)
        results = submit(engine, "a", PROMPT, n=3, max_tokens=220, grammar=grammar, temperature=1.0, seed=9)
        drain(engine)
        said.append([result.token_ids for result in results])
    assert said[0] == said[1] and len({tuple(ids) for ids in said[0]}) > 1


def test_masks_are_made_while_the_forward_program_runs(world, grammar, monkeypatch):  # noqa: F811
    engine = make(world, "a", max_model_len=260, num_pages=300)
    order = []
    for name in ("launch", "sample", "results"):
        method = getattr(engine.runner, name)
        monkeypatch.setattr(
            engine.runner, name, lambda *args, name=name, method=method: order.append(name) or method(*args)
        )
    submit(engine, "a", PROMPT, max_tokens=3, grammar=grammar)
    drain(engine)
    assert order == ["launch", "sample", *["launch", "results", "sample"] * 2, "results"]


def test_a_grammar_that_gives_up_costs_its_own_answer(world, grammar, monkeypatch):  # noqa: F811
    engine = make(world, "a", max_model_len=260, num_pages=300)
    (bound,) = submit(engine, "a", PROMPT, max_tokens=50, grammar=grammar)
    (free,) = submit(engine, "a", PROMPT, max_tokens=8)
    engine.run_inbox()
    seq = next(seq for seq in engine.scheduler.waiting if seq.grammar is not None)

    def broken(token):
        raise GrammarError("too complex")

    monkeypatch.setattr(seq.grammar, "accept", broken)
    drain(engine)
    assert bound.finish_reason == "grammar_error" and free.finish_reason == "length" and len(free.token_ids) == 8


def test_log_probabilities_are_those_of_the_model(world, grammar):  # noqa: F811
    """Not those of the masked logits, as for every other change of the logits."""
    engine = make(world, "a", max_model_len=260, num_pages=300)
    (result,) = submit(engine, "a", PROMPT, max_tokens=220, grammar=grammar, logprobs=0)
    drain(engine)
    (scored,) = submit(engine, "a", [*PROMPT, *result.token_ids], max_tokens=0, prompt_logprobs=0)
    drain(engine)
    want = [p.logprob for p in scored.prompt_logprobs[len(PROMPT) :]]
    np.testing.assert_allclose([p.logprob for p in result.logprobs], want, atol=1e-4)
