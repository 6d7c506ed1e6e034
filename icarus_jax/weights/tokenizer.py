"""Tokenizers: a transformers fast tokenizer, loaded from a model folder or built from a GGUF file's metadata.

We build the tokenizer of a GGUF file ourselves for two reasons. transformers can read it only if torch is installed.
And transformers ignores tokenizer.ggml.pre, which says how text is split before the merges, where it does not know the
value. SmolLM's, which splits numbers into single digits, is one of these.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

from etils import epath
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from icarus_jax.weights.gguf_file import read_gguf

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
GENERATION_CONFIG = "generation_config.json"

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type (llama.cpp's llama_token_type)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = Regex(_WORDS % "1,3"), Regex(_WORDS % "1")


def _split(pattern: Regex) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# Value of tokenizer.ggml.pre -> what splits text before the merges. See llama.cpp's llama-vocab.cpp.
PRE_TOKENIZERS = {
    "gpt-2": _gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "llama-bpe": lambda: _split(_LLAMA3),
    "llama3": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
    "deepseek-r1-qwen": lambda: _split(_QWEN2),
}


def load_tokenizer(path: epath.PathLike) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a trunk.

    Args:
        path: A GGUF file or a model folder, local or in a bucket (TrunkCheckpoint.path).

    Returns:
        The tokenizer.

    Raises:
        ValueError: There is no tokenizer, it is of an unsupported kind, or it has no fast version.
    """
    path = epath.Path(path)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if not has_tokenizer(path):
        raise ValueError(f"{path} holds no tokenizer: {' or '.join(TOKENIZER_FILES)} is missing")
    with tempfile.TemporaryDirectory() as temp:
        tokenizer = AutoTokenizer.from_pretrained(_local(path, temp), local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{path}: its tokenizer has no fast version, which is needed")
    return tokenizer


def has_tokenizer(path: epath.PathLike) -> bool:
    """Returns whether a path has a tokenizer: a GGUF file, or a folder with one of TOKENIZER_FILES."""
    path = epath.Path(path)
    return path.suffix == ".gguf" or any((path / name).exists() for name in TOKENIZER_FILES)


def save_tokenizer(source: epath.PathLike, folder: str) -> None:
    """Writes a trunk's tokenizer and end-of-sequence ids as Hugging Face files.

    `load_tokenizer` and `eos_token_ids` of the folder then return the same as those of `source`.

    Args:
        source: The trunk's GGUF file or model folder.
        folder: A local folder to write to.

    Raises:
        ValueError: `source` has no tokenizer that can be loaded.
    """
    tokenizer = load_tokenizer(source)
    tokenizer.save_pretrained(folder)
    ids = sorted(eos_token_ids(tokenizer, source))
    pathlib.Path(folder, GENERATION_CONFIG).write_text(json.dumps({"eos_token_id": ids}))


def eos_token_ids(tokenizer: PreTrainedTokenizerFast, path: epath.PathLike) -> set[int]:
    """Returns the ids of all tokens that end a sequence.

    Args:
        tokenizer: The trunk's tokenizer. Its end-of-sequence token is one of them.
        path: The trunk's GGUF file or model folder. Its end-of-turn token (GGUF) or the tokens of
            generation_config.json are the others.

    Returns:
        The token ids.
    """
    path = epath.Path(path)
    named: Any = None
    if path.suffix == ".gguf":
        named = read_gguf(path).metadata.get("tokenizer.ggml.eot_token_id")  # end of turn, where it is another token
    elif (path / GENERATION_CONFIG).exists():
        named = json.loads((path / GENERATION_CONFIG).read_text()).get("eos_token_id")
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id}
    return {int(token) for token in ids if token is not None}


def _local(path: epath.Path, temp: str) -> str:
    """Returns a local folder with the tokenizer's files, as transformers reads no others.

    It is the folder itself, or `temp` with copies of the files in a bucket.
    """
    if "://" not in str(path):
        return str(path)
    for file in path.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt"):
            file.copy(epath.Path(temp) / file.name)
    return temp


def _from_gguf(path: epath.Path) -> PreTrainedTokenizerFast:
    metadata = read_gguf(path).metadata
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = fields.get("model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{path}: the tokenizer {kind!r} is not supported; 'gpt2' and 'llama' are")
    tokens = fields["tokens"]
    backend = _byte_level(fields, path) if kind == "gpt2" else _sentencepiece(fields)
    types = fields.get("token_type", [0] * len(tokens))
    typed = [(AddedToken(token, normalized=False), kind) for token, kind in zip(tokens, types, strict=True)]
    backend.add_special_tokens([token for token, kind in typed if kind == _CONTROL])
    backend.add_tokens([token for token, kind in typed if kind == _USER_DEFINED])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{ours}_token": fields.get(f"{theirs}_token_id") for ours, theirs in names.items()}
    special = {name: tokens[token] for name, token in special.items() if token is not None}
    if fields.get("add_bos_token", kind == "llama") and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, fields["bos_token_id"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(fields: dict[str, Any], path: epath.Path) -> Tokenizer:
    """Builds a tokenizer of GPT-2's kind: byte-pair merges over bytes."""
    rule = fields.get("pre", "missing")
    if rule not in PRE_TOKENIZERS:
        raise ValueError(f"{path}: the tokenizer's rule {rule!r} is not supported; {', '.join(PRE_TOKENIZERS)} are")
    vocab = {token: index for index, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
    # Llama 3's vocabulary has words that no sequence of merges makes; they are matched whole.
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=rule in ("llama-bpe", "llama3")))
    backend.pre_tokenizer = PRE_TOKENIZERS[rule]()
    backend.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(fields: dict[str, Any]) -> Tokenizer:
    """Builds a tokenizer of Llama 2's kind (SentencePiece): merges over characters, with bytes for unknown ones.

    The file has no list of merges. Every split of a token into two tokens is one, and the score of the result gives
    their order.
    """
    vocab = {token: index for index, token in enumerate(fields["tokens"])}
    merges = [
        (-fields["scores"][index], token[:cut], token[cut:])
        for token, index in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    pairs = [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])]
    unknown = fields["tokens"][fields.get("unknown_token_id", 0)]
    backend = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    prefix = [normalizers.Prepend("▁")] if fields.get("add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, space])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend
