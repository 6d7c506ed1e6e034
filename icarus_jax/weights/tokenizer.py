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
from transformers import PreTrainedTokenizerFast

from icarus_jax.weights.gguf_file import read_gguf
from icarus_jax.weights.gguf_vocab import CONTROL, USER_DEFINED, GgufVocabulary, read_vocabulary
from icarus_jax.weights.reading import read_json, whole

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
GENERATION_CONFIG = "generation_config.json"
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # values of tokenizer.ggml.pre

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = Regex(_WORDS % "1,3"), Regex(_WORDS % "1")


def _cased(ending: str, digits: str) -> Regex:
    """Returns a pattern whose words begin anew at a capital letter; ending: what a word may end with."""
    upper, lower = (rf"[{kind}\p{{Lm}}\p{{Lo}}\p{{M}}]" for kind in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
    words = "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{word}{ending}" for word in (f"{upper}*{lower}+", f"{upper}+{lower}*"))
    return Regex(rf"{words}|\p{{N}}{{{digits}}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


_TEKKEN, _GPT4O = _cased("", "1"), _cased("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "1,3")


def _split(pattern: Regex) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


# Value of tokenizer.ggml.pre -> what splits text before the merges. See llama.cpp's llama-vocab.cpp. Granite 3 is
# 'refact', Granite 4, OLMo 2 and Phi-4 are 'dbrx', SmolLM3 is 'smaug-bpe', Phi-4-mini 'gpt-4o', Mistral's are 'tekken'.
PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "olmo", "granite-docling"), _gpt2),
    **dict.fromkeys(("smollm", "refact", "starcoder", "command-r"), _single_digits),
    **dict.fromkeys((*LLAMA3, "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), lambda: _split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), lambda: _split(_QWEN2)),
    "tekken": lambda: _split(_TEKKEN),
    "gpt-4o": lambda: _split(_GPT4O),
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
        with whole(path, "holds no tokenizer that can be read"):
            return _from_gguf(path)
    if not has_tokenizer(path):
        raise ValueError(f"{path} holds no tokenizer: {' or '.join(TOKENIZER_FILES)} is missing")
    from transformers import AutoTokenizer  # imported here because it imports torch, if there is one: over a second

    with whole(path, "holds no tokenizer that can be read"), tempfile.TemporaryDirectory() as temp:
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
        path: The trunk's GGUF file or model folder. The end tokens that llama.cpp finds in the file (gguf_vocab.py) or
            those of generation_config.json are the others.

    Returns:
        The token ids.

    Raises:
        ValueError: A file that names them is broken.
    """
    path = epath.Path(path)
    named: Any = None
    if path.suffix == ".gguf":
        with whole(path, "holds no tokenizer that can be read"):
            named = list(read_vocabulary(read_gguf(path).metadata, str(path)).end_ids)
    elif (path / GENERATION_CONFIG).exists():
        named = read_json(path / GENERATION_CONFIG).get("eos_token_id")
    listed = named if isinstance(named, list) else [named]
    if wrong := [
        token for token in listed if token is not None and (type(token) is not int or not 0 <= token < 1 << 31)
    ]:
        raise ValueError(f"{path / GENERATION_CONFIG}: eos_token_id names {repr(wrong[0])[:80]}, which is no token id")
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


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
    vocabulary = read_vocabulary(metadata, str(path))
    tokens, special = vocabulary.tokens, vocabulary.special
    byte_level = vocabulary.model == "gpt2"
    order = "tokenizer.ggml.merges" if byte_level else "tokenizer.ggml.scores"
    if not isinstance(metadata.get(order), list):
        raise ValueError(f"{path}: there is no list {order}, without which text cannot be split")
    backend = _byte_level(vocabulary, metadata, path) if byte_level else _sentencepiece(vocabulary, metadata)
    typed = list(zip(tokens, vocabulary.types, strict=True))
    ends = vocabulary.end_ids  # control tokens, whatever the file says: so llama.cpp takes them
    control = [token for i, (token, kind) in enumerate(typed) if kind == CONTROL or i in ends]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in typed if kind == USER_DEFINED])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    if vocabulary.add_bos:
        bos = tokens[special["bos"]]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, special["bos"])]
        )
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{path}: tokenizer.chat_template is no text")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **{ours: tokens[special[theirs]] for ours, theirs in names.items() if theirs in special},
    )


def _byte_level(vocabulary: GgufVocabulary, metadata: dict[str, Any], path: epath.Path) -> Tokenizer:
    """Builds a tokenizer of GPT-2's kind: byte-pair merges over bytes."""
    rule = vocabulary.rule
    if rule not in PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: the tokenizer's rule {repr(rule)[:80]} is not supported; {', '.join(PRE_TOKENIZERS)} are"
        )
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    # These vocabularies have words that no sequence of merges makes; they are matched whole.
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=rule in (*LLAMA3, "tekken")))
    backend.pre_tokenizer = PRE_TOKENIZERS[rule]()
    backend.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(vocabulary: GgufVocabulary, metadata: dict[str, Any]) -> Tokenizer:
    """Builds a tokenizer of Llama 2's kind (SentencePiece): merges over characters, with bytes for unknown ones.

    The file has no list of merges. Every split of a token into two tokens is one, and the score of the result gives
    their order.
    """
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    scores = metadata["tokenizer.ggml.scores"]
    merges = [
        (-scores[index], token[:cut], token[cut:])
        for token, index in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    pairs = [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])]
    unknown = vocabulary.tokens[vocabulary.special["unknown"]]
    backend = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    prefix = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, space])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend
