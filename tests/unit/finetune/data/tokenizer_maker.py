"""A throw-away SentencePiece tokenizer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentencepiece

SENTENCES = [
    "BEGINNING OF CONVERSATION: USER: what is a koala? GPT: a koala is a small animal of the trees",
    "An Unhelpful Answer: no. A chat between a curious user and an assistant ### Instruction: ### Response:",
    "the cat sat on the mat and the hat; was it a cat? it was a cat, e\u0301 1 2 3 4 5 6 7 8 9 0",
]


def train_sentencepiece(path: Path, **options: Any) -> Path:
    """Write the model to `path`; `options` are those of its trainer."""
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    }
    settings |= {"remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SENTENCES * 4), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path
