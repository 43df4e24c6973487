"""A tiny LLaMA-architecture GGUF with random weights: llama.cpp loads it and decodes; made in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

CONTROL = int(gguf.TokenType.CONTROL)
USER_DEFINED = int(gguf.TokenType.USER_DEFINED)

_SPACE = "\u2581"  # SentencePiece writes a space like this
_LETTERS = "etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLUCMFWYPVBGKJQXZ0123456789.,:;!?'\"()-<>/|[]_#"
_PIECES = f"th the he in er an re on at en {_SPACE}t {_SPACE}a {_SPACE}the {_SPACE}an {_SPACE}h {_SPACE}he".split()


def vocabulary(extra_tokens: Sequence[tuple[str, int]] = ()) -> list[tuple[bytes, float, int]]:
    """(text, score, type) per token, SentencePiece style: <unk> <s> </s>, 256 bytes, pieces, letters, extra tokens."""
    kind = gguf.TokenType
    tokens = [(b"<unk>", 0.0, int(kind.UNKNOWN)), (b"<s>", 0.0, CONTROL), (b"</s>", 0.0, CONTROL)]
    tokens += [(f"<0x{byte:02X}>".encode(), 0.0, int(kind.BYTE)) for byte in range(256)]
    pieces = [*_PIECES, _SPACE, *_LETTERS, "\u00e9", "\u4f60"]
    tokens += [(piece.encode(), -float(rank), int(kind.NORMAL)) for rank, piece in enumerate(pieces)]
    return tokens + [(text.encode(), 0.0, type_) for text, type_ in extra_tokens]


def write_settings(
    writer: gguf.GGUFWriter,
    *,
    context: int = 512,
    layers: int,
    hidden: int,
    feed_forward: int,
    heads: int,
    kv_heads: int,
) -> None:
    """What a header says of a model beside its tensors."""
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)


def make_model(
    path: Path,
    *,
    name: str = "tiny",
    context: int = 512,
    chat_template: str | None = None,
    extra_tokens: Sequence[tuple[str, int]] = (),
    seed: int = 0,
    embedding: int = 64,
    layers: int = 2,
    heads: int = 4,
    feed_forward: int = 128,
) -> Path:
    """Write the model to `path` and return it. `extra_tokens` are (text, token type): CONTROL, USER_DEFINED, .."""
    tokens = vocabulary(extra_tokens)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    sizes = {"hidden": embedding, "feed_forward": feed_forward, "heads": heads, "kv_heads": heads}
    write_settings(writer, context=context, layers=layers, **sizes)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, tokens, chat_template)
    _add_tensors(writer, len(tokens), embedding=embedding, layers=layers, feed_forward=feed_forward, seed=seed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, tokens: list[tuple[bytes, float, int]], chat_template: str | None) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([type_ for _, _, type_ in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _add_tensors(
    writer: gguf.GGUFWriter, words: int, *, embedding: int, layers: int, feed_forward: int, seed: int
) -> None:
    random = np.random.default_rng(seed)

    def matrix(name: str, rows: int, columns: int) -> None:
        weights = random.standard_normal((rows, columns), dtype=np.float32)
        writer.add_tensor(name, weights / np.float32(columns**0.5))

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(embedding, dtype=np.float32))

    matrix("token_embd.weight", words, embedding)
    norm("output_norm.weight")
    matrix("output.weight", words, embedding)
    for layer in range(layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm.weight")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"{block}.{part}.weight", embedding, embedding)
        norm(f"{block}.ffn_norm.weight")
        matrix(f"{block}.ffn_gate.weight", feed_forward, embedding)
        matrix(f"{block}.ffn_up.weight", feed_forward, embedding)
        matrix(f"{block}.ffn_down.weight", embedding, feed_forward)
