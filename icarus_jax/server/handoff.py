"""Live handoff: which model goes on, decided from what a choice has generated so far. Host only: no jax."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from icarus_jax.scheduling.request import SamplingParams
from icarus_jax.server.agent_fields import HandoffRule
from icarus_jax.server.detokenizer import Detokenizer, Finder, Vocabulary


class Handoff:
    """Watches one choice's tokens, at a cost per token that does not grow with the length.

    A rule's text is looked for in the text that the client sees, wherever tokens cut it, and not in the prompt; each
    occurrence counts once, and two do not overlap. If one token completes several rules, its own id goes before any
    text, what ends later in the text before what ends earlier, and of two that end together the longer text.
    """

    def __init__(
        self,
        rules: Iterable[HandoffRule],
        vocabulary: Vocabulary,
        skip_special_tokens: bool,
        prompt_ids: Sequence[int],
    ):
        self._text = Detokenizer(vocabulary, SamplingParams(), skip_special_tokens, prompt_ids)
        self._of_token: dict[int, str] = {}
        self._of_text: list[tuple[Finder, str]] = []
        for rule in rules:
            if isinstance(rule.on, str):
                self._of_text.append((Finder(rule.on), rule.model))
            else:
                self._of_token[rule.on] = rule.model
        self._of_text.sort(key=lambda pair: len(pair[0].text))

    def __call__(self, token_id: int) -> str | None:
        """Takes in a generated token; returns the model that goes on behind it if a rule says so."""
        model = None
        for char in self._text.push([token_id]) if self._of_text else "":
            for finder, name in self._of_text:  # the longest last
                if finder.advance(char):
                    model = name
        return self._of_token.get(token_id, model)
