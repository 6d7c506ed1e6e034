"""Live handoff: the generated text decides which model generates the next token. Host only: no jax."""

from __future__ import annotations

from collections.abc import Sequence

from icarus_jax.scheduling.request import SamplingParams
from icarus_jax.server.agent_fields import HandoffRule
from icarus_jax.server.detokenizer import Detokenizer, Vocabulary


class Handoff:
    """Watches one choice's tokens and applies the handoff rules. The cost per token does not grow with the length.

    A rule's text may be spread over several tokens. It is searched for in the generated text that the client sees, not
    in the prompt. Each occurrence counts once, and occurrences do not overlap. If one token completes several rules, a
    rule on the token's id wins over rules on text. Of the rules on text, the one whose text ends last wins, and of two
    that end at the same character, the one with the longer text.
    """

    def __init__(
        self,
        rules: Sequence[HandoffRule],
        vocabulary: Vocabulary,
        skip_special_tokens: bool,
        prompt_ids: Sequence[int],
    ):
        """Begins to watch a choice that has generated no token yet.

        Args:
            rules: the handoff rules of the request.
            vocabulary: gives the bytes of each token.
            skip_special_tokens: whether special tokens are left out of the text that the client sees.
            prompt_ids: the prompt's token ids; the prompt may end within a character.
        """
        self._text = Detokenizer(vocabulary, SamplingParams(), skip_special_tokens, prompt_ids)
        self._of_token = {rule.on: rule.model for rule in rules if isinstance(rule.on, int)}
        of_text = {rule.on: rule.model for rule in rules if isinstance(rule.on, str)}
        finders = sorted((finder for finder, _ in vocabulary.finders(tuple(of_text))), key=lambda f: len(f.text))
        self._of_text = [(finder, of_text[finder.text]) for finder in finders]

    def __call__(self, token_id: int) -> str | None:
        """Takes a generated token in.

        Args:
            token_id: the token that the choice has just generated.

        Returns:
            The model that generates the next token, if a rule names one; else None.
        """
        model = None
        text = self._text.push([token_id]) if self._of_text else ""
        for char in text:
            for finder, name in self._of_text:  # from the shortest text to the longest, so that the longest wins
                if finder.advance(char):
                    finder.matched = 0  # so that occurrences do not overlap
                    model = name
        return self._of_token.get(token_id, model)
