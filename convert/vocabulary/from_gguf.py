"""The vocabulary of a GGUF source, taken over as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig
from koala_local.models.gguf_header import read_header

from .read import Vocabulary

_PREFIX = "tokenizer.ggml."


def read_gguf_vocabulary(path: Path, config: ModelConfig) -> Vocabulary:
    """The vocabulary in the GGUF file `path`. Raises ModelFileError where it has none, or one of another size."""
    read_header(path)  # every size in it is checked before the package below trusts it
    fields = gguf.GGUFReader(path).fields

    def value(key: str, default: Any = None) -> Any:
        return fields[key].contents() if key in fields else default

    tokens = [bytes(fields[f"{_PREFIX}tokens"].parts[index]) for index in _elements(fields, f"{_PREFIX}tokens")]
    model = value(f"{_PREFIX}model")
    if model not in ("llama", "gpt2") or len(tokens) != config.vocabulary_size:
        raise ModelFileError(
            f"{path.name} holds a vocabulary of kind {model!r} with {len(tokens)} tokens for "
            f"{config.vocabulary_size} rows",
            "name the folder of the model's tokenizer with --tokenizer FOLDER",
        )
    return Vocabulary(
        model=model,
        pre=value(f"{_PREFIX}pre"),
        tokens=tokens,
        scores=value(f"{_PREFIX}scores", []),
        types=value(f"{_PREFIX}token_type", []),
        merges=value(f"{_PREFIX}merges", []),
        bos=value(f"{_PREFIX}bos_token_id"),
        eos=value(f"{_PREFIX}eos_token_id"),
        unk=value(f"{_PREFIX}unknown_token_id"),
        pad=value(f"{_PREFIX}padding_token_id"),
        add_bos=value(f"{_PREFIX}add_bos_token", model == "llama"),
        add_space_prefix=value(f"{_PREFIX}add_space_prefix", True),
        chat_template=value("tokenizer.chat_template"),
    )


def _elements(fields: Any, key: str) -> Any:
    return fields[key].data if key in fields else ()
