"""Tokens to text: what a tokenizer's own decode() gives, streamed, and stop strings wherever tokens are cut."""

from __future__ import annotations

import logging
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from icarus_jax.scheduling.request import SamplingParams
from icarus_jax.server.detokenizer import Detokenizer, Vocabulary
from tests import doubles

TOKENIZERS = {"byte_level": doubles.byte_level_tokenizer(), "byte_fallback": doubles.byte_fallback_tokenizer()}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}
BYTES = VOCABULARIES["byte_level"]
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)
TEXTS = ["Hello, world! How are you?", "naïve café", "日本語 🙂🙂 mixed", "  two  spaces\n\ttab", "e\u0301 \u200b zero"]


def pieces_of(kind: str, text: str) -> list[int]:
    return TOKENIZERS[kind].encode(text, add_special_tokens=False)


def stream(vocabulary: Vocabulary, ids: list[int], **params) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(vocabulary, SamplingParams(max_tokens=10**6, **params))
    return [*(detokenizer.push([i]) for i in ids), detokenizer.finish()], detokenizer


@KINDS
@pytest.mark.parametrize("text", TEXTS)
def test_streams_the_text_in_whole_characters(kind, text):
    ids = pieces_of(kind, text)
    parts, _ = stream(VOCABULARIES[kind], ids)
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts).removeprefix(" " if kind == "byte_fallback" else "") == text
    assert len(ids) > len(text.split())  # pieces, not words: the test cuts something


@KINDS
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_ids_give_what_decode_gives(kind, data):
    """Invalid UTF-8 and special tokens included; an unfinished character at the end is dropped."""
    tokenizer = TOKENIZERS[kind]
    # transformers' byte fallback gives a whole run of bytes up if one is bad: leave bytes above 127 to the test above.
    known = [i for i in range(len(tokenizer)) if kind == "byte_level" or not 3 + 128 <= i < 3 + 256]
    ids = data.draw(st.lists(st.sampled_from(known), max_size=30))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(VOCABULARIES[kind], SamplingParams(), skip)
    text = "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish()
    theirs = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    if kind == "byte_fallback":  # the space at the start is the prompt's, not the output's
        text = text.removeprefix(" ")
    assert text == theirs or text == theirs.removesuffix("\ufffd")


def test_a_character_begun_in_the_prompt_is_finished():
    ids = [BYTES.tokenizer.convert_tokens_to_ids(c) for c in "ðŁĻĤ"]  # the four bytes of U+1F642
    detokenizer = Detokenizer(BYTES, SamplingParams(), prompt_ids=ids[:2])
    assert [detokenizer.push([i]) for i in ids[2:]] == ["", "🙂"]


def test_an_unfinished_character_is_dropped():
    ids = [BYTES.tokenizer.convert_tokens_to_ids(c) for c in "ðŁĻ"]
    assert "".join(stream(BYTES, ids)[0]) == ""


def test_stop_string_over_token_borders():
    text = "The quick brown fox jumps over"
    ids = pieces_of("byte_level", text)
    stop = "own fox j"
    pieces = [BYTES.token_text(i) for i in ids]
    assert not any(stop in piece for piece in pieces)  # it does cross borders
    parts, detokenizer = stream(BYTES, ids, stop=(stop,))
    assert "".join(parts) == "The quick br"
    assert detokenizer.stopped == stop
    assert detokenizer.length == len("The quick br")
    parts, _ = stream(BYTES, ids, stop=(stop,), include_stop_str_in_output=True)
    assert "".join(parts) == "The quick brown fox j"


def test_nothing_follows_a_stop():
    detokenizer = Detokenizer(BYTES, SamplingParams(stop=("fox",)))
    ids = pieces_of("byte_level", "a fox jumps")
    assert detokenizer.push(ids) + detokenizer.push(ids) + detokenizer.finish() == "a "


def test_a_near_miss_is_held_back_and_then_given():
    ids = [i for char in "abcab" for i in pieces_of("byte_level", char)]
    parts, _ = stream(BYTES, ids, stop=("abcabd",))
    assert parts == ["", "", "", "", "", "abcab"]
    ids += [i for char in "cabd" for i in pieces_of("byte_level", char)]
    parts, _ = stream(BYTES, ids, stop=("abcabd",))  # the match starts inside the near miss
    assert "".join(parts) == "abc"


def test_min_tokens_puts_the_stop_off():
    ids = [i for char in "xaxa" for i in pieces_of("byte_level", char)]
    assert "".join(stream(BYTES, ids, stop=("a",))[0]) == "x"
    assert "".join(stream(BYTES, ids, stop=("a",), min_tokens=2)[0]) == "xax"


@hypothesis.given(
    chars=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    include=st.booleans(),
    sizes=st.lists(st.integers(1, 4), min_size=40, max_size=40),
)
@hypothesis.example(chars="cab", stops=["b", "ab"], include=False, sizes=[1] * 40)
@hypothesis.settings(max_examples=300, deadline=None)
def test_stops_do_not_depend_on_how_the_text_is_cut(chars, stops, include, sizes):
    """Against a plain search of the whole text, whatever runs of tokens come at once; no text is ever taken back."""
    ends = [(chars.find(s) + len(s), -len(s), s) for s in stops if s in chars]
    wanted = chars
    if ends:
        end, _, stop = min(ends)
        wanted = chars[:end] if include else chars[: end - len(stop)]
    ids = [BYTES.tokenizer.convert_tokens_to_ids(c) for c in chars]
    params = SamplingParams(stop=tuple(stops), include_stop_str_in_output=include)
    detokenizer = Detokenizer(BYTES, params)
    got = ""
    for size in sizes:
        got += detokenizer.push(ids[:size])
        assert wanted.startswith(got)
        ids = ids[size:]
    got += detokenizer.finish()
    assert got == wanted
    assert detokenizer.length == len(wanted)
    assert detokenizer.stopped == (stop if ends else None)


def test_the_cost_of_a_token_does_not_grow():
    """Counted in function calls, which a busy machine does not change."""
    ids = pieces_of("byte_level", "The quick brown fox jumps<|im_start|>. " * 20)
    detokenizer = Detokenizer(BYTES, SamplingParams(stop=("zebra", "mps<|im_end|>")))

    def calls() -> int:
        count = 0

        def on_event(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(on_event)
        try:
            detokenizer.push(ids)
        finally:
            sys.setprofile(None)
        return count

    calls()  # fills the vocabulary's cache
    first = calls()
    for _ in range(200):
        detokenizer.push(ids)
    assert calls() == first
    assert len(detokenizer._held) < len("zebra")
    assert len(detokenizer._shown) == len("mps<|im_end|>")


def test_names_of_tokens():
    half = BYTES.tokenizer.convert_tokens_to_ids("ð")
    assert BYTES.token_text(half) == "bytes:\\xf0"
    assert BYTES.token_text(pieces_of("byte_level", " ")[0]) == " "
    fallback = VOCABULARIES["byte_fallback"]
    assert fallback.token_text(3 + 0xF0) == "bytes:\\xf0"
    assert fallback.token_text(pieces_of("byte_fallback", "Hello")[0]) == " Hello"
    assert BYTES.token_text(10**6) == ""  # a trunk's padded vocabulary has ids that the tokenizer lacks


@KINDS
def test_prompt_text_and_offsets(kind):
    vocabulary, text = VOCABULARIES[kind], "Hello world"
    ids = pieces_of(kind, text)
    got, offsets = vocabulary.prompt_text(ids)
    assert got == text
    names = [vocabulary.token_text(i) for i in ids]
    assert offsets[0] == 0
    assert all(text[at:].startswith(name) for at, name in zip(offsets[1:], names[1:], strict=True))
    assert vocabulary.prompt_text([vocabulary.tokenizer.eos_token_id, *ids])[1][:2] == [0, 0]  # hidden, of no width


def test_an_unknown_decoder_is_reported(caplog):
    tokenizer = doubles.byte_level_tokenizer()
    with caplog.at_level(logging.WARNING):
        Vocabulary(tokenizer)
    assert not caplog.records
    tokenizer.backend_tokenizer.decoder = doubles.decoders.WordPiece()
    with caplog.at_level(logging.WARNING):
        Vocabulary(tokenizer)
    assert "decoder" in caplog.text
