"""The written vocabulary, in llama.cpp, against the tokenizers that it was made from."""

from __future__ import annotations

import ctypes
import io
import json
import lzma
import os
import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf
import jinja2
import llama_cpp
import pytest
import sentencepiece
import tokenizers
from koala_local.convert.gguf.layout import write_metadata
from koala_local.convert.vocabulary.read import Vocabulary, read_vocabulary
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from koala_local.dialogue import BOS, FORMATS, KOALA_TEMPLATE, Control, Dialogue, Reply, Text, Turn
from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig
from tests.checkpoint_maker import tokenizer_model

TEST_DATA = os.environ.get("KOALA_TEST_DATA")
STRINGS = 10_000
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
AWKWARD = [
    "", " ", "  ", " a", "a ", "\n", "\n\n", "\r\n", "\t\ta  b", " " * 50, "a" * 300, "\0x", "é̂ﬀ½", "x̱̄", "ǅ ǆ",
    "👩‍👩‍👧‍👦🏳️‍🌈", "日本語のテキスト", "العربية", "▁a", "The\u00a0end", "\ufffd", "\U0010ffff", "don't I'LL WE'VE 'tis",
    "1234567 3.14", "<0x41>", "[PAD340]", "def f(x):\n    return x\n\n\n", "USER: hi GPT:", "< s>", "<|im_start|",
]  # fmt: skip


def config(rows: int, **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "architecture": "LlamaForCausalLM", "vocabulary_size": rows, "hidden_size": 64, "feed_forward_size": 128,
        "layers": 1, "heads": 4, "kv_heads": 4, "head_size": 16, "norm_epsilon": 1e-6, "rope_base": 1e4, "context": 512,
        "tied_embeddings": False,
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


def random_strings(count: int, seed: int) -> Iterator[str]:
    source = random.Random(seed)
    common = [" ", "\n", "  ", "\t", " the", " and", "'s", "12", "ing"]
    ranges = [(32, 126)] * 4 + [(0xA0, 0x2FFF)] * 2 + [(0x3000, 0xD7FF), (0xE000, 0x1FFFF)]
    for _ in range(count):
        pieces = [
            source.choice(common) if source.random() < 0.2 else chr(source.randint(*source.choice(ranges)))
            for _ in range(source.randint(1, 30))
        ]
        yield "".join(pieces)


@contextmanager
def llama_vocabulary(vocabulary: Vocabulary, path: Path) -> Iterator[Callable[..., list[int]]]:
    """llama.cpp's tokenizer for `vocabulary`, through a file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    write_metadata(writer, config(len(vocabulary.tokens)), vocabulary, "F32", name="test")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model
    handle = llama_cpp.llama_model_get_vocab(model)

    def tokenize(text: str, add_bos: bool = False, special: bool = False) -> list[int]:
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(handle, data, len(data), ids, len(ids), add_bos, special)
        assert count >= 0
        return list(ids[:count])

    try:
        yield tokenize
    finally:
        llama_cpp.llama_model_free(model)


def assert_same_ids(
    vocabulary: Vocabulary, path: Path, expected: Callable[[str], list[int]], texts: Iterable[str], **how: bool
) -> None:
    with llama_vocabulary(vocabulary, path) as tokenize:
        for text in texts:
            assert tokenize(text, **how) == expected(text), repr(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "tokenizer.model").write_bytes(tokenizer_model())
    return made


def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model())


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def byte_level(path: Path, *steps: Any, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level BPE trained on a few sentences, with a control token, saved to `path`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the cat and the dog said it's 1234 o'clock", "  def f(x):\n    return x + 10\n", "I'LL don't we've été"]
    tokenizer.train_from_iterator(text * 20, trainer)
    tokenizer.save(str(path))
    return tokenizer


# SentencePiece


def test_sentencepiece_ids_are_the_same(folder: Path, tmp_path: Path) -> None:
    processor = pieces()
    vocabulary = read_vocabulary(folder, config(processor.get_piece_size() + 5))
    texts = [*AWKWARD, *random_strings(STRINGS, seed=1)]
    assert_same_ids(vocabulary, tmp_path / "v.gguf", processor.encode, texts)
    assert (vocabulary.model, vocabulary.bos, vocabulary.eos, vocabulary.unk, vocabulary.pad) == (
        "llama",
        1,
        2,
        0,
        None,
    )
    assert vocabulary.add_bos
    assert vocabulary.add_space_prefix


def test_types_and_scores_are_the_models_own(folder: Path) -> None:
    processor = pieces()
    vocabulary = read_vocabulary(folder, config(processor.get_piece_size()))
    for id_ in range(processor.get_piece_size()):
        assert vocabulary.tokens[id_].decode() == processor.id_to_piece(id_)
        assert vocabulary.scores[id_] == pytest.approx(processor.get_score(id_))
        kind = vocabulary.types[id_]
        assert processor.is_unknown(id_) == (kind == gguf.TokenType.UNKNOWN)
        assert processor.is_control(id_) == (kind == gguf.TokenType.CONTROL)
        assert processor.is_byte(id_) == (kind == gguf.TokenType.BYTE)


def test_padding_fills_the_embedding(folder: Path) -> None:
    size = pieces().get_piece_size()
    vocabulary = read_vocabulary(folder, config(size + 3))
    assert vocabulary.tokens[size:] == [b"[PAD%d]" % (size + i) for i in range(3)]
    assert set(vocabulary.types[size:]) == {int(gguf.TokenType.UNUSED)}
    assert any(str(size + 3) in note for note in vocabulary.notes)
    assert not read_vocabulary(folder, config(size)).notes


def test_a_vocabulary_larger_than_the_embedding_is_refused(folder: Path) -> None:
    size = pieces().get_piece_size()
    with pytest.raises(ModelFileError, match=f"the embedding has {size - 1}"):
        read_vocabulary(folder, config(size - 1))
    write_json(folder / "added_tokens.json", {"[PAD]": size})
    with pytest.raises(ModelFileError, match=r"\[PAD\]"):
        read_vocabulary(folder, config(size))


def test_added_tokens_get_their_rows_and_types(folder: Path, tmp_path: Path) -> None:
    size = pieces().get_piece_size()
    write_json(folder / "added_tokens.json", {"<|im_end|>": size + 1, "<|im_start|>": size, "<tool>": size + 2})
    decoder = {str(size + 3): {"content": "<end>", "special": True}, "1": {"content": "<s>", "special": True}}
    write_json(
        folder / "tokenizer_config.json", {"added_tokens_decoder": decoder, "eos_token": {"content": "<|im_end|>"}}
    )
    vocabulary = read_vocabulary(folder, config(size + 4, bos=1, eos=(2,)))
    kinds = gguf.TokenType
    assert vocabulary.tokens[size:] == [b"<|im_start|>", b"<|im_end|>", b"<tool>", b"<end>"]
    assert vocabulary.types[size:] == [kinds.CONTROL, kinds.CONTROL, kinds.USER_DEFINED, kinds.CONTROL]
    assert vocabulary.eos == size + 1
    assert any("EOS is 2" in note for note in vocabulary.notes)
    with llama_vocabulary(vocabulary, tmp_path / "v.gguf") as tokenize:
        assert tokenize("<|im_start|>", special=True) == [size]
        assert not set(tokenize("<|im_start|> <s> </s> <end>")) & {1, 2, size, size + 3}


def test_the_tokenizer_is_believed_over_config_json(folder: Path) -> None:
    """Configurations of the LLaMA-1 era say bos 0, eos 1, pad -1, and their special tokens are empty strings."""
    write_json(folder / "special_tokens_map.json", {})
    write_json(folder / "tokenizer_config.json", {"bos_token": "", "eos_token": "", "unk_token": ""})
    vocabulary = read_vocabulary(folder, config(pieces().get_piece_size(), bos=0, eos=(1,)))
    assert (vocabulary.bos, vocabulary.eos, vocabulary.unk, vocabulary.pad) == (1, 2, 0, None)
    assert any("BOS is 0" in note for note in vocabulary.notes)
    assert any("EOS is 1" in note for note in vocabulary.notes)


@pytest.mark.skipif(not TEST_DATA, reason="KOALA_TEST_DATA is not set")
def test_llamas_own_tokenizer(tmp_path: Path) -> None:
    model = Path(TEST_DATA or "") / "models" / "llama_tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = [*AWKWARD, "<s>", "</s>", "<unk>", *random_strings(STRINGS, seed=2)]
    assert_same_ids(read_vocabulary(tmp_path, config(32000)), tmp_path / "v.gguf", processor.encode, texts)


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a koala sleeps in a tall tree", "trees are tall"]), model_writer=model,
        model_type="unigram", vocab_size=30, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ModelFileError, match="not a BPE model"):
        read_vocabulary(tmp_path, config(1000))


def test_damaged_sentencepiece_models_are_refused_or_read(folder: Path) -> None:
    content, source = tokenizer_model(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(content[: source.randint(0, len(content))])
        for _ in range(source.randint(0, 3)):
            if damaged:
                damaged[source.randrange(len(damaged))] = source.randrange(256)
        (folder / "tokenizer.model").write_bytes(damaged)
        with suppress(ModelFileError):
            assert len(read_vocabulary(folder, config(400)).tokens) == 400


# tokenizer.json made from SentencePiece


def sentencepiece_json(prefix: bool = True) -> Tokenizer:
    """What transformers makes of the test tokenizer.model: BPE with byte fallback, merges in the order of scores."""
    processor = pieces()
    names = [processor.id_to_piece(id_) for id_ in range(processor.get_piece_size())]
    ids = {name: id_ for id_, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for id_, name in enumerate(names)
        for cut in range(1, len(name))
        if not processor.is_byte(id_) and name[:cut] in ids and name[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_like_json_has_the_same_ids(tmp_path: Path, prefix: bool) -> None:
    tokenizer = sentencepiece_json(prefix)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path, config(tokenizer.get_vocab_size() + 1, bos=0, eos=(1,)))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    assert_same_ids(vocabulary, tmp_path / "v.gguf", encode, [*AWKWARD, *random_strings(STRINGS, seed=3)])
    assert vocabulary.add_space_prefix is prefix
    assert (vocabulary.bos, vocabulary.eos, vocabulary.unk, vocabulary.add_bos) == (1, 2, 0, True)


def test_merges_that_sentencepiece_cannot_have_are_refused(tmp_path: Path) -> None:
    sentencepiece_json().save(str(tmp_path / "tokenizer.json"))
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    description["model"]["merges"] = description["model"]["merges"][:-1]
    write_json(tmp_path / "tokenizer.json", description)
    with pytest.raises(ModelFileError, match="in an order"):
        read_vocabulary(tmp_path, config(400))


def test_a_vocabulary_without_byte_tokens_is_refused(tmp_path: Path) -> None:
    sentencepiece_json().save(str(tmp_path / "tokenizer.json"))
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    del description["model"]["vocab"]["<0x41>"]
    write_json(tmp_path / "tokenizer.json", description)
    with pytest.raises(ModelFileError, match="byte fallback"):
        read_vocabulary(tmp_path, config(400))


@pytest.mark.skipif(not TEST_DATA, reason="KOALA_TEST_DATA is not set")
def test_mistrals_own_tokenizer(tmp_path: Path) -> None:
    with lzma.open(Path(TEST_DATA or "") / "models" / "mistral_v0.2_tokenizer.json.xz") as file:
        (tmp_path / "tokenizer.json").write_bytes(file.read())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [*AWKWARD, *random_strings(STRINGS, seed=4)]

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    assert_same_ids(read_vocabulary(tmp_path, config(32000)), tmp_path / "v.gguf", encode, texts, add_bos=True)


# byte-level BPE


@pytest.mark.parametrize(
    ("pre", "steps", "ignore_merges"),
    [
        ("gpt-2", [pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
        ("smollm", [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
        ("llama-bpe", [Regex(LLAMA_3)], True),
        ("dbrx", [Regex(LLAMA_3)], False),
        ("qwen2", [Regex(LLAMA_3.replace("{1,3}", ""))], False),
        ("tekken", [Regex(TEKKEN)], True),
    ],
)
def test_byte_level_ids_are_the_same(tmp_path: Path, pre: str, steps: list[Any], ignore_merges: bool) -> None:
    if isinstance(steps[0], Regex):
        steps = [pre_tokenizers.Split(steps[0], "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer = byte_level(tmp_path / "tokenizer.json", *steps, ignore_merges=ignore_merges)
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    vocabulary = read_vocabulary(tmp_path, config(tokenizer.get_vocab_size(), eos=(2,)))
    assert (vocabulary.model, vocabulary.pre, vocabulary.bos, vocabulary.eos) == ("gpt2", pre, 1, 2)
    assert not vocabulary.add_bos

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    texts = [*AWKWARD, *random_strings(STRINGS, seed=5)]
    # what is a letter or a digit depends on the Unicode version: characters newer than Python's tables are left out
    texts = ["".join(c for c in text if unicodedata.category(c) != "Cn") for text in texts]
    if pre == "tekken":  # llama.cpp's rule equals the tokenizer's in ASCII alone, and a note says so
        texts = ["".join(filter(str.isascii, text)) for text in texts]
    assert any("in ASCII alone" in note for note in vocabulary.notes) == (pre == "tekken")
    assert_same_ids(vocabulary, tmp_path / "v.gguf", encode, texts, add_bos=True)
    with llama_vocabulary(vocabulary, tmp_path / "v.gguf") as tokenize:
        assert not set(tokenize("<|im_start|>hi<|im_end|>")) & {0, 1, 2}
        assert tokenize("<|im_start|>hi<|im_end|>", special=True) == encode("<|im_start|>hi<|im_end|>")


@pytest.mark.parametrize(
    "step",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("x+"), "isolated"), pre_tokenizers.ByteLevel(False)]),
    ],
)
def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path, step: Any) -> None:
    tokenizer = byte_level(tmp_path / "tokenizer.json", step)
    with pytest.raises(ModelFileError, match="not known"):
        read_vocabulary(tmp_path, config(tokenizer.get_vocab_size()))


# chat templates


def test_the_checkpoints_own_template_is_kept(folder: Path) -> None:
    rows = pieces().get_piece_size()
    assert read_vocabulary(folder, config(rows)).chat_template is None
    listed = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": listed})
    assert read_vocabulary(folder, config(rows)).chat_template == "D"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert read_vocabulary(folder, config(rows, name="koala-13b")).chat_template == "{{ messages }}"


def test_koalas_template_writes_koalas_format(folder: Path) -> None:
    vocabulary = read_vocabulary(folder, config(pieces().get_piece_size(), name="Koala-13B"))
    assert vocabulary.chat_template == KOALA_TEMPLATE
    dialogue = Dialogue((Turn("Hello!", "Hi! How?"), Turn("What next?")), system="Be kind.")
    koala = FORMATS["koala"]
    written = "".join(
        {BOS: "<s>"}.get(part, "</s>") if isinstance(part, Control) else part.text
        for part in koala.segments(dialogue)
        if isinstance(part, Control | Text | Reply)
    )
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi! How?"},
        {"role": "user", "content": "What next?"},
    ]
    template = jinja2.Environment().from_string(KOALA_TEMPLATE)
    assert template.render(messages=messages, bos_token="<s>", eos_token="</s>") == written


# damage


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordPiece", "vocab": {}}},
        {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": True}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [1]}},
        {"model": None},
        {"added_tokens": [{"id": -3, "content": "x"}]},
        {"added_tokens": [{"id": 3, "content": 7}]},
        {"added_tokens": [{"id": 10**30, "content": "x"}]},
        {"normalizer": {"type": "Lowercase"}},
    ],
)
def test_malformed_descriptions_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    sentencepiece_json().save(str(tmp_path / "tokenizer.json"))
    description = json.loads((tmp_path / "tokenizer.json").read_text()) | change
    write_json(tmp_path / "tokenizer.json", description)
    with pytest.raises(ModelFileError):
        read_vocabulary(tmp_path, config(400))


@pytest.mark.parametrize("content", ["", "[]", "nonsense", "[" * 100_000])
def test_files_that_are_no_json_objects_are_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json"):
        read_vocabulary(folder, config(400))


def test_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no tokenizer\.model"):
        read_vocabulary(tmp_path, config(400))
