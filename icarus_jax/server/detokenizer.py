"""Turns token ids into text, one token at a time. Host only: no jax.

A token stands for the same bytes whatever its neighbours are. This holds for byte-level BPE (GPT-2, Llama 3, Qwen) and
for SentencePiece with byte fallback (Llama 2). The bytes therefore go through an incremental UTF-8 decoder, and the
text through one automaton for each stop string. The cost per token does not grow with the length of the text.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from icarus_jax.scheduling.request import SamplingParams

log = logging.getLogger(__name__)

SPACE_PIECE = "\u2581"  # SentencePiece's mark for a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PROBE = "Hello, world! caf\u00e9 \u65e5\u672c\u8a9e \U0001f642\n  x = 1"


def _byte_alphabet() -> dict[str, int]:
    """Maps byte-level BPE's characters to bytes. A printable byte stands for itself; others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class Vocabulary:
    """A Hugging Face fast tokenizer (byte-level BPE or SentencePiece-like), and the bytes of its tokens.

    Attributes:
        tokenizer: the Hugging Face tokenizer.
        size: how many tokens it has.
        longest: characters of the longest token; n tokens hold at most n * longest characters of text.
        special_ids: the ids of its special tokens.
        byte_level: whether it is byte-level BPE.
    """

    def __init__(self, tokenizer: Any):
        """Reads the vocabulary. Logs a warning if `token_bytes` does not agree with the tokenizer's own decoder.

        Args:
            tokenizer: the Hugging Face fast tokenizer.
        """
        pieces = tokenizer.get_vocab()
        self.tokenizer = tokenizer
        self.size = len(pieces)
        self.longest = max(map(len, pieces))
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.byte_level = SPACE_PIECE not in pieces and "\u0120" in pieces
        self._alphabet = _byte_alphabet() if self.byte_level else {}
        self._bytes: dict[int, bytes] = {}
        self._check()

    def _check(self) -> None:
        ids = self.tokenizer.encode(_PROBE, add_special_tokens=False)
        theirs = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if b"".join(map(self.token_bytes, ids)).decode(errors="replace").strip() != theirs.strip():
            log.warning("this tokenizer's decoder is of an unknown kind: streamed text may differ from decode()")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text.

        Args:
            text: the text.
            add_special_tokens: whether the tokenizer adds its own tokens, such as BOS.
        """
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def piece(self, token_id: int) -> str:
        """Returns the token as the tokenizer's vocabulary spells it; '' if it has no such id."""
        piece = self.tokenizer.convert_ids_to_tokens(token_id) if token_id >= 0 else None
        return piece or ""

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token stands for. They need not be whole characters."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._make_bytes(self.piece(token_id))
        return known

    def _make_bytes(self, piece: str) -> bytes:
        if self.byte_level:
            values = [self._alphabet.get(char) for char in piece]
            return piece.encode() if None in values else bytes(v for v in values if v is not None)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE_PIECE, " ").encode()

    def token_text(self, token_id: int) -> str:
        r"""Returns the name of a token in log-probabilities: its text, or 'bytes:\xe2\x80' if it is not valid UTF-8."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def prompt_text(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """Returns the text of a prompt, without its special tokens.

        Args:
            ids: the prompt's token ids.

        Returns:
            The text, and for each token the offset at which it starts in the text, in characters.
        """
        detokenizer = Detokenizer(self, SamplingParams())
        parts, offsets = [], []
        for token_id in ids:
            offsets.append(detokenizer.length)
            parts.append(detokenizer.push([token_id]))
        text = "".join(parts)
        if not self.byte_level and text.startswith(" "):  # SentencePiece puts a space before a prompt's first word
            text, offsets = text[1:], [max(0, offset - 1) for offset in offsets]
        return text, offsets


class Finder:
    """Finds one string in a stream of characters, with the algorithm of Knuth, Morris and Pratt.

    Attributes:
        text: the string to find.
        matched: how many of its first characters the stream ends with so far.
    """

    def __init__(self, text: str):
        """Prepares the search.

        Args:
            text: the string to find; it must not be empty.
        """
        self.text = text
        self.matched = 0
        self._border = [0]  # of each prefix of `text`: the length of its longest proper suffix that is a prefix too
        for char in text[1:]:
            self._border.append(self._next(char, self._border[-1]))

    def _next(self, char: str, matched: int) -> int:
        while matched and self.text[matched] != char:
            matched = self._border[matched - 1]
        return matched + (self.text[matched] == char)

    def advance(self, char: str) -> bool:
        """Takes the next character of the stream in.

        Args:
            char: the character.

        Returns:
            True if it completes the string. The search then starts anew, so that occurrences do not overlap.
        """
        self.matched = self._next(char, self.matched)
        if self.matched < len(self.text):
            return False
        self.matched = 0
        return True


class Detokenizer:
    """Makes text of one choice's generated tokens, and looks for stop strings in it.

    It returns whole characters only. It holds back text that could still become a stop string. The stop string that is
    completed first ends the text; if one character completes several, the longest does. A stop string is not looked for
    in the first `params.min_tokens` tokens.

    Attributes:
        stopped: the stop string that ended the text, or None.
        length: how many characters have been decoded so far, those held back included.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        params: SamplingParams,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ):
        """Begins a text.

        Args:
            vocabulary: gives the bytes of each token.
            params: names the stop strings.
            skip_special_tokens: whether special tokens are left out of the text.
            prompt_ids: the prompt's token ids. If the prompt ends within a character, the text begins with that
                character.
        """
        self.stopped: str | None = None
        self.length = 0
        self._vocabulary = vocabulary
        self._params = params
        self._hidden = vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        self._stops = [Finder(text) for text in params.stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._count = 0
        for token_id in prompt_ids[-4:]:  # no character has more than four bytes
            self._decode(token_id)

    def _decode(self, token_id: int) -> str:
        return "" if token_id in self._hidden else self._decoder.decode(self._vocabulary.token_bytes(token_id))

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes generated tokens in.

        Args:
            token_ids: the next tokens.

        Returns:
            The text that is certain now; '' once a stop string has ended the text.
        """
        for token_id in token_ids:
            if self.stopped is not None:
                break
            text = self._decode(token_id)
            self._held += text
            self.length += len(text)
            self._count += 1
            if self._stops and self._count > self._params.min_tokens:
                self._scan(text)
        if self.stopped is not None:
            return self._release(0)
        return self._release(max((stop.matched for stop in self._stops), default=0))

    def finish(self) -> str:
        """Ends the text and returns what was held back. An unfinished character is dropped."""
        return self._release(0)

    def _scan(self, text: str) -> None:
        """Looks for stop strings in the newest text. If one ends in it, cuts the held text there."""
        for i, char in enumerate(text):
            found = [stop.text for stop in self._stops if stop.advance(char)]
            if found:
                self.stopped = max(found, key=len)
                excess = len(text) - i - 1 + (0 if self._params.include_stop_str_in_output else len(self.stopped))
                self._held = self._held[: len(self._held) - excess]
                self.length -= excess
                return

    def _release(self, keep: int) -> str:
        """Returns the held text but for its last `keep` characters, which it goes on to hold."""
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text
