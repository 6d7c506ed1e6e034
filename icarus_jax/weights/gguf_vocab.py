"""What a GGUF file says of its vocabulary, and what it leaves unsaid: llama.cpp's rules, as tables.

Files that llama.cpp's converter wrote leave out whether a text begins with BOS, and name one end token of several. How
llama.cpp fills the gaps is the standard: `llama_vocab::impl::load` in its src/llama-vocab.cpp.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

log = logging.getLogger(__name__)

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type (llama.cpp's llama_token_type)

# Values of tokenizer.ggml.pre whose texts begin with BOS where the file does not say add_bos_token. Of byte-level
# vocabularies (tokenizer.ggml.model 'gpt2') no others do; of SentencePiece's ('llama') all do.
ADD_BOS = frozenset(
    {
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        *("tekken", "chameleon"),
    }
)
# The ids of special tokens that a file of each model has where it does not name them.
DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {}}
# The metadata's names of tokens that end a generation, beside the token's texts of END_TEXTS.
END_NAMES = ("eos", "eot", "eom")
END_TEXTS = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),  # Llama 3, Granite
        *("<|im_end|>", "<|endoftext|>"),  # ChatML: Qwen, SmolLM
        *("<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),  # Phi, harmony, Solar
        *("<end_of_turn>", "<eos>", "<turn|>", "<|tool_response>"),  # Gemma
        *(
            "</s>",
            "<EOT>",
            "_<EOT>",
            "[EOT]",
            "[EOS]",
            "<end_of_utterance>",
            "<\uff5cend\u2581of\u2581sentence\uff5c>",
            "[e~[",
        ),
    }
)
# Tokens of code models that end a generation too: by the metadata's name, the texts that such a token has where the
# file does not name it.
FILL_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# A token that ends nothing if every text of any of these sets is an end token too.
_TOOLS = ("<|call|>", "<|calls|>")
NO_END = {
    "<|end|>": [{other, call} for other in ("<|return|>", "<|flush|>") for call in _TOOLS],
    "</s>": [{"<|tool_response>"}],
}


@dataclasses.dataclass(frozen=True)
class GgufVocabulary:
    """A file's vocabulary.

    Attributes:
        model: 'gpt2' (byte-level) or 'llama' (SentencePiece).
        rule: tokenizer.ggml.pre: how text is split before the merges; 'missing' if the file does not say.
        tokens: The tokens' texts by id.
        types: The tokens' types by id.
        special: The ids of special tokens, by the metadata's names: 'bos', 'eos', 'unknown', 'padding', 'eot', ...
        add_bos: Whether a text begins with BOS.
        end_ids: The ids of the tokens that end a generation.
    """

    model: str
    rule: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    add_bos: bool
    end_ids: frozenset[int]


def read_vocabulary(metadata: dict[str, Any], path: str) -> GgufVocabulary:
    """Reads the vocabulary of a GGUF file.

    Args:
        metadata: The file's metadata.
        path: The file, for error messages.

    Returns:
        The vocabulary, with llama.cpp's rules where the file says nothing.

    Raises:
        ValueError: There is no vocabulary, it is of an unsupported kind, or it is broken.
    """
    prefix = "tokenizer.ggml."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    model = fields.get("model")
    if model not in DEFAULT_IDS:
        raise ValueError(f"{path}: the tokenizer {repr(model)[:80]} is not supported; 'gpt2' and 'llama' are")
    tokens = fields.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens is no list of texts")
    if len(ids := {token: index for index, token in enumerate(tokens)}) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise ValueError(f"{path}: the token {repr(twice)[:80]} is in the vocabulary twice")
    types = fields.get("token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.token_type is no list of {len(tokens)} types")
    rule = fields.get("pre", "missing")
    special = _special(fields, model, len(tokens), path)
    add_bos = fields.get("add_bos_token", model == "llama" or rule in ADD_BOS)
    if not isinstance(add_bos, bool):
        raise ValueError(f"{path}: tokenizer.ggml.add_bos_token is {repr(add_bos)[:80]}; it is true or false")
    return GgufVocabulary(
        model, rule, tokens, types, special, add_bos and "bos" in special, _end_ids(tokens, ids, special)
    )


def _special(fields: dict[str, Any], model: str, size: int, path: str) -> dict[str, int]:
    """Returns the ids of special tokens by name. An id outside of the vocabulary is as good as none."""
    found = dict(DEFAULT_IDS[model])
    for key, token in fields.items():
        if not key.endswith("_token_id"):
            continue
        if type(token) is not int:
            raise ValueError(f"{path}: tokenizer.ggml.{key} is {repr(token)[:80]}; it is the id of a token")
        if 0 <= token < size:
            found[key.removesuffix("_token_id")] = token
        else:
            log.warning("%s: tokenizer.ggml.%s=%s is outside of the vocabulary of %s", path, key, token, size)
    return {name: token for name, token in found.items() if token < size}


def _end_ids(tokens: list[str], ids: dict[str, int], special: dict[str, int]) -> frozenset[int]:
    ends = {ids[text] for text in END_TEXTS if text in ids} | {special[name] for name in END_NAMES if name in special}
    for name, texts in FILL_TEXTS.items():
        if name in special:
            ends.add(special[name])
        else:
            ends.update([ids[text] for text in texts if text in ids][:1])
    said = {tokens[token] for token in ends}
    for text, others in NO_END.items():
        if text in said and any(together <= said for together in others):
            ends.discard(ids[text])
    return frozenset(ends)
