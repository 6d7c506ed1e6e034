"""Agent workloads: sessions of turns. A turn is one call of one model. Host only.

A workload file has JSON lines, one for each turn:

    {"session": 0, "turn": 0, "model": "h3", "prompt_len": 667, "output_len": 25, "wait_s": 0.0, "common_len": 640}

The turns of a session are counted from 0 and run one after the other: a call is made `wait_s` seconds after the reply
to the turn before it. A turn without a model gets one from `assign`.

With `prompt_ids`, the prompt is exactly these tokens. With `prompt_len`, it is the session so far, replies included,
and then random tokens up to that length (see `Conversation`).

agents.py generates such sessions.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ASSIGNMENTS = ("round_robin", "role", "zipf")
ARRIVALS = ("poisson", "gamma")
ZIPF_EXPONENT = 1.5  # of 'zipf': the k-th model has a weight of k ** -1.5
GAMMA_CV = 4.0  # of 'gamma': the coefficient of variation of the intervals


@dataclasses.dataclass(frozen=True)
class Turn:
    """One call. The prompt is given by `prompt_ids` or by `prompt_len`.

    Attributes:
        session: The number of the session.
        turn: The number of the turn in its session, from 0.
        output_len: Tokens that are generated.
        model: The name of the model; empty if `assign` is to choose it.
        prompt_len: Tokens of the prompt.
        prompt_ids: The token ids of the prompt.
        wait_s: Seconds between the reply to the turn before and this call.
        common_len: Tokens at the start of a first prompt that are the same in every session (with prompt_len only).
        keep_len: Tokens of the session so far that the prompt starts with (with prompt_len only). None: all of them.
        role: Which part of the agent makes the call, from 0.

    Raises:
        ValueError: The prompt or the output is empty, or `wait_s` is negative.
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
    """Makes the prompts of one session from the replies so far. The same seed and replies give the same prompts.

    Args:
        session: The number of the session.
        seed: The seed of random tokens.
        vocab_size: Random tokens are below this number.

    Attributes:
        new_tokens: Tokens of the last prompt that must be computed even if all K/V of this session is cached.
    """

    def __init__(self, session: int, seed: int, vocab_size: int):
        self.new_tokens = 0
        self._vocab, self._seed = vocab_size, seed
        self._random = np.random.default_rng([seed, session, 7])
        self._said: list[int] = []
        self._computed = 0  # tokens of `_said` whose K/V has been computed: all but a reply's last one

    def prompt(self, turn: Turn) -> list[int]:
        """Makes the prompt of a turn.

        Args:
            turn: The turn. Turns are taken in order.

        Returns:
            The token ids of the prompt.

        Raises:
            ValueError: `prompt_len` is smaller than the number of tokens that the prompt has to start with.
        """
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
        """Appends the reply to the last prompt to the session.

        Without a call of this method, the next prompt has random tokens in the place of the reply.

        Args:
            token_ids: The tokens of the reply.
        """
        self._said = self._said + list(token_ids)
        self._computed += max(0, len(token_ids) - 1)

    def _common_tokens(self, count: int) -> list[int]:
        return np.random.default_rng([self._seed, 8]).integers(self._vocab, size=count).tolist()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def by_length(sessions: Sequence[Session]) -> list[Session]:
    """Says of prompts that are given by tokens what prompts given by length say: how much of them was there before.

    Args:
        sessions: Sessions; all with `prompt_ids`, or else they are returned as they are.

    Returns:
        The sessions with `prompt_len`, the `common_len` that all first prompts have, and as `keep_len` what a prompt
        shares with the one before it. Replies are generated, so that none is expected to be in the next prompt.
    """
    if any(turn.prompt_ids is None for session in sessions for turn in session):
        return list(sessions)
    prompts = [[turn.prompt_ids or () for turn in session] for session in sessions]
    common = min((common_prefix(prompts[0][0], own[0]) for own in prompts), default=0)
    made = []
    for session, own in zip(sessions, prompts, strict=True):
        keeps = [None, *(common_prefix(before, after) for before, after in itertools.pairwise(own))]
        made.append(
            [
                dataclasses.replace(turn, prompt_ids=None, common_len=common, keep_len=keep)
                for turn, keep in zip(session, keeps, strict=True)
            ]
        )
    return made


def assign(sessions: list[Session], models: Sequence[str], how: str, seed: int = 0) -> list[Session]:
    """Assigns a model to each turn that has none.

    Args:
        sessions: The sessions.
        models: The names of the models.
        how: 'round_robin': a session takes the models in turn, and each session starts with another one. 'role': each
            role has models of its own, of which a session always uses the same one; roles share models if there are too
            few. 'zipf': each turn draws a model at random, the k-th with a probability in proportion to k ** -1.5.
        seed: The seed of 'zipf'.

    Returns:
        The sessions, with a model in every turn.

    Raises:
        ValueError: There is no such assignment, or a turn already names a model that is not among `models`.
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
    """Draws the times at which sessions arrive.

    The drawn intervals are scaled so that their mean is exactly 1 / rate, because the mean of a few draws may be far
    from it.

    Args:
        count: The number of sessions.
        rate: Sessions per second. If it is infinite, all sessions arrive at 0.
        kind: 'poisson' for exponential intervals; 'gamma' for bursts, with intervals of a gamma distribution whose
            coefficient of variation is 4.
        seed: The seed.

    Returns:
        `count` times in seconds, in ascending order. The last one is count / rate.

    Raises:
        ValueError: There is no such kind, or the rate is not positive.
    """
    if kind not in ARRIVALS or not rate > 0:
        raise ValueError(f"arrivals {kind!r} at {rate} a second: kinds are {', '.join(ARRIVALS)}, rates above 0")
    rng = np.random.default_rng([seed, 6])
    shape = 1.0 if kind == "poisson" else GAMMA_CV**-2
    drawn = np.cumsum(rng.gamma(shape, 1 / shape, count))
    return (drawn / drawn[-1] * count / rate).tolist()


def save(sessions: list[Session], path: str | Path) -> None:
    """Writes sessions to a workload file. Fields with their default values are left out.

    Args:
        sessions: The sessions.
        path: The file to write.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(Turn)}
    with Path(path).open("w") as file:
        for turn in (turn for session in sessions for turn in session):
            row = {k: v for k, v in vars(turn).items() if v != defaults[k]}
            if turn.prompt_ids is not None:
                del row["prompt_len"]
            file.write(json.dumps(row) + "\n")


def load(path: str | Path) -> list[Session]:
    """Reads a workload file. Its lines may be in any order.

    Args:
        path: The file.

    Returns:
        The sessions in the order of their numbers, each with its turns in order.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is wrong, or a session lacks a turn or has one twice. The message says where.
    """
    sessions: dict[int, Session] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
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
