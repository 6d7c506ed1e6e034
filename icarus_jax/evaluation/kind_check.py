"""Measures as which kind a PEFT adapter can be served: `isolated` (which is what PEFT computes), `shared`, `activated`.

The same rows go through the serving engine under every kind, in one batch on one cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from icarus_jax.config import LORA_TARGETS, HeadConfig
from icarus_jax.engine.engine import Engine
from icarus_jax.scheduling.request import Request, SamplingParams, TokenOutput
from icarus_jax.training.data import Example
from icarus_jax.weights.peft import Adapter

KINDS = ("shared", "activated", "isolated")  # the first is the cheapest to serve
# A kind is as good as `isolated` if it stays within both margins of it.
LOSS_MARGIN = 0.02  # nats per token
MATCH_MARGIN = 0.02  # a share of the answers
MAX_INVOCATION = 8  # tokens


@dataclasses.dataclass(frozen=True)
class KindReport:
    """How well an adapter does when it is served as one kind.

    Attributes:
        loss: the teacher-forced loss, in nats per completion token.
        agreement: the share of `isolated`'s greedy tokens that this kind generates too, up to the first difference of
            each answer.
        match: the share of the greedy answers that equal the completion token by token.
    """

    loss: float
    agreement: float
    match: float


def invocation_of(examples: Sequence[Example]) -> tuple[int, ...]:
    """Finds the tokens that every prompt ends with. They are the chat template's opening of an answer.

    Args:
        examples: the prompts with their completions.

    Returns:
        The last tokens that all prompts share, at most MAX_INVOCATION of them.

    Raises:
        ValueError: the prompts do not end with the same token.
    """
    prompts = [example.tokens[: example.num_prompt][::-1] for example in examples]
    common: list[int] = []
    for column in zip(*prompts, strict=False):
        if len(set(map(int, column))) > 1 or len(common) == MAX_INVOCATION:
            break
        common.append(int(column[0]))
    if not common:
        raise ValueError("the prompts end in different tokens: nothing they share could be an invocation")
    return tuple(reversed(common))


def load_kinds(engine: Engine, adapter: Adapter, invocation: tuple[int, ...]) -> list[str]:
    """Loads an adapter as a head of each kind.

    A shared head cannot have weights for k and v, so the `shared` one is loaded without them.

    Args:
        engine: the engine that is to serve the heads.
        adapter: the adapter.
        invocation: the tokens at which the `activated` head switches on.

    Returns:
        The names of the heads, in the order of KINDS.
    """
    for kind in KINDS:
        keep = LORA_TARGETS if kind == "shared" else tuple(adapter.weights)
        weights = {target: pair for target, pair in adapter.weights.items() if target in keep}
        tokens = invocation if kind == "activated" else ()
        engine.load_head(HeadConfig(f"check-{kind}", adapter.name, kind, tokens), weights)
    return [f"check-{kind}" for kind in KINDS]


def measure(engine: Engine, models: Sequence[str], examples: Sequence[Example]) -> dict[str, KindReport]:
    """Measures the loss and the answers of each model on the same examples.

    Args:
        engine: the engine, already started.
        models: the names of the models; the others are compared with the last one.
        examples: the prompts with their completions.

    Returns:
        Model -> its report.
    """
    answers = {
        m: [_ask(engine, m, e.tokens[: e.num_prompt], len(e.tokens) - e.num_prompt) for e in examples] for m in models
    }
    scores = {m: [_ask(engine, m, e.tokens, 0) for e in examples] for m in models}
    truth = [future.result()[0] for future in answers[models[-1]]]
    return {m: _report(answers[m], scores[m], truth, examples) for m in models}


def recommend(reports: dict[str, KindReport]) -> tuple[str, str]:
    """Chooses the cheapest kind that is as good as `isolated`.

    Args:
        reports: the report of each of KINDS.

    Returns:
        The kind, and the reason in one sentence.
    """
    best = reports["isolated"]
    for kind in KINDS[:-1]:
        found = reports[kind]
        if found.loss <= best.loss + LOSS_MARGIN and found.match >= best.match - MATCH_MARGIN:
            return (
                kind,
                f"its loss is {found.loss:.3f}, isolated's {best.loss:.3f}; it answers {found.match:.0%} exactly",
            )
    lost = reports["shared"]
    return (
        "isolated",
        f"shared costs it {lost.loss - best.loss:.3f} nats a token, {best.match - lost.match:.0%} of the answers",
    )


Answer = tuple[list[int], list[float]]  # the generated tokens, and the log-probabilities of the prompt's tokens


def _ask(engine: Engine, model: str, tokens: np.ndarray, max_tokens: int) -> Future[Answer]:
    """Asks for `max_tokens` greedy tokens after `tokens`. If that is 0, asks for the log-probabilities of `tokens`."""
    future: Future[Answer] = Future()
    generated: list[int] = []
    scores: list[float] = []

    def on_output(index: int, output: TokenOutput) -> None:
        generated.extend(output.token_ids)
        scores.extend(p.logprob for p in (output.prompt_logprobs or ())[1:] if p is not None)
        if output.finish_reason:
            future.set_result((generated, scores))

    score = None if max_tokens else 0
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, prompt_logprobs=score)
    engine.submit(Request((model,), tuple(tokens.tolist()), params), on_output)
    return future


def _report(
    answers: list[Future[Answer]], scores: list[Future[Answer]], truth: list[list[int]], examples: Sequence[Example]
) -> KindReport:
    mine = [future.result()[0] for future in answers]
    completions = [example.tokens[example.num_prompt :].tolist() for example in examples]
    loss = [-sum(future.result()[1][e.num_prompt - 1 :]) for future, e in zip(scores, examples, strict=True)]
    agreed = sum(_common(a, b) for a, b in zip(mine, truth, strict=True))
    same = sum(a == b for a, b in zip(mine, completions, strict=True))
    return KindReport(sum(loss) / sum(map(len, completions)), agreed / sum(map(len, truth)), same / len(examples))


def _common(a: list[int], b: list[int]) -> int:
    """Counts the tokens before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def table(reports: dict[str, KindReport], write: Callable[[str], None]) -> None:
    """Writes the reports as a table.

    Args:
        reports: the report of each kind.
        write: takes one line of the table at a time.
    """
    write(f"{'kind':<10} {'loss':>8} {'agreement':>10} {'exact':>7}")
    for kind, r in reports.items():
        write(f"{kind:<10} {r.loss:>8.4f} {r.agreement:>10.1%} {r.match:>7.1%}")
