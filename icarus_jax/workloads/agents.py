"""Sessions of agents: ReAct, Reflexion, long ReAct, a coding agent, and the replay of recorded trajectories. Host only.

ReAct is arXiv 2210.03629, Reflexion arXiv 2303.11366. The lengths of ReAct sessions were measured on 61 recorded
trajectories for HotpotQA (github.com/noahshinn/reflexion, MIT licence), in tokens of SmolLM2. `replay` makes sessions
of such a file itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from icarus_jax.workloads.workload import Session, Turn

# Quantiles 0, 2.5%, ..., 100% of lengths in tokens. Labels like 'Thought 2:' count where they are part of the prompt.
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
             105, 105, 105, 110, 118, 119, 121, 125, 131, 135, 138, 150, 157, 171, 474)  # OBSERVATION of 6 steps
LAST_THOUGHT = (14, 15, 16, 16, 16, 16, 17, 17, 17, 18, 19, 20, 21, 22, 22, 24, 24, 27, 27, 29, 29, 30, 31, 32, 32, 34,
                35, 35, 39, 41, 42, 42, 44, 45, 47, 48, 50, 52, 52, 62, 100)
LAST_ACTION = (4, 4, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 8, 8, 8, 8, 9, 9, 9, 9, 10, 10, 11, 11, 12, 12,
               12, 13, 13, 13, 14, 15, 16, 96)
# fmt: on
STEPS = {2: 4, 3: 32, 4: 11, 5: 5, 6: 9}  # number of steps -> number of trajectories with so many
_STEPS = [steps for steps, count in STEPS.items() for _ in range(count)]
MOST_STEPS = max(STEPS)  # an attempt is given up after so many; its observations are those of FRUITLESS, shorter
SOLVED = 0.295  # share of trajectories whose answer was correct
ACTION_LABEL = 5  # tokens of '\nAction 1:'
INSTRUCTION = 640  # tokens of the common instruction, with its worked examples


class _Writer:
    """Makes a session's turns, and counts the tokens of its context.

    wait: draws the seconds before each call but the first.
    """

    def __init__(self, session: int, common_len: int, own_len: int, wait: Callable[[], float]):
        self.turns: Session = []
        self.context = common_len + own_len
        self._session, self._common_len, self._wait = session, common_len, wait

    def call(self, output_len: int, role: int, then: int, keep_len: int | None = None) -> None:
        """Appends a call whose prompt is the whole context. The reply and `then` more tokens join the context."""
        number = len(self.turns)
        wait = self._wait() if number else 0.0
        turn = Turn(self._session, number, output_len, "", self.context, None, wait, self._common_len, keep_len, role)
        self.turns.append(turn)
        self.context += output_len + then


def _draw(rng: np.random.Generator, table: Sequence[int]) -> int:
    """Draws a length from a distribution that is given by its quantiles."""
    below, part = divmod(float(rng.random()) * (len(table) - 1), 1)
    return round(table[int(below)] + part * (table[int(below) + 1] - table[int(below)]))


def _lognormal(rng: np.random.Generator, mean: float, sigma: float) -> int:
    """Draws a length, at least 1, from a lognormal distribution. sigma: of the underlying normal distribution."""
    return max(1, round(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)))


def _waiting(rng: np.random.Generator, tool_s: float) -> Callable[[], float]:
    """Returns a function that draws exponential waits with a mean of `tool_s` seconds."""
    return lambda: float(rng.exponential(tool_s)) if tool_s else 0.0


def _trajectory(writer: _Writer, rng: np.random.Generator, keep_len: int | None = None) -> None:
    """Appends the calls of one ReAct attempt: in each step a thought and an action, then an observation."""
    steps = _STEPS[int(rng.integers(len(_STEPS)))]
    observation = FRUITLESS if steps == MOST_STEPS else OBSERVATION
    for step in range(steps):
        last = step == steps - 1
        writer.call(_draw(rng, LAST_THOUGHT if last else THOUGHT), 0, ACTION_LABEL, None if step else keep_len)
        writer.call(_draw(rng, LAST_ACTION if last else ACTION), 1, 0 if last else _draw(rng, observation))


def react(sessions: int, seed: int, common_len: int = INSTRUCTION, tool_s: float = 0.0) -> list[Session]:
    """Makes ReAct sessions with the lengths of the recorded trajectories.

    Roles: 0 thinks, 1 acts.

    Args:
        sessions: The number of sessions.
        seed: The seed of the lengths and waits.
        common_len: Tokens at the start of every prompt that all sessions share.
        tool_s: The mean wait before each call but the first, in seconds, exponentially distributed.

    Returns:
        The sessions.
    """
    made = []
    for i in range(sessions):
        rng = np.random.default_rng([seed, i, 1])
        writer = _Writer(i, common_len, _draw(rng, QUESTION), _waiting(rng, tool_s))
        _trajectory(writer, rng)
        made.append(writer.turns)
    return made


def reflexion(sessions: int, seed: int, common_len: int = INSTRUCTION, tool_s: float = 0.0) -> list[Session]:
    """Makes Reflexion sessions: up to three ReAct attempts.

    Each attempt is followed by a judgement of 10 tokens. A failed one is also followed by a reflection (lognormal, mean
    90 tokens). The next attempt starts from the question and that reflection, without the failed steps.

    Roles: 0 thinks, 1 acts, 2 judges, 3 reflects.

    Args:
        sessions: The number of sessions.
        seed: The seed of the lengths and waits.
        common_len: Tokens at the start of every prompt that all sessions share.
        tool_s: The mean wait before each call but the first, in seconds, exponentially distributed.

    Returns:
        The sessions.
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
            # the next prompt is the question, then the reflection in the place of the failed attempt
            keep, writer.context = start, start + reflection
        made.append(writer.turns)
    return made


def long_react(sessions: int, seed: int, common_len: int = INSTRUCTION, tool_s: float = 0.0) -> list[Session]:
    """Makes long ReAct sessions: a prompt of 4,096 tokens, 10 steps, observations lognormal with a mean of 500 tokens.

    Roles: 0 thinks, 1 acts.

    Args:
        sessions: The number of sessions.
        seed: The seed of the lengths and waits.
        common_len: Tokens at the start of every prompt that all sessions share.
        tool_s: The mean wait before each call but the first, in seconds, exponentially distributed.

    Returns:
        The sessions.
    """
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
    """Makes sessions of a coding agent: the text of a repository, then 30 calls that only add to the context.

    The text has a mean of 12,000 tokens, a reply 250, a tool's result 900; all are lognormal.

    Roles in turn: 0 plans, 1 edits, 2 tests.

    Args:
        sessions: The number of sessions.
        seed: The seed of the lengths and waits.
        common_len: Tokens at the start of every prompt that all sessions share.
        tool_s: The mean wait before each call but the first, in seconds, exponentially distributed.

    Returns:
        The sessions.
    """
    made = []
    for i in range(sessions):
        rng = np.random.default_rng([seed, i, 4])
        writer = _Writer(i, common_len, _lognormal(rng, 12_000, 0.5), _waiting(rng, tool_s))
        for call in range(30):
            writer.call(_lognormal(rng, 250, 0.8), call % 3, _lognormal(rng, 900, 1.0))
        made.append(writer.turns)
    return made


def conversation(sessions: int, seed: int, common_len: int = 1010, tool_s: float = 0.0) -> list[Session]:
    """Makes conversations of 16 turns: replies of 32 tokens, and 30 other tokens between two replies.

    There is one role.

    Args:
        sessions: The number of sessions.
        seed: The seed of the lengths and waits.
        common_len: Tokens at the start of every prompt that all sessions share.
        tool_s: The mean wait before each call but the first, in seconds, exponentially distributed.

    Returns:
        The sessions.
    """
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
    """Makes sessions of recorded ReAct trajectories, token for token.

    A thought is a call, and so is an action. The next prompt has the recorded reply, not the one that the model gives.
    All sessions share an instruction: a sentence, and then trajectories of the file as examples, the last one first.

    Args:
        path: A file of JSON lines, {"question": .., "steps": [{"thought": .., "action": .., "observation": ..}]}.
        encode: Makes token ids of text, without special tokens.
        common_len: The instruction is cut to this many tokens.

    Returns:
        The sessions, with `prompt_ids`. Roles: 0 thinks, 1 acts.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is not such a trajectory.
    """
    rows = [json.loads(line) for line in Path(path).read_bytes().splitlines() if line.strip()]
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
    """Returns each call of a trajectory as (text that is added to the prompt, text that the model replied)."""
    calls, before = [], f"Question: {row['question']}"
    for i, step in enumerate(row["steps"], 1):
        calls.append((f"{before}\nThought {i}:", f" {step['thought']}"))
        calls.append((f"\nAction {i}:", f" {step['action']}"))
        before = f"\nObservation {i}: {step['observation']}"
    return calls
