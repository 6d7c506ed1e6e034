"""Steps one by one and overlapped give the same answers; a step in flight costs no more than a row of a sequence."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from icarus_jax.engine.engine import Engine
from icarus_jax.engine.sample_inputs import unpack
from icarus_jax.engine.step_batch import rows_in
from icarus_jax.models.trunk import Rows
from icarus_jax.scheduling.request import SessionHint
from tests.engine.harness import Result, drain, make_engine, submit
from tests.engine.test_agents import CONFIG, PROMPT, after, make, world  # noqa: F401 (a fixture)
from tests.engine.test_recovery import files  # noqa: F401

OTHER = np.random.default_rng(8).integers(0, 256, 17).tolist()
REQUESTS: list[tuple[str | tuple[str, ...], list[int], dict]] = [
    ("a", PROMPT, {"max_tokens": 24}),
    ("trunk", OTHER, {"max_tokens": 1}),
    (("a", "b", "x"), PROMPT, {"max_tokens": 6, "n": 2, "temperature": 0.9, "seed": 5, "top_p": 0.8, "top_k": 30}),
    ("b", OTHER, {"max_tokens": 34, "repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": 0.3}),
    ("b", PROMPT, {"max_tokens": 22, "logprobs": 3, "temperature": 1.0, "seed": 2, "min_p": 0.1}),
    ("a", OTHER, {"max_tokens": 8, "prompt_logprobs": 1, "logprobs": 0}),
    ("x", OTHER, {"max_tokens": 7, "logit_bias": {3: 60.0, 4: 60.0}, "frequency_penalty": 2.0}),
    ("a", PROMPT, {"max_tokens": 10, "handoff": after(4, "b")}),
    ("a", PROMPT, {"max_tokens": 9, "handoff": after(3, "x")}),
    ("a", OTHER, {"max_tokens": 6, "reference_logprobs": True}),
    ("trunk", PROMPT, {"max_tokens": 5, "reference_logprobs": True, "temperature": 0.5, "seed": 3}),
    ("b", OTHER, {"max_tokens": 0, "prompt_logprobs": 0}),
]


def answers(engine: Engine) -> list[Result]:
    results = []
    for i, (model, prompt, params) in enumerate(REQUESTS):
        results += submit(engine, model, prompt, **params)
        if i % 3 == 2:  # arrivals between steps
            engine.run_inbox()
            engine.step()
            engine.step()
    drain(engine)
    assert engine.scheduler.pool.num_used == 0 and engine.stats.step_failures == 0
    return results


def check_same(a: Result, b: Result) -> None:
    assert (a.token_ids, a.models, a.finish_reason) == (b.token_ids, b.models, b.finish_reason)
    for one, other in ((a.logprobs, b.logprobs), (a.prompt_logprobs or [], b.prompt_logprobs or [])):
        assert [p and p.token_id for p in one] == [p and p.token_id for p in other]
        np.testing.assert_allclose([p.logprob for p in one if p], [p.logprob for p in other if p], atol=1e-4)
    np.testing.assert_allclose(a.reference, b.reference, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"num_pages": 24, "max_model_len": 80, "max_num_seqs": 5, "max_num_batched_tokens": 8}]
)
def test_the_answers_are_those_of_single_steps(world, changes):  # noqa: F811
    """Penalties, log-probabilities, seeds, handoffs, fan-out, scoring; also with preemption and chunks."""
    engines = [make(world, "abx", async_scheduling=overlap, **changes) for overlap in (True, False)]
    overlapped, single = map(answers, engines)
    assert len(overlapped) == len(single) > len(REQUESTS)
    for a, b in zip(overlapped, single, strict=True):
        check_same(a, b)
    if changes:
        assert all(engine.stats.preemptions for engine in engines)


def attention(rows: Rows) -> tuple[list, list]:
    """The runs, in any order, and for each row in order what it attends to and where."""
    both, places, runs = (rows.work.items, rows.work.tiles), [], []
    for kind in both:
        columns = (kind.rows, kind.positions, kind.pages, kind.start[:, None], kind.length[:, None])
        described = np.concatenate(columns, 1).tolist()
        assert all(kind.length[: kind.num] > 0) and not any(kind.length[kind.num :])
        places += [(described[i], place) for i, place in np.ndindex(kind.rows.shape)]
        runs.append(sorted(described))
    assert rows.work.num_parts == (rows.work.parts >= 0).sum(1).max()
    seen = [[places[part] for part in parts[parts >= 0]] for parts in rows.work.parts]
    return runs, seen


def check_repeated_steps(engine: Engine) -> list[bool]:
    """Works out every step that repeats the one before once more. Returns which steps do, as they run."""
    runner, prepare, repeated = engine.runner, engine.runner.prepare, []

    def checked(plan):
        last = runner._last
        batch = prepare(plan)
        prepared = runner._last
        repeated.append(last is not None and batch.draws is last[1].draws)
        anew = runner._worked_out(plan, last[1].draws if last is not None else {})
        assert runner._last is prepared
        assert (anew.bucket, anew.counts, anew.variant) == (batch.bucket, batch.counts, batch.variant)
        assert anew.draws == batch.draws
        np.testing.assert_array_equal(anew.sampling, batch.sampling)
        made, want = (rows_in(b.step, b.bucket, runner.num_active(b.bucket)) for b in (batch, anew))
        for field in ("tokens", "slots", "active", "kv_cells", "sample_rows"):
            np.testing.assert_array_equal(getattr(made, field), getattr(want, field), field)
        np.testing.assert_array_equal(made.work.positions, want.work.positions)
        assert attention(made) == attention(want)
        return batch

    runner.prepare = checked
    return repeated


def test_a_repeated_step_is_what_would_be_worked_out(world):  # noqa: F811
    engine = make(world, "abx", num_pages=200, max_num_seqs=6)
    repeated = check_repeated_steps(engine)
    answers(engine)
    assert any(repeated) and not all(repeated)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 5, "top_p": 0.8}, {"presence_penalty": 0.1}])
def test_a_repeated_step_of_long_sequences(world, sampling):  # noqa: F811
    """Their items fill up, one after the other, behind a prefix that they share."""
    engine = make(world, "abx", num_pages=400, max_num_seqs=6, max_model_len=260)
    repeated = check_repeated_steps(engine)
    submit(engine, ("a", "b", "trunk", "x"), PROMPT * 5, max_tokens=80, **sampling)
    submit(engine, ("a", "x"), OTHER, max_tokens=80, **sampling)
    drain(engine)
    assert sum(repeated) > 60


def launched(engine: Engine) -> list[list[int]]:
    """Notes the rows of each sequence in every step."""
    steps, prepare = [], engine.runner.prepare

    def noting(plan):
        steps.append([work.seq.seq_id for work in plan.work])
        return prepare(plan)

    engine.runner.prepare = noting
    return steps


def test_the_next_step_is_launched_before_the_results_of_this_one(world, monkeypatch):  # noqa: F811
    engine = make(world, "a")
    order, launch, results = [], engine.runner.launch, engine.runner.results
    monkeypatch.setattr(engine.runner, "launch", lambda *args: order.append("launch") or launch(*args))
    monkeypatch.setattr(engine.runner, "results", lambda *args: order.append("results") or results(*args))
    submit(engine, "a", PROMPT, max_tokens=4)
    drain(engine)
    assert order == ["launch", *["launch", "results"] * 3, "results"]


@pytest.mark.parametrize("ends", ["max_tokens", "end token", "abort", "max_model_len"])
def test_an_end_costs_one_row_at_most(world, ends):  # noqa: F811
    probe = make(world, "a", async_scheduling=False)
    (want,) = submit(probe, "a", PROMPT, max_tokens=8)
    drain(probe)
    engine = make(world, "a", **({"max_model_len": len(PROMPT) + 5} if ends == "max_model_len" else {}))
    steps = launched(engine)
    stop = {"stop_token_ids": (want.token_ids[4],)} if ends == "end token" else {}
    (result,) = submit(engine, "a", PROMPT, max_tokens=5 if ends == "max_tokens" else 8, **stop)
    engine.run_inbox()
    if ends == "abort":
        while len(result.token_ids) < 5:
            engine.step()
        engine.abort([0])
    drain(engine)
    assert result.token_ids == want.token_ids[:5]
    assert len(steps) == (5 if ends.startswith("max") else 6), "an end that is known beforehand costs no row"
    assert engine.scheduler.pool.num_used == 0


def test_the_row_of_a_sequence_that_has_ended_spoils_no_page(world):  # noqa: F811
    """The session goes on from pages that a step in flight still wrote to."""
    want = make(world, "ab", async_scheduling=False)
    (first,) = submit(want, "a", PROMPT, max_tokens=8)
    drain(want)
    stop = first.token_ids[4]
    for overlap in (True, False):
        engine = make(world, "ab", async_scheduling=overlap)
        (result,) = submit(engine, "a", PROMPT, max_tokens=8, stop_token_ids=(stop,), session=SessionHint("s", 60.0))
        drain(engine)
        (after_it,) = submit(engine, "b", [*PROMPT, *result.token_ids, 5, 6], max_tokens=5)
        drain(engine)
        (fresh,) = submit(make(world, "ab"), "b", [*PROMPT, *result.token_ids, 5, 6], max_tokens=5)
        assert after_it.cached_tokens == len(PROMPT) + 4
        assert engine.stats.step_failures == 0 and fresh.token_ids == []
        alone = make(world, "ab", async_scheduling=False)
        (same,) = submit(alone, "b", [*PROMPT, *result.token_ids, 5, 6], max_tokens=5)
        drain(alone)
        assert after_it.token_ids == same.token_ids


@pytest.mark.parametrize("seed", [0, 1, 2**53, 2**62, 2**63 - 1])
def test_neighbouring_seeds_differ(world, seed):  # noqa: F811
    """Choices use seed + i; seeds have 64 bits, of which the last 32 count."""
    engine = make(world, "a")
    seen, prepare = set(), engine.runner.prepare

    def noting(plan):
        batch = prepare(plan)
        seen.update(unpack(batch.sampling, batch.variant).seed[: len(batch.counts)].tolist())
        return batch

    engine.runner.prepare = noting
    submit(engine, "a", PROMPT, n=3, max_tokens=2, temperature=1.0, seed=seed)
    drain(engine)
    assert seen == {(seed + i) % 2**32 for i in range(3)}


@pytest.mark.parametrize("name", ["prepare", "launch", "sample"])
def test_a_failing_launch_does_not_take_the_step_before_with_it(files, monkeypatch, name):  # noqa: F811
    """A request whose last token is on its way gets it."""
    engine = make_engine(files[0], {"a": (files[1], "shared")}, dataclasses.replace(CONFIG, async_scheduling=True))
    (short,) = submit(engine, "a", PROMPT, max_tokens=1)
    engine.run_inbox()
    engine.step()
    (long,) = submit(engine, "a", OTHER, max_tokens=4)
    engine.run_inbox()

    def broken(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr(engine.runner, name, broken)
    with pytest.raises(RuntimeError, match="planted"):
        engine.step()
    assert short.finish_reason == "length" and len(short.token_ids) == 1 and long.finish_reason is None
