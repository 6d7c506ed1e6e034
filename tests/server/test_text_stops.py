"""Stop strings of special tokens and within min_tokens, characters begun in the prompt, offsets: one case of each."""

from __future__ import annotations

import pytest
from tokenizers import processors

from icarus_jax.scheduling.request import SamplingParams
from icarus_jax.server.detokenizer import Detokenizer, Vocabulary
from icarus_jax.server.streams import offsets_in
from tests import doubles
from tests.server.served import EOS, TOKENIZER, ids_of, serving

BYTES = Vocabulary(TOKENIZER)
SMILE: list[int] = [TOKENIZER.convert_tokens_to_ids(c) for c in "ðŁĻĤ"]  # the four bytes of U+1F642
(END,) = ids_of("<|endoftext|>")


def answer(output: list[int], eos_ids: tuple[int, ...] = (), **fields) -> dict:
    """What the client gets if the model says `output` (by repeating its prompt), whole; it is the same streamed."""
    with serving(eos_ids=eos_ids) as served:
        request = {"model": "parrot", "prompt": output, "max_tokens": len(output), "temperature": 0, **fields}
        whole = served.complete(**request)["choices"][0]
        parts = [c.choices[0] for c in served.openai.completions.create(**_openai(request), stream=True)]
    assert "".join(part.text for part in parts) == whole["text"]
    assert (parts[-1].finish_reason, parts[-1].stop_reason) == (whole["finish_reason"], whole["stop_reason"])
    return whole


def _openai(request: dict) -> dict:
    known = {"model", "prompt", "max_tokens", "temperature", "stop", "logprobs"}
    mine = {name: value for name, value in request.items() if name in known}
    return mine | {"extra_body": {name: request[name] for name in request.keys() - known}}


@pytest.mark.parametrize("eos_ids", [(), (END,)])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_special_token_as_stop_string(eos_ids, skip, include):
    fields = {"skip_special_tokens": skip, "include_stop_str_in_output": include, "return_token_ids": True}
    got = answer([*ids_of("fox"), END, *ids_of("dog")], eos_ids, stop="<|endoftext|>", **fields)
    assert got["text"] == ("fox<|endoftext|>" if include else "fox")
    assert (got["finish_reason"], got["stop_reason"]) == ("stop", "<|endoftext|>")
    assert got["token_ids"] == [*ids_of("fox"), END]


def test_a_stop_string_with_a_special_token_in_it():
    output = [*ids_of("a fox"), EOS, *ids_of("\nb")]
    assert answer(output, stop="ox<|im_end|>\n")["text"] == "a f"
    got = answer(output, stop="ox<|im_end|>\n", include_stop_str_in_output=True, logprobs=0)
    assert got["text"] == "a fox<|im_end|>\n"
    offsets = got["logprobs"]["text_offset"]
    assert [got["text"][at] for at in offsets[-2:]] == ["<", "\n"]


def test_hidden_tokens_do_not_hide_a_stop_string():
    """The client sees 'ab', though a special token stands between; and it sees no '|' of a hidden token."""
    output = [*ids_of("xa"), EOS, *ids_of("by")]
    assert answer(output, stop="ab")["text"] == "x"
    assert answer(output, stop="|")["text"] == "xaby"
    assert answer(output, stop="<|im_end|>b", skip_special_tokens=False)["text"] == "xa"


def test_hidden_stop_tokens_stay_hidden():
    output = [*ids_of("fox"), EOS]
    for fields, reason in (({}, None), ({"stop": "|"}, None), ({"ignore_eos": True, "stop_token_ids": [EOS]}, EOS)):
        got = answer(output, (EOS,), skip_special_tokens=False, **fields)
        assert (got["text"], got["finish_reason"], got["stop_reason"]) == ("fox", "stop", reason)
    got = answer(output, (EOS,), skip_special_tokens=False, include_stop_str_in_output=True)
    assert got["text"] == "fox<|im_end|>"


def test_a_stop_string_may_begin_within_min_tokens():
    letters = [i for c in "xabab" for i in ids_of(c)]
    assert answer(letters, stop="ab", min_tokens=2)["text"] == "x"
    assert answer(letters, stop="ab", min_tokens=3)["text"] == "xab"
    got = answer([i for c in "aaab" for i in ids_of(c)], stop="aa", min_tokens=2)
    assert (got["text"], got["stop_reason"]) == ("a", "aa")  # the second "aa" overlaps the first, which is too early


@pytest.mark.parametrize("begun", [1, 2, 3])
@pytest.mark.parametrize("more", [0, 1])
def test_a_broken_character_of_the_prompt_is_not_shown(begun, more):
    ids = [*SMILE[begun:][:more], *ids_of("fox")] if begun < 3 else ids_of("fox")
    for prompt in (SMILE[:begun], [*SMILE[:begun], EOS, EOS, EOS, EOS]):
        detokenizer = Detokenizer(BYTES, SamplingParams(), prompt_ids=prompt)
        assert detokenizer.push(ids) + detokenizer.finish() == "fox"


def test_a_character_begun_before_the_prompts_last_tokens_is_finished():
    detokenizer = Detokenizer(BYTES, SamplingParams(), prompt_ids=[*SMILE[:3], EOS, EOS, EOS, EOS])
    assert detokenizer.push(SMILE[3:]) == "🙂"
    replacement = [TOKENIZER.convert_tokens_to_ids(c) for c in "ï¿½"]  # U+FFFD itself
    detokenizer = Detokenizer(BYTES, SamplingParams(), prompt_ids=replacement[:2])
    assert detokenizer.push([*replacement[2:], *ids_of("a")]) == "\ufffda"


def test_a_broken_character_takes_one_place():
    detokenizer, starts = Detokenizer(BYTES, SamplingParams()), []
    for token_id in [*SMILE[:2], *ids_of("a"), *SMILE]:
        detokenizer.push([token_id])
        starts.append(detokenizer.start)
    assert starts == [0, 0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("make", [doubles.byte_level_tokenizer, doubles.byte_fallback_tokenizer])
def test_offsets_in_a_text_with_special_tokens(make):
    vocabulary = Vocabulary(make())
    end = vocabulary.tokenizer.eos_token
    text = f"Hello{end} Hello{end}{end}🙂"
    ids = vocabulary.encode(text)
    starts = [at for i, at in zip(ids, offsets_in(text, ids, vocabulary), strict=True) if vocabulary.piece(i) == end]
    first = len("Hello")
    second = first + len(end) + len(" Hello")
    assert starts == [first, second, second + len(end)]
    assert offsets_in(text, ids, vocabulary)[-1] == len(text) - 1


def test_offsets_of_added_tokens_and_of_trimmed_spans():
    tokenizer = doubles.byte_level_tokenizer()

    trim = processors.ByteLevel(trim_offsets=True)
    ends = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([trim, ends])
    vocabulary, text = Vocabulary(tokenizer), " Hello  world<|im_end|> 🙂"
    ids = vocabulary.encode(text)
    offsets = offsets_in(text, ids, vocabulary)
    assert (offsets[:2], offsets[-1]) == ([0, 0], len(text))
    for token_id, at in list(zip(ids, offsets, strict=True))[1:-3]:
        assert text[at:].startswith(vocabulary.token_text(token_id))
    assert offsets_in(text, ids[1:-1], vocabulary) == offsets[1:-1]
    assert max(offsets_in("a", ids, vocabulary)) == 1  # ids of another text: none points outside
