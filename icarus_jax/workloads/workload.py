"""Agent workloads: sessions of turns, each turn one call of one model. Host only.

A file of them is JSON lines, one turn a line:

    {"session": 0, "turn": 0, "model": "h3", "prompt_len": 667, "output_len": 25, "wait_s": 0.0, "common_len": 640}

A session's turns count from 0 and run one after the other: a turn is asked `wait_s` seconds after the reply to the turn
before it. Without a model, `assign` gives it one.
With `prompt_ids` the prompt is exactly those tokens. With `prompt_len` it is what the session has said so far, its own
replies included, and new random tokens up to that length (see `Conversation`).

agents.py makes such sessions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ASSIGNMENTS = ("round_robin", "role", "zipf")
ARRIVALS = ("poisson", "gamma")
ZIPF_EXPONENT = 1.5
GAMMA_CV = 4.0


@dataclasses.dataclass(frozen=True)
class Turn:
    """One call. Either `prompt_ids` or `prompt_len` says what is asked; output_len tokens are generated.

    common_len: the prompt's first tokens that are the same in every session (prompt_len only). keep_len: tokens of
    the session so far that the prompt starts with (all, if None). role: which of the agent's parts speaks.
    """

    session: int
    turn: int
    output_len: int
    model: str = ""
    prompt_len: int = 0
    prompt_ids: tuple[int, ...] | None = None
    wait_s: float = 0.0
    common_len: int = 0
    keep_len: int | None = None
    role: int = 0

    def __post_init__(self):
        if self.prompt_ids is not None:
            object.__setattr__(self, "prompt_len", len(self.prompt_ids))
        if self.prompt_len < 1 or self.output_len < 1 or self.wait_s < 0:
            raise ValueError(f"{self}: prompt and output have at least one token, and wait_s is not negative")


Session = list[Turn]


class Conversation:
    """What one session says: each turn's prompt, given the replies so far. The same for the same seed and replies.

    new_tokens: those of the last prompt that a perfect cache of this session would have to compute.
    """

    def __init__(self, session: int, seed: int, vocab_size: int):
        self.new_tokens = 0
        self._vocab, self._seed = vocab_size, seed
        self._random = np.random.default_rng([seed, session, 7])
        self._said: list[int] = []
        self._computed = 0  # tokens of `_said` whose K/V has been computed: all but a reply's last one

    def prompt(self, turn: Turn) -> list[int]:
        """The token ids of a turn's prompt. Raises ValueError if the turn is shorter than what it must hold."""
        if turn.prompt_ids is not None:
            prompt = list(turn.prompt_ids)
            kept = common_prefix(self._said, prompt)
        else:
            prompt = self._said[: turn.keep_len] if self._said else self._common_tokens(turn.common_len)
            kept = len(prompt)
            missing = turn.prompt_len - kept
            if missing < 0:
                raise ValueError(f"session {turn.session}, turn {turn.turn}: prompt_len is below what was said so far")
            prompt = prompt + self._random.integers(self._vocab, size=missing).tolist()
        self.new_tokens = len(prompt) - min(kept, self._computed)
        self._said, self._computed = prompt, len(prompt)
        return list(prompt)

    def reply(self, token_ids: Sequence[int]) -> None:
        """Takes in the reply to the last prompt; without it the next prompt has random tokens in its place."""
        self._said = self._said + list(token_ids)
        self._computed += max(0, len(token_ids) - 1)

    def _common_tokens(self, count: int) -> list[int]:
        return np.random.default_rng([self._seed, 8]).integers(self._vocab, size=count).tolist()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def assign(sessions: list[Session], models: Sequence[str], how: str, seed: int = 0) -> list[Session]:
    """Gives each turn that names no model its model.

    round_robin: another model each turn, each session starting with another one. role: each role has models of its
    own, one of which a session keeps (roles share when models are few). zipf: drawn anew each turn, the k-th model
    with probability in proportion to k ** -1.5. Raises ValueError, also if a turn names a model that is not there.
    """
    if how not in ASSIGNMENTS:
        raise ValueError(f"no assignment {how!r}; there is {', '.join(ASSIGNMENTS)}")
    for turn in (turn for session in sessions for turn in session):
        if turn.model and turn.model not in models:
            raise ValueError(
                f"session {turn.session}, turn {turn.turn} asks for {turn.model!r}; the models are {', '.join(models)}"
            )
    n = len(models)
    roles = 1 + max(turn.role for session in sessions for turn in session)
    weights = np.arange(1, n + 1) ** -ZIPF_EXPONENT
    rng = np.random.default_rng([seed, 5])

    def pick(turn: Turn) -> int:
        if how == "round_robin":
            return (turn.session + turn.turn) % n
        if how == "role":
            return (turn.role + roles * (turn.session % max(1, n // roles))) % n
        return int(rng.choice(n, p=weights / weights.sum()))

    return [
        [turn if turn.model else dataclasses.replace(turn, model=models[pick(turn)]) for turn in session]
        for session in sessions
    ]


def arrivals(count: int, rate: float, kind: str, seed: int) -> list[float]:
    """Seconds at which sessions arrive: `count` in count / rate seconds, all at 0 for an infinite rate.

    poisson, or gamma: bursts, intervals with a coefficient of variation of 4. The intervals drawn are stretched so
    that their mean is exactly 1 / rate: few draws alone may be far from it.
    """
    if kind not in ARRIVALS or not rate > 0:
        raise ValueError(f"arrivals {kind!r} at {rate} a second: kinds are {', '.join(ARRIVALS)}, rates above 0")
    rng = np.random.default_rng([seed, 6])
    shape = 1.0 if kind == "poisson" else GAMMA_CV**-2
    drawn = np.cumsum(rng.gamma(shape, 1 / shape, count))
    return (drawn / drawn[-1] * count / rate).tolist()


def save(sessions: list[Session], path: str | Path) -> None:
    """Writes JSON lines; what has its default is left out."""
    defaults = {f.name: f.default for f in dataclasses.fields(Turn)}
    with Path(path).open("w") as file:
        for turn in (turn for session in sessions for turn in session):
            row = {k: v for k, v in vars(turn).items() if v != defaults[k]}
            if turn.prompt_ids is not None:
                del row["prompt_len"]
            file.write(json.dumps(row) + "\n")


def load(path: str | Path) -> list[Session]:
    """Reads what `save` writes, in any order of lines. Raises OSError; ValueError that says where the file is wrong."""
    sessions: dict[int, Session] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            ids = row.pop("prompt_ids", None)
            turn = Turn(**row, prompt_ids=None if ids is None else tuple(ids))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        sessions.setdefault(turn.session, []).append(turn)
    found = [sorted(sessions[key], key=lambda turn: turn.turn) for key in sorted(sessions)]
    for session in found:
        if [turn.turn for turn in session] != list(range(len(session))):
            turns = ", ".join(str(turn.turn) for turn in session)
            raise ValueError(
                f"{path}, session {session[0].session}: its turns are {turns}; they count from 0, each once"
            )
    return found
