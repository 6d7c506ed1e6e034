"""Turns token ids into text, one token at a time. Host only: no jax.

A token stands for the same bytes whatever its neighbours are. This holds for byte-level BPE (GPT-2, Llama 3, Qwen) and
for SentencePiece with byte fallback (Llama 2). The bytes therefore go through an incremental UTF-8 decoder, and the
text through one automaton for each stop string. The cost per token does not grow with the length of the text.
"""

from __future__ import annotations

import codecs
import collections
import functools
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from icarus_jax.scheduling.request import SamplingParams
from icarus_jax.server.finder import Finder

log = logging.getLogger(__name__)

PREPARED = 32  # lists of texts whose finders are kept: more than threads that read requests
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
        self._prepared = functools.lru_cache(PREPARED)(self._prepare)
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

    def holds_special(self, text: str) -> bool:
        """Returns whether a text holds the whole text of a special token."""
        names = (self.token_bytes(token_id).decode(errors="replace") for token_id in self.special_ids)
        return any(name and name in text for name in names)

    def finders(self, texts: tuple[str, ...]) -> list[tuple[Finder, bool]]:
        """Returns what looks for texts in a new stream, and of each text whether it holds a special token.

        A request with many choices asks for the same texts again and again: their tables are made once.

        Args:
            texts: the texts, none of them empty.
        """
        return [(finder.afresh(), special) for finder, special in self._prepared(texts)]

    def _prepare(self, texts: tuple[str, ...]) -> list[tuple[Finder, bool]]:
        return [(Finder(text), self.holds_special(text)) for text in texts]

    def prompt_text(self, ids: Sequence[int], skip_special_tokens: bool = True) -> tuple[str, list[int]]:
        """Makes the text of a prompt that came as token ids. An unfinished character at its end is dropped.

        Args:
            ids: the prompt's token ids.
            skip_special_tokens: whether special tokens are left out of the text.

        Returns:
            The text, and for each token the offset at which it starts in the text, in characters.
        """
        detokenizer = Detokenizer(self, SamplingParams(), skip_special_tokens)
        parts, offsets = [], []
        for token_id in ids:
            parts.append(detokenizer.push([token_id]))
            offsets.append(detokenizer.start)
        text = "".join(parts)
        if not self.byte_level and text.startswith(" "):  # SentencePiece puts a space before a prompt's first word
            text, offsets = text[1:], [max(0, offset - 1) for offset in offsets]
        return text, offsets


class Detokenizer:
    """Makes text of one choice's generated tokens, and looks for stop strings in it.

    It returns whole characters only. It holds back text that could still become a stop string. The stop string that is
    completed first ends the text; if one character completes several, the longest does. The tokens up to number
    `params.min_tokens` do not complete one. A stop string that holds a special token is looked for in the text as it
    would be if no token were hidden; any other, in the text that the client sees.

    Attributes:
        stopped: the stop string that ended the text, or None.
        length: how many characters have been decoded so far, those held back included.
        start: where the newest token starts in the text, in characters. A hidden token has no width.
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
                character, or without it if the output does not go on with it.
        """
        self.stopped: str | None = None
        self.length = 0
        self.start = 0
        self._vocabulary = vocabulary
        self._params = params
        self._hidden = vocabulary.special_ids if skip_special_tokens else frozenset[int]()
        self._stops = vocabulary.finders(params.stop)
        longest = max((len(stop.text) for stop, in_all in self._stops if in_all), default=0)
        self._shown = collections.deque[bool](maxlen=longest)  # of the last characters, hidden ones too: is it shown?
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._count = 0
        self._decoder.decode(self._end_of(prompt_ids))
        self._in_prompt = bool(self._decoder.getstate()[0])  # whether the unfinished character begins in the prompt

    def _end_of(self, prompt_ids: Sequence[int]) -> bytes:
        end = b""
        for token_id in reversed(prompt_ids):
            if len(end) >= 3:  # an unfinished character has no more bytes
                break
            if token_id not in self._hidden:
                end = self._vocabulary.token_bytes(token_id) + end
        return end

    def _decode(self, raw: bytes) -> str:
        """Decodes the bytes of a shown token, and adds what comes of it to the text."""
        begun = self._decoder.getstate()[0]
        text = self._decoder.decode(raw)
        if begun and text:
            if not (begun + raw).startswith(text[0].encode()):  # the begun character is broken: text[0] is U+FFFD
                if self._in_prompt:
                    text = text[1:]
                elif codecs.utf_8_decode(begun + raw[:1], "replace")[0]:  # none of this token's bytes are part of it
                    self.start += 1
            self._in_prompt = False
        self._held += text
        self.length += len(text)
        return text

    def push(self, token_ids: Iterable[int], hide: bool = False) -> str:
        """Takes generated tokens in.

        Args:
            token_ids: the next tokens.
            hide: whether to leave them out of the text, as special tokens may be.

        Returns:
            The text that is certain now; '' once a stop string has ended the text.
        """
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self._count += 1
            raw = self._vocabulary.token_bytes(token_id)
            self.start = self.length
            if hide or token_id in self._hidden:
                self._scan(raw.decode(errors="replace"), shown=False)
            else:
                self._scan(self._decode(raw), shown=True)
        if self.stopped is not None:
            return self._release(0)
        return self._release(max((self._num_shown(stop.matched, in_all) for stop, in_all in self._stops), default=0))

    def finish(self) -> str:
        """Ends the text and returns what was held back. An unfinished character is dropped."""
        return self._release(0)

    def _num_shown(self, count: int, in_all: bool) -> int:
        """Returns how many of the last `count` characters are shown, if hidden ones are counted (`in_all`)."""
        return sum(itertools.islice(reversed(self._shown), count)) if in_all else count

    def _scan(self, text: str, shown: bool) -> None:
        """Looks for stop strings in a token's text. If one ends in it, cuts the held text there."""
        if not self._stops:
            return
        for i, char in enumerate(text):
            self._shown.append(shown)
            found = [pair for pair in self._stops if (shown or pair[1]) and pair[0].advance(char)]
            if found and self._count > self._params.min_tokens:
                stop, in_all = max(found, key=lambda pair: len(pair[0].text))
                num_shown = self._num_shown(len(stop.text), in_all)
                excess = num_shown + (len(text) - i - 1 if shown else 0)
                kept = stop.text if self._params.include_stop_str_in_output else ""
                self._held = self._held[: len(self._held) - excess] + kept
                self.length += len(kept) - excess
                if kept:  # tokens before this one were hidden, and are shown now
                    self.start += max(0, len(kept) - num_shown - (0 if shown else i + 1))
                self.stopped = stop.text
                return

    def _release(self, keep: int) -> str:
        """Returns the held text but for its last `keep` characters, which it goes on to hold."""
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text
