"""Token ids to text, one token at a time. Host only: no jax.

A token is a fixed run of bytes, whatever its neighbours: the byte-level alphabet (GPT-2, Llama 3, Qwen) or
SentencePiece pieces with byte fallback (Llama 2). So text streams through an incremental UTF-8 decoder, at a cost
per token that does not grow with the length, and the stop strings through one automaton each.
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
    """The characters that byte-level BPE writes bytes as: printable ones as themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


class Vocabulary:
    """The bytes of every token of a Hugging Face fast tokenizer (byte-level BPE, or SentencePiece-like)."""

    def __init__(self, tokenizer: Any):
        pieces = tokenizer.get_vocab()
        self.tokenizer = tokenizer
        self.size = len(pieces)
        self.longest = max(map(len, pieces))  # characters; no text of more than n * longest fits in n tokens
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
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def piece(self, token_id: int) -> str:
        """The token as the tokenizer's vocabulary spells it; '' for an id that it does not have."""
        piece = self.tokenizer.convert_ids_to_tokens(token_id) if token_id >= 0 else None
        return piece or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for: not always whole characters."""
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
        r"""A token's name in log-probabilities: its text, or OpenAI's 'bytes:\xe2\x80' if that is no whole UTF-8."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def prompt_text(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """A prompt's text without special tokens, and the character offset at which each token starts."""
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
    """Finds one string in a stream of characters (Knuth, Morris and Pratt). `matched` is how much of it is seen."""

    def __init__(self, text: str):
        self.text = text
        self.matched = 0
        self._border = [0]  # of each prefix: its longest proper suffix that is a prefix too
        for char in text[1:]:
            self._border.append(self._next(char, self._border[-1]))

    def _next(self, char: str, matched: int) -> int:
        while matched and self.text[matched] != char:
            matched = self._border[matched - 1]
        return matched + (self.text[matched] == char)

    def advance(self, char: str) -> bool:
        """True if `char` completes the string; the next occurrence is looked for behind this one."""
        self.matched = self._next(char, self.matched)
        if self.matched < len(self.text):
            return False
        self.matched = 0
        return True


class Detokenizer:
    """The text of one stream of generated tokens.

    Text comes out as whole characters, and never a part of a stop string: what could still become one is held back.
    The stop string completed first ends the text (of several, the longest). `prompt_ids` lets a character begun in
    the prompt be finished. Stop strings within the first `params.min_tokens` tokens do not count.

    stopped: the stop string found, or None. length: characters decoded so far, those held back included.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        params: SamplingParams,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ):
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
        """The text that these tokens make certain; '' after a stop."""
        for token_id in token_ids:
            if self.stopped is not None:
                break
            text = self._decode(token_id)
            self._held += text
            self.length += len(text)
            self._count += 1
            if self._stops and self._count > self._params.min_tokens:
                self._scan(text)
        return self._release(0 if self.stopped is not None else max((s.matched for s in self._stops), default=0))

    def finish(self) -> str:
        """The text still held back, at the end of the stream. An unfinished character is dropped."""
        return self._release(0)

    def _scan(self, text: str) -> None:
        for i, char in enumerate(text):
            found = [stop.text for stop in self._stops if stop.advance(char)]
            if found:
                self.stopped = max(found, key=len)
                excess = len(text) - i - 1 + (0 if self._params.include_stop_str_in_output else len(self.stopped))
                self._held = self._held[: len(self._held) - excess]
                self.length -= excess
                return

    def _release(self, keep: int) -> str:
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text
