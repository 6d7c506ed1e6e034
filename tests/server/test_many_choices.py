"""A request with many choices: what they have in common is made once for all of them."""

from __future__ import annotations

import pytest

from icarus_jax.server import streams
from icarus_jax.server.detokenizer import Vocabulary
from icarus_jax.server.finder import Finder
from tests.server.served import GOOD, ids_of, serving

STOPS = ["never said", "nor this<|im_end|>", "a" * 1000]
RULES = [{"on": "hand over", "model": "parrot"}, {"on": "b" * 1000, "model": "parrot"}]
MANY = GOOD | {"n": 16, "models": ["trunk", "parrot"], "max_tokens": 2, "stop": STOPS, "handoff": RULES}


def counted(monkeypatch, owner, name: str) -> list[None]:
    """Notes each call of a function."""
    function, calls = getattr(owner, name), []

    def counting(*args, **kwargs):
        calls.append(None)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls


def test_tables_of_stop_strings_and_rules_are_made_once(monkeypatch):
    """16 strings of 1,000 characters and 1,024 choices took 12 seconds."""
    made, looked = counted(monkeypatch, Finder, "__init__"), counted(monkeypatch, Vocabulary, "holds_special")
    with serving() as served:
        answer = served.complete(**MANY | {"prompt": [[5], [6], [7]]})
    assert len(answer["choices"]) == 3 * 2 * 16
    assert len(made) == len(looked) == len(STOPS) + len(RULES)


@pytest.mark.parametrize("prompt, maker", [("Hello world", "offsets_in"), ([7, 8, 9], "prompt_text")])
def test_an_echoed_prompt_is_read_once(prompt, maker, monkeypatch):
    made = counted(monkeypatch, streams if maker == "offsets_in" else Vocabulary, maker)
    with serving() as served:
        choices = served.complete(**MANY | {"prompt": prompt, "echo": True, "logprobs": 1})["choices"]
    assert len(choices) == 2 * 16 and len(made) == 1
    offsets = [choice["logprobs"]["text_offset"] for choice in choices]
    assert all(found == offsets[0] for found in offsets[:16]) and offsets[0][0] == 0


def test_a_choices_search_is_its_own():
    """'parrot' repeats its prompt, so the texts are 'ababab' and 'bababa': each stops where it would alone."""
    (a,), (b,) = ids_of("a"), ids_of("b")
    asked = {"prompt": [[a, b], [b, a]], "model": "parrot", "max_tokens": 6, "n": 2}
    with serving() as served:
        choices = served.complete(**asked, stop=["bb", "ab", "ba"])["choices"]
    assert [choice["stop_reason"] for choice in choices] == ["ab", "ab", "ba", "ba"]
    assert [choice["text"] for choice in choices] == [""] * 4
