"""Sessions of agents: ReAct, Reflexion, long ReAct, a coding agent, and the replay of recorded trajectories. Host only.

The lengths of ReAct sessions were measured on 61 real trajectories (HotpotQA, noahshinn/reflexion, MIT), in tokens of
SmolLM2; `replay` reads such a file itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from icarus_jax.workloads.workload import Session, Turn

# Quantiles 0, 2.5%, ..., 100% of lengths in tokens, words like 'Thought 2:' included where they are part of the prompt.
# fmt: off
QUESTION = (18, 18, 20, 21, 21, 21, 22, 22, 22, 23, 23, 24, 24, 24, 26, 26, 27, 27, 27, 27, 28, 28, 28, 29, 29, 30, 31,
            32, 32, 32, 35, 35, 35, 36, 39, 40, 40, 40, 45, 47, 51)
THOUGHT = (8, 11, 13, 14, 15, 15, 16, 17, 17, 18, 18, 20, 20, 22, 22, 23, 23, 23, 23, 24, 25, 25, 26, 26, 27, 27, 27,
           28, 29, 30, 31, 32, 32, 32, 33, 34, 35, 36, 39, 45, 53)
ACTION = (5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 8, 8, 8, 8, 8, 8, 9, 9, 9, 9, 9, 10, 10, 11, 11, 11,
          12, 12, 13, 13, 16, 31)
OBSERVATION = (14, 28, 51, 59, 67, 76, 79, 80, 84, 86, 87, 92, 94, 97, 98, 100, 102, 107, 112, 120, 124, 129, 139, 159,
               168, 172, 185, 228, 241, 263, 291, 294, 319, 359, 419, 452, 570, 578, 696, 778, 1111)
FRUITLESS = (14, 14, 19, 38, 40, 42, 44, 47, 53, 55, 57, 61, 66, 76, 77, 78, 79, 85, 88, 90, 92, 93, 101, 103, 104, 105,
             105, 105, 105, 110, 118, 119, 121, 125, 131, 135, 138, 150, 157, 171, 474)  # in 6-step ones
LAST_THOUGHT = (14, 15, 16, 16, 16, 16, 17, 17, 17, 18, 19, 20, 21, 22, 22, 24, 24, 27, 27, 29, 29, 30, 31, 32, 32, 34,
                35, 35, 39, 41, 42, 42, 44, 45, 47, 48, 50, 52, 52, 62, 100)
LAST_ACTION = (4, 4, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9, 10, 10, 11, 11, 12, 12,
               12, 13, 13, 13, 14, 15, 16, 96)
# fmt: on
STEPS = {2: 4, 3: 32, 4: 11, 5: 5, 6: 9}  # steps of a trajectory: how many had so many
_STEPS = [steps for steps, count in STEPS.items() for _ in range(count)]
MOST_STEPS = max(STEPS)  # where an attempt is given up; its observations are shorter
SOLVED = 0.295  # share of trajectories whose answer was correct
ACTION_LABEL = 5  # tokens of '\nAction 1:'
INSTRUCTION = 640  # tokens of the common instruction, with its worked examples


class _Writer:
    """Writes a session's turns, keeping count of its context."""

    def __init__(self, session: int, common_len: int, own_len: int, wait: Callable[[], float]):
        self.turns: Session = []
        self.context = common_len + own_len
        self._session, self._common_len, self._wait = session, common_len, wait

    def call(self, output_len: int, role: int, then: int, keep_len: int | None = None) -> None:
        """A call on the whole context, whose reply and `then` further tokens join it."""
        number = len(self.turns)
        wait = self._wait() if number else 0.0
        turn = Turn(self._session, number, output_len, "", self.context, None, wait, self._common_len, keep_len, role)
        self.turns.append(turn)
        self.context += output_len + then


def _draw(rng: np.random.Generator, table: Sequence[int]) -> int:
    """A length from its quantiles."""
    below, part = divmod(float(rng.random()) * (len(table) - 1), 1)
    return round(table[int(below)] + part * (table[int(below) + 1] - table[int(below)]))


def _lognormal(rng: np.random.Generator, mean: float, sigma: float) -> int:
    return max(1, round(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)))


def _waiting(rng: np.random.Generator, tool_s: float) -> Callable[[], float]:
    return lambda: float(rng.exponential(tool_s)) if tool_s else 0.0


def _trajectory(writer: _Writer, rng: np.random.Generator, keep_len: int | None = None) -> None:
    """One ReAct attempt: in each step a thought and an action, then an observation."""
    steps = _STEPS[int(rng.integers(len(_STEPS)))]
    observation = FRUITLESS if steps == MOST_STEPS else OBSERVATION
    for step in range(steps):
        last = step == steps - 1
        writer.call(_draw(rng, LAST_THOUGHT if last else THOUGHT), 0, ACTION_LABEL, None if step else keep_len)
        writer.call(_draw(rng, LAST_ACTION if last else ACTION), 1, 0 if last else _draw(rng, observation))


def react(sessions: int, seed: int, common_len: int = INSTRUCTION, tool_s: float = 0.0) -> list[Session]:
    """ReAct sessions with the trajectories' lengths. tool_s: mean seconds (exponential) before each call but the first.

    Roles: 0 thinks, 1 acts.
    """
    made = []
    for i in range(sessions):
        rng = np.random.default_rng([seed, i, 1])
        writer = _Writer(i, common_len, _draw(rng, QUESTION), _waiting(rng, tool_s))
        _trajectory(writer, rng)
        made.append(writer.turns)
    return made


def reflexion(sessions: int, seed: int, common_len: int = INSTRUCTION, tool_s: float = 0.0) -> list[Session]:
    """Reflexion: up to three ReAct attempts. After each one is judged (10 tokens); a failed one is reflected on
    (lognormal, mean 90), and the next starts from the question and that reflection, without the failed steps.

    Roles: 0 thinks, 1 acts, 2 judges, 3 reflects.
    """
    made = []
    for i in range(sessions):
        rng = np.random.default_rng([seed, i, 2])
        start = common_len + _draw(rng, QUESTION)
        writer = _Writer(i, common_len, start - common_len, _waiting(rng, tool_s))
        keep = None
        for attempt in range(3):
            _trajectory(writer, rng, keep)
            writer.call(10, 2, 20)
            if rng.random() < SOLVED or attempt == 2:
                break
            reflection = _lognormal(rng, 90, 0.4)
            writer.call(reflection, 3, 0)
            # the reflection is repeated after the question, where the failed attempt was
            keep, writer.context = start, start + reflection
        made.append(writer.turns)
    return made


def long_react(sessions: int, seed: int, common_len: int = INSTRUCTION, tool_s: float = 0.0) -> list[Session]:
    """ReAct on a prompt of 4,096 tokens: 10 steps, observations lognormal with mean 500."""
    made = []
    for i in range(sessions):
        rng = np.random.default_rng([seed, i, 3])
        writer = _Writer(i, common_len, 4096 - common_len, _waiting(rng, tool_s))
        for _ in range(10):
            writer.call(_draw(rng, THOUGHT), 0, ACTION_LABEL)
            writer.call(_draw(rng, ACTION), 1, _lognormal(rng, 500, 1.0))
        made.append(writer.turns)
    return made


def coding(sessions: int, seed: int, common_len: int = 4096, tool_s: float = 0.0) -> list[Session]:
    """A coding agent: a repository's text (lognormal, mean 12,000), then 30 calls that only ever add: replies of 250
    and tool results of 900 tokens (means, lognormal). Roles in turn: 0 plans, 1 edits, 2 tests."""
    made = []
    for i in range(sessions):
        rng = np.random.default_rng([seed, i, 4])
        writer = _Writer(i, common_len, _lognormal(rng, 12_000, 0.5), _waiting(rng, tool_s))
        for call in range(30):
            writer.call(_lognormal(rng, 250, 0.8), call % 3, _lognormal(rng, 900, 1.0))
        made.append(writer.turns)
    return made


def conversation(sessions: int, seed: int, common_len: int = 1010, tool_s: float = 0.0) -> list[Session]:
    """A conversation of 16 turns: replies of 32 tokens, 30 more between them. One role."""
    made = []
    for i in range(sessions):
        writer = _Writer(i, common_len, 0, _waiting(np.random.default_rng([seed, i, 5]), tool_s))
        for _ in range(16):
            writer.call(32, 0, 30)
        made.append(writer.turns)
    return made


GENERATORS: dict[str, Callable[..., list[Session]]] = {
    "react": react,
    "reflexion": reflexion,
    "long_react": long_react,
    "coding": coding,
    "conversation": conversation,
}


def replay(path: str | Path, encode: Callable[[str], list[int]], common_len: int = INSTRUCTION) -> list[Session]:
    """The sessions of a trajectory file as they are: {"question", "steps": [{"thought", "action", "observation"}]}.

    encode: text to token ids, without special tokens. The common instruction is a sentence and then the file's last
    trajectories as examples, cut at common_len tokens. A thought and an action are a call each; the recorded text,
    not the model's own, goes into the next prompt. Raises OSError, ValueError.
    """
    rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    try:
        pieces = [_pieces(row) for row in rows]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a row is not a trajectory of question and steps ({error!r})") from error
    intro = (
        "Answer the question in steps: a Thought, then an Action (Search[...], Lookup[...] or Finish[...]), then an "
    )
    text = intro + "Observation.\n\n" + "\n\n".join("".join(map("".join, p)) for p in reversed(pieces))
    common = encode(text)[:common_len]
    sessions = []
    for i, calls in enumerate(pieces):
        ids, turns = list(common), Session()
        for number, (asked, said) in enumerate(calls):
            ids += encode(asked)
            reply = encode(said)
            turns.append(Turn(i, number, len(reply), prompt_ids=tuple(ids), role=number % 2))
            ids += reply
        sessions.append(turns)
    return sessions


def _pieces(row: dict) -> list[tuple[str, str]]:
    """(what is put before a call, what the model said) of each call of a trajectory."""
    calls, before = [], f"Question: {row['question']}"
    for i, step in enumerate(row["steps"], 1):
        calls.append((f"{before}\nThought {i}:", f" {step['thought']}"))
        calls.append((f"\nAction {i}:", f" {step['action']}"))
        before = f"\nObservation {i}: {step['observation']}"
    return calls
