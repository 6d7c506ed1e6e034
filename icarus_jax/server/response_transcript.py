"""The tokens of a conversation as they were read and written, so that its next turn has the same ones.

What a model wrote would often become other tokens if its text were encoded anew: the cache would not know them. The
template renders the whole conversation each turn. As far as its text is that of the turns before, the tokens of those
are taken; only the rest is encoded.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable

from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.prompts import Prompt, PromptReader
from icarus_jax.server.protocol import ChatRequest


@dataclasses.dataclass(frozen=True)
class Transcript:
    """What a conversation's models have read and written.

    Attributes:
        text: the last prompt and its answer.
        ids: their tokens, without the one that ended the answer.
        ends: how many characters and tokens there were at the end of each answer.
    """

    text: str = ""
    ids: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    ends: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        """The bytes that it takes, about."""
        return len(self.text.encode(errors="replace")) + self.ids.itemsize * len(self.ids)

    def beginning_of(self, text: str, vocabulary: Vocabulary) -> Transcript:
        """Returns the longest part that a text begins with: up to the end of an answer, or nothing.

        A special token must follow there. Everywhere else a tokenizer might join what comes before and after.
        """
        special = tuple(filter(None, (vocabulary.piece(token_id) for token_id in vocabulary.special_ids)))
        for i, (characters, tokens) in reversed(list(enumerate(self.ends, 1))):
            if text.startswith(self.text[:characters]) and text.startswith(special, characters):
                return Transcript(self.text[:characters], self.ids[:tokens], self.ends[:i])
        return Transcript()

    def read_on(self, chat: ChatRequest, reader: PromptReader) -> tuple[Prompt, Transcript]:
        """Reads the conversation's next turn.

        Args:
            chat: the whole conversation.
            reader: renders and encodes it.

        Returns:
            The prompt, and the part of this transcript that it begins with.

        Raises:
            ApiError: the reader refuses the conversation.
        """
        text = reader.render(chat)
        kept = self.beginning_of(text, reader.vocabulary)
        rest = reader.read(text[len(kept.text) :], "messages", chat.add_special_tokens)
        return Prompt((*kept.ids, *rest.ids), text, "messages"), kept

    def with_answer(self, prompt: Prompt, text: str, ids: Iterable[int]) -> Transcript:
        """Returns the transcript after a turn whose prompt began with this one.

        Args:
            prompt: the turn's prompt.
            text: the text of the answer.
            ids: its tokens, without the one that ended it.
        """
        whole, tokens = (prompt.text or "") + text, array("i", (*prompt.ids, *ids))
        return Transcript(whole, tokens, (*self.ends, (len(whole), len(tokens))))
