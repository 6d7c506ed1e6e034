"""The text of a choice, as the client sees it, against a plain decoding and a plain search of the whole output."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest

from icarus_jax.scheduling.request import SamplingParams, TokenLogprob, TokenOutput
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.prompts import Prompt
from icarus_jax.server.streams import Choice, Delta, echo_of
from tests import doubles

TOKENIZERS = {"byte_level": doubles.byte_level_tokenizer(), "byte_fallback": doubles.byte_fallback_tokenizer()}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)
STRAY = {"byte_level": ["ð", "Ł", "Ļ", "Ĥ", "Ã"], "byte_fallback": ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "<0xC3>"]}


def pool(kind: str) -> list[int]:
    """Ids to draw streams from: letters, spaces, whole and broken characters, special tokens, one id of no token."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("Hello é\n", add_special_tokens=False) + tokenizer.convert_tokens_to_ids(STRAY[kind])
    return [*ids, *tokenizer.all_special_ids, len(tokenizer)]


@dataclasses.dataclass
class Case:
    """A request and the tokens that the engine answers with."""

    kind: str
    prompt: Prompt
    ids: list[int]
    skip: bool
    echo: bool
    ends: str  # 'length'; 'stop' by the last token: 'eos' or 'stop token'
    params: SamplingParams
    sizes: list[int]

    def hidden(self, i: int) -> bool:
        last = self.ends != "length" and i == len(self.ids) - 1 and not self.params.include_stop_str_in_output
        return last or (self.skip and self.ids[i] in VOCABULARIES[self.kind].special_ids)

    def run(self) -> list[Delta]:
        """What a choice makes of it, output by output."""
        eos = frozenset(self.ids[-1:]) if self.ends == "eos" else frozenset()
        vocabulary = VOCABULARIES[self.kind]
        echo = echo_of(self.prompt, self.params, vocabulary, self.skip) if self.echo else None
        choice = Choice(0, "m", self.prompt, self.params, vocabulary, eos, self.skip, echo)
        scores = [None, *(TokenLogprob(i, -1.0) for i in self.prompt.ids[1:])]
        deltas, done = [], 0
        while not choice.finish_reason:
            new = self.ids[done : done + self.sizes[len(deltas)]]
            done += len(new)
            output = TokenOutput(0, new, "m", [TokenLogprob(i, -0.5) for i in new])
            if not deltas:
                output.prompt_logprobs = scores
            if done == len(self.ids):
                output.finish_reason = "length" if self.ends == "length" else "stop"
            deltas.append(choice.feed(output))
        return deltas


@dataclasses.dataclass
class Char:
    text: str
    start: int  # of its first byte
    known: int  # the byte that decides it
    broken: bool


def characters(data: bytes) -> tuple[list[Char], int]:
    """Cuts bytes into characters, of which some are broken; and where an unfinished one begins."""
    found, at = [], 0
    while at < len(data):
        try:
            text, bad = data[at:].decode(), None
        except UnicodeDecodeError as error:
            text, bad = data[at : at + error.start].decode(), error
        for char in text:
            found.append(Char(char, at, at + len(char.encode()) - 1, False))
            at += len(char.encode())
        if bad is not None and bad.reason == "unexpected end of data":
            break
        if bad is not None:
            end = at + bad.end - bad.start
            found.append(Char("\ufffd", at, end if "continuation" in bad.reason else end - 1, True))
            at = end
    return found, at


@dataclasses.dataclass
class Wanted:
    text: str = ""
    stop: str | None = None
    offsets: list[int] = dataclasses.field(default_factory=list)
    read: int = 0  # tokens up to the stop


def wanted(case: Case) -> Wanted:
    """The output's text: everything is decoded at once, and each stop string is tried at each character's end."""
    vocabulary = VOCABULARIES[case.kind]
    begun = b"".join(
        vocabulary.token_bytes(i) for i in case.prompt.ids if not case.skip or i not in vocabulary.special_ids
    )
    raw = [b"" if case.hidden(i) else vocabulary.token_bytes(t) for i, t in enumerate(case.ids)]
    chars, unfinished = characters(begun + b"".join(raw))
    chars = [c for c in chars if c.start >= len(begun) or (c.known >= len(begun) and not c.broken)]
    want, everything, shown, at = Wanted(), "", "", len(begun)
    marks = ""  # one for each character of `everything`: S if it is shown, else H
    specials = TOKENIZERS[case.kind].all_special_tokens
    for i, token_id in enumerate(case.ids):
        want.read = i + 1
        end = at + len(raw[i])
        before = sum(c.known < at for c in chars)
        known = [c for c in chars if at <= c.known < end]
        if case.hidden(i) or not raw[i]:
            want.offsets.append(before)
        else:
            of_token = max((k for k, c in enumerate(chars) if c.start <= at), default=0)
            want.offsets.append(len(chars) if at >= unfinished else of_token)
        new = (
            vocabulary.token_bytes(token_id).decode(errors="replace")
            if case.hidden(i)
            else "".join(c.text for c in known)
        )
        for char in new:
            everything += char
            marks += "H" if case.hidden(i) else "S"
            shown += "" if case.hidden(i) else char
            found = []
            for stop in case.params.stop:
                if any(special in stop for special in specials):
                    if everything.endswith(stop):
                        found.append((len(stop), stop, marks[-len(stop) :].count("S")))
                elif marks[-1] == "S" and shown.endswith(stop):
                    found.append((len(stop), stop, len(stop)))
            if found and i >= case.params.min_tokens:
                _, want.stop, width = max(found)
                shown = shown[: len(shown) - width]
                want.text = shown + (want.stop if case.params.include_stop_str_in_output else "")
                return want
        at = end
    want.text = shown
    return want


@st.composite
def cases(draw, kind: str) -> Case:
    tokenizer = TOKENIZERS[kind]
    ids = draw(st.lists(st.sampled_from(pool(kind)), min_size=1, max_size=12))
    if draw(st.booleans()):
        parts = ["Hello", " ", "é", "🙂", "\n", *tokenizer.all_special_tokens]
        text = "".join(draw(st.lists(st.sampled_from(parts), min_size=1, max_size=8)))
        prompt = Prompt(tuple(tokenizer.encode(text)), text, "prompt")
    else:
        prompt = Prompt(tuple(draw(st.lists(st.sampled_from(pool(kind)), min_size=1, max_size=6))), None, "prompt")
    whole = "".join(VOCABULARIES[kind].token_bytes(i).decode(errors="ignore") for i in ids) or "H"
    slices = st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 16)).map(lambda p: whole[p[0] : p[0] + p[1]])
    stops = draw(st.lists(slices | st.sampled_from([*tokenizer.all_special_tokens, "el"]), max_size=3))
    params = SamplingParams(
        max_tokens=len(ids),
        min_tokens=draw(st.integers(0, len(ids))),
        stop=tuple(stops),
        include_stop_str_in_output=draw(st.booleans()),
        logprobs=0,
    )
    ends = draw(st.sampled_from(["length", "eos", "stop token"]))
    if ends == "stop token":
        params = dataclasses.replace(params, stop_token_ids=(ids[-1],))
    if ends != "length":  # the engine does not stop before
        hypothesis.assume(ids[-1] not in ids[:-1])
    sizes = draw(st.lists(st.integers(1, 3), min_size=len(ids), max_size=len(ids)))
    return Case(kind, prompt, ids, draw(st.booleans()), draw(st.booleans()), ends, params, sizes)


@KINDS
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=400, deadline=None)
def test_a_choice_against_plain_decoding_and_search(kind, data):
    case = data.draw(cases(kind))
    deltas, want = case.run(), wanted(case)
    whole = Delta.join(deltas)
    base = 0
    if case.echo:
        shown = case.prompt.text
        if shown is None:
            chars, _ = characters(
                b"".join(
                    VOCABULARIES[kind].token_bytes(i)
                    for i in case.prompt.ids
                    if not case.skip or i not in VOCABULARIES[kind].special_ids
                )
            )
            shown = "".join(c.text for c in chars)
            if kind == "byte_fallback":
                shown = shown.removeprefix(" ")
        base = len(shown)
        assert whole.text[:base] == shown
    assert whole.text[base:] == want.text
    if want.stop is not None:
        assert (whole.finish_reason, whole.stop_reason) == ("stop", want.stop)
        assert len(whole.token_ids) == want.read
    else:
        assert whole.finish_reason == ("length" if case.ends == "length" else "stop")
        assert whole.stop_reason == (case.ids[-1] if case.ends == "stop token" else None)
    offsets = [entry.offset for entry in whole.scored[len(case.prompt.ids) if case.echo else 0 :]]
    assert offsets[:-1] == [base + at for at in want.offsets[: want.read - 1]]
    if want.stop is None or not case.params.include_stop_str_in_output:
        assert offsets == [base + at for at in want.offsets[: want.read]]


@KINDS
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=200, deadline=None)
def test_echoed_tokens_are_where_their_offsets_say(kind, data):
    case = dataclasses.replace(data.draw(cases(kind)), echo=True)
    whole = Delta.join(case.run())
    vocabulary = VOCABULARIES[kind]
    for i, entry in enumerate(whole.scored[: len(case.prompt.ids)]):
        name = vocabulary.token_bytes(entry.token_id)
        special = entry.token_id in vocabulary.special_ids
        if (special and case.prompt.text is None and case.skip) or max(name[:1], name[-1:]) >= b"\x80":
            continue  # hidden, or a part of a character
        text = whole.text[entry.offset :].encode()
        added = name.startswith(b" ") and kind == "byte_fallback"  # by the tokenizer, at the start of a piece of text
        assert text.startswith(name) or (added and text.startswith(name[1:])), (i, name, text)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=200, deadline=None)
def test_prompt_and_output_are_what_decode_gives(data):
    case = data.draw(cases("byte_level"))
    params = SamplingParams(max_tokens=len(case.ids), logprobs=0)
    prompt = dataclasses.replace(case.prompt, text=None)
    case = dataclasses.replace(case, prompt=prompt, params=params, ends="length", echo=True)
    whole = Delta.join(case.run()).text
    theirs = TOKENIZERS["byte_level"].decode(
        [*prompt.ids, *case.ids], skip_special_tokens=case.skip, clean_up_tokenization_spaces=False
    )
    shown = TOKENIZERS["byte_level"].decode(
        list(prompt.ids), skip_special_tokens=case.skip, clean_up_tokenization_spaces=False
    )
    if shown.endswith("\ufffd"):  # a character that the prompt begins and the output does not finish is left out
        assert whole.replace("\ufffd", "") == theirs.replace("\ufffd", "")
    else:
        assert whole in (theirs, theirs.removesuffix("\ufffd"))
