"""Whether a grammar accepts a text, token by token to its end."""

from __future__ import annotations

from icarus_jax.grammar.compiler import Compiler, Grammar, GrammarError
from tests import doubles

TOKENIZER = doubles.byte_level_tokenizer()
EOS = TOKENIZER.eos_token_id


def make_compiler() -> Compiler:
    return Compiler(TOKENIZER.backend_tokenizer.to_str(), len(TOKENIZER), [EOS])


def accepts(grammar: Grammar, text: str) -> bool:
    matcher = grammar.start()
    try:
        for token in TOKENIZER.encode(text, add_special_tokens=False):
            matcher.accept(token)
        if not matcher.ended:
            matcher.accept(EOS)
    except GrammarError:
        return False
    return matcher.ended
