"""Tokenizers: a GGUF file's equals transformers' own reading of it, and every text comes back."""

import json
import pathlib
import unicodedata

import gguf
import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers.tokenization_utils_base import generate_merges

from icarus_jax.weights.gguf_vocab import read_vocabulary
from icarus_jax.weights.tokenizer import eos_token_ids, load_tokenizer, save_tokenizer
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = [
    "",
    "Hello world, it's 12345 o'clock; DON'T go!",
    "  two  spaces\n\n\n  and\ttabs \r\n end ",
    "ünïcödé e\u0301 日本語 🎉 ½ №7",
    "def f(x):\n    return x ** 2  # square\n",
    "<|im_start|>user\nHi<|im_end|>",
    "a<think>b",
    "theHTMLParser's CamelCase, we'LL see/\n//x in 2024, 1999",
]
CORPUS = ["the cat sat on the mat, it's 2024 and the 1999 cats don't sit", "hello world hello there  what  is", *TEXTS]
UNREACHED = "zqxj"  # a word of the vocabulary that no merges make
CONTROL = ["<unk>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_vocabulary(path, kind, tokens, types, *, merges=None, scores=None, pre=None, **special):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if pre:
        writer.add_tokenizer_pre(pre)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, value in special.items():
        if name.startswith("fim"):  # which the writer has no methods for
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
        else:
            getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_gguf(path, pre, control=(), **special):
    """control: more control tokens, with ids from 3 on."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(control),
        special_tokens=[*CONTROL, *control],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 2, trainer)
    vocab = [*sorted(backend.get_vocab(), key=backend.get_vocab().get), UNREACHED, "<think>"]
    types = [3 if token in (*CONTROL, *control) else 4 if token == "<think>" else 1 for token in vocab]
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return write_vocabulary(path, "gpt2", vocab, types, merges=merges, pre=pre, **special)


def transformers_reading(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize(
    "pre", ["gpt-2", "olmo", "granite-docling", "llama-bpe", "dbrx", "smaug-bpe", "qwen2", "tekken", "gpt-4o"]
)
def test_byte_level_is_transformers_reading(pre, tmp_path):
    path = byte_level_gguf(tmp_path / "v.gguf", pre)
    mine, theirs = load_tokenizer(path), transformers_reading(path)
    for text in TEXTS:
        if pre == "qwen2":  # its models' own tokenizers compose accents, which transformers' reading of GGUF leaves out
            text = unicodedata.normalize("NFC", text)
        ids = mine(text, add_special_tokens=False).input_ids
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
        assert mine.decode(ids) == text
    assert (mine.bos_token, mine.eos_token, mine.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert mine.chat_template == TEMPLATE
    assert mine.decode([1, *mine("x").input_ids, 2], skip_special_tokens=True) == "x"


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken"])
def test_whole_words_are_taken_from_the_vocabulary(pre, tmp_path):
    whole = load_tokenizer(byte_level_gguf(tmp_path / "a.gguf", pre))
    assert whole(UNREACHED, add_special_tokens=False).input_ids == [whole.convert_tokens_to_ids(UNREACHED)]
    gpt2 = load_tokenizer(byte_level_gguf(tmp_path / "b.gguf", "gpt-2"))
    assert len(gpt2(UNREACHED).input_ids) == 4


@pytest.mark.parametrize("pre", ["glm4", "chatglm-bpe"])
def test_glm4_splits_like_llama3(pre, tmp_path):
    """By a regex of the same text in llama.cpp, under a name that transformers does not know."""
    glm4, dbrx = (load_tokenizer(byte_level_gguf(tmp_path / f"{name}.gguf", name)) for name in (pre, "dbrx"))
    gpt2 = load_tokenizer(byte_level_gguf(tmp_path / "b.gguf", "gpt-2"))
    assert all(glm4(text).input_ids == dbrx(text).input_ids for text in TEXTS)
    assert not all(glm4(text).input_ids == gpt2(text).input_ids for text in TEXTS)


def test_composed_accents_in_qwens_vocabularies(tmp_path):
    tokenizer = load_tokenizer(byte_level_gguf(tmp_path / "v.gguf", "qwen2"))
    assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids


@pytest.mark.parametrize("pre", ["smollm", "refact", "starcoder", "command-r"])
def test_digits_stand_alone(pre, tmp_path):
    tokenizer = load_tokenizer(byte_level_gguf(tmp_path / "a.gguf", pre))
    plain = load_tokenizer(byte_level_gguf(tmp_path / "b.gguf", "gpt-2"))
    digits = [tokenizer(digit).input_ids[0] for digit in "2024"]
    assert tokenizer("2024").input_ids == digits
    assert plain("2024").input_ids != digits  # the vocabulary does hold the longer number
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_bos_is_added_where_the_file_says_so(tmp_path):
    with_bos = load_tokenizer(byte_level_gguf(tmp_path / "a.gguf", "llama-bpe", add_add_bos_token=True))
    without = load_tokenizer(byte_level_gguf(tmp_path / "b.gguf", "llama-bpe", add_add_bos_token=False))
    assert with_bos("hello").input_ids == [1, *without("hello").input_ids]
    assert with_bos("hello", add_special_tokens=False).input_ids == without("hello").input_ids


@pytest.mark.parametrize("pre, adds", [("llama-bpe", True), ("llama3", True), ("llama-v3", True), ("gpt-2", False),
                                       ("smollm", False), ("qwen2", False), ("deepseek-r1-qwen", False),
                                       ("tekken", True), ("dbrx", False), ("smaug-bpe", False), ("glm4", False),
                                       ("refact", False), ("gpt-4o", False)])  # fmt: skip
def test_bos_where_the_file_says_nothing(pre, adds, tmp_path):
    tokenizer = load_tokenizer(byte_level_gguf(tmp_path / "a.gguf", pre))
    assert (tokenizer("hello").input_ids[0] == 1) == adds
    assert tokenizer("hello").input_ids[adds:] == tokenizer("hello", add_special_tokens=False).input_ids


LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<|eom_id|>"]
QWEN = ["<|endoftext|>", "<|fim_pad|>", "<|fim_prefix|>", "<|repo_name|>", "<|file_sep|>", "<|object_ref_start|>"]


@pytest.mark.parametrize("control, ends", [
    (LLAMA3, ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]),
    (QWEN, ["<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]),
    (["<end_of_turn>", "<eos>", "<start_of_turn>"], ["<end_of_turn>", "<eos>"]),
    (["<|end|>", "<|user|>", "<EOT>"], ["<|end|>", "<EOT>"]),
    (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),  # of harmony, whose <|end|> ends a message
    (["<|end|>", "<|flush|>", "<|calls|>"], ["<|flush|>", "<|calls|>"]),
    (["</s>", "<|tool_response>"], ["<|tool_response>"]),
    (["</s>"], ["</s>"]),
])  # fmt: skip
def test_every_end_token_of_a_gguf_is_known(control, ends, tmp_path):
    path = byte_level_gguf(tmp_path / "a.gguf", "qwen2", control)
    tokenizer = load_tokenizer(path)
    found = {tokenizer.convert_ids_to_tokens(token) for token in eos_token_ids(tokenizer, path)}
    assert found == {"<|im_end|>", *ends}
    save_tokenizer(path, str(tmp_path / "saved"))
    assert eos_token_ids(load_tokenizer(tmp_path / "saved"), tmp_path / "saved") == eos_token_ids(tokenizer, path)


def test_end_tokens_that_the_file_names(tmp_path):
    named = {"eot": 5, "eom": 7, "fim_pad": 9, "fim_rep": 11, "fim_sep": 13}
    ids = {f"{'' if name.startswith('fim') else 'add_'}{name}_token_id": token for name, token in named.items()}
    path = byte_level_gguf(tmp_path / "a.gguf", "qwen2", QWEN, **ids)
    tokenizer = load_tokenizer(path)
    texts = {tokenizer.convert_tokens_to_ids(text) for text in ("<|endoftext|>", "<|im_end|>")}
    assert eos_token_ids(tokenizer, path) == {*named.values(), *texts}


def test_an_end_token_that_is_marked_as_a_word_is_one_token(tmp_path):
    vocab = ["<unk>", "<s>", "</s>", "<|eot_id|>", "a", "b", "ab"]
    types = [2, 3, 3, 1, 1, 1, 1]
    file = write_vocabulary(tmp_path / "b.gguf", "gpt2", vocab, types, merges=["a b"], pre="llama-bpe")
    tokenizer = load_tokenizer(file)
    assert tokenizer("a<|eot_id|>a").input_ids == [1, 4, 3, 4]
    assert tokenizer.decode([4, 3], skip_special_tokens=True) == "a"


def test_ids_outside_of_the_vocabulary_are_none(tmp_path, caplog):
    path = byte_level_gguf(tmp_path / "a.gguf", "qwen2", add_eot_token_id=(1 << 32) - 1)
    assert eos_token_ids(load_tokenizer(path), path) == {2}
    assert "eot_token_id=4294967295 is outside of the vocabulary" in caplog.text


def test_a_sentencepiece_file_without_ids(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}
    vocabulary = read_vocabulary(metadata, "here")
    assert (vocabulary.special, vocabulary.add_bos) == ({"bos": 1, "eos": 2, "unknown": 0}, True)
    assert vocabulary.end_ids == {2}


def test_sentencepiece_is_transformers_reading(tmp_path):
    pieces = ["th", "▁", "t", "h", "e", "▁t", "he", "▁the", "c", "a", "▁c", "at", "▁cat", "s", "▁▁", "<", ">"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(rank) for rank in (8, 9, 9, 9, 9, 1, 2, 3, 9, 9, 5, 4, 6, 9, 7, 9, 9)]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    path = write_vocabulary(tmp_path / "v.gguf", "llama", tokens, types, scores=scores)
    mine, theirs = load_tokenizer(path), transformers_reading(path)
    for text in ("the cats", "thé  cat\n 日本", "thecat"):
        assert mine(text).input_ids == theirs(text).input_ids, text
        assert mine(text).input_ids[0] == 1
        assert mine.decode(mine(text, add_special_tokens=False).input_ids) == text
    # llama.cpp (and Llama 2's own tokenizer.json) begins a word after a special token too.
    assert mine("the<s>the", add_special_tokens=False).input_ids == [266, 1, 266]


def test_gemmas_vocabulary_is_its_own_tokenizer(tmp_path):
    """SentencePiece without a space before the text; runs of line ends and of spaces are tokens as they are."""
    pieces = ["▁", "t", "h", "e", "▁t", "he", "▁the", "th", "c", "a", "at", "▁c", "▁cat", "s"]
    tokens = ["<unk>", "<s>", "</s>", "\n\n", "  ", "<t>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [-1000.0] * 262 + [-float(rank) for rank in (20, 21, 22, 23, 1, 2, 3, 4, 24, 25, 5, 6, 7, 26)]
    types = [2, 3, 3, 4, 4, 4, *[6] * 256, *[1] * len(pieces)]
    names = {"add_add_space_prefix": False, "add_add_bos_token": True}
    mine = load_tokenizer(write_vocabulary(tmp_path / "v.gguf", "llama", tokens, types, scores=scores, **names))
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    theirs = transformers.GemmaTokenizer(vocab=vocab, merges=merges, bos_token="<s>", eos_token="</s>")
    theirs.backend_tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("\n\n", "  ", "<t>")])
    for text in ("the cats", " the  cat\n\n\nthé 日本", "the<t>the</s> the", "   cat"):
        ids = mine(text, add_special_tokens=False).input_ids
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
        assert mine.decode(ids) == text
    assert mine("the").input_ids == [1, *mine("the", add_special_tokens=False).input_ids]


def test_eos_ids(tmp_path):
    path = byte_level_gguf(tmp_path / "a.gguf", "gpt-2", add_eot_token_id=7)
    assert eos_token_ids(load_tokenizer(path), path) == {2, 7}
    folder = tiny_model("llama", tmp_path)
    generation = pathlib.Path(folder) / "generation_config.json"
    for named, want in (([3, 258], {3, 258}), (9, {9, 258}), (None, {258})):
        generation.write_text(json.dumps({"eos_token_id": named}))
        assert eos_token_ids(load_tokenizer(folder), folder) == want
    generation.unlink()
    assert eos_token_ids(load_tokenizer(folder), folder) == {258}


def test_a_folders_tokenizer(tmp_path):
    tokenizer = load_tokenizer(tiny_model("llama", tmp_path))
    assert tokenizer("hé<eos>").input_ids == tiny_tokenizer()("hé<eos>").input_ids
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<bos>user\nhi<eos><bos>assistant\n"
    )


def test_bad_tokenizers(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="rule 'who-knows' is not supported; gpt-2, olmo"):
        load_tokenizer(byte_level_gguf(tmp_path / "a.gguf", "who-knows"))
    with pytest.raises(ValueError, match="the tokenizer 'bert' is not supported"):
        load_tokenizer(write_vocabulary(tmp_path / "b.gguf", "bert", ["a"] * 3, [1] * 3))
