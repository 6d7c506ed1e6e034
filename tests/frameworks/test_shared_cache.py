"""Agents that are heads on one cache: each computes only what is new, whoever read or wrote the rest.

SmolLM2-135M-Instruct and its trained heads. What they say is not judged. `pytest -s` shows the tokens of each call.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAJECTORIES = ROOT.parent / "shared" / "data" / "react_hotpotqa.jsonl"
pytestmark = [pytest.mark.heavy, pytest.mark.full]
TOKENS = re.compile(r"(\w+): (\d+) prompt tokens, (\d+) cached, (\d+) new")


@pytest.mark.parametrize("name", ["agents_sdk", "agents_langgraph"])
def test_the_second_agent_computes_what_is_new(smollm, capsys, name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(f"{smollm.url}/v1")
    shown = capsys.readouterr().out
    print(shown)
    calls = [(agent, *map(int, numbers)) for agent, *numbers in TOKENS.findall(shown)]
    assert [agent for agent, *_ in calls] == ["planner", "writer"] * 2
    for (_, before, *_), (_, prompt, cached, new) in itertools.pairwise(calls):
        assert cached > before, "all of the other agent's prompt, and what it wrote"
        assert new == prompt - cached < 25


def react(smollm, question: str, steps: list[dict]) -> list[tuple[str, int, int]]:
    """A ReAct loop with a planner, an actor and a critic: (model, prompt tokens, cached tokens) of each call.

    Observations are the recorded ones. The prompt of each call is all that was read and written before, and a label.
    """

    def tokens(text: str) -> list[int]:
        return smollm.http.post("/tokenize", json={"prompt": text}).json()["tokens"]

    def call(label: str, model: str) -> None:
        context.extend(tokens(label))
        answer = smollm.complete(model=model, prompt=context, max_tokens=24, stop=["\n"], return_token_ids=True)
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        print(f"{model}: {len(context)} prompt tokens, {cached} cached, {len(context) - cached} new")
        if calls:  # K/V of the last token may not have been computed
            assert cached >= len(read) - 1, "all that any of them has read and written"
        calls.append((model, len(context), cached))
        context.extend(answer["choices"][0]["token_ids"])
        read[:] = context

    context, read, calls = tokens(f"Answer in steps of Thought, Action and Observation.\nQuestion: {question}"), [], []
    for i, step in enumerate(steps, 1):
        call(f"\nThought {i}:", "math")
        call(f"\nAction {i}:", "sql")
        context.extend(tokens(f"\nObservation {i}: {step['observation']}"))
        call(f"\nIs the question answered after step {i}? Answer:", "intent")
    return calls


@pytest.mark.skipif(not TRAJECTORIES.exists(), reason="the questions lie in ../shared/data")
def test_a_planner_an_actor_and_a_critic_on_react_questions(smollm):
    for line in TRAJECTORIES.read_text().splitlines()[:2]:
        row = json.loads(line)
        calls = react(smollm, row["question"], row["steps"][:3])
        assert [model for model, *_ in calls] == ["math", "sql", "intent"] * len(row["steps"][:3])
