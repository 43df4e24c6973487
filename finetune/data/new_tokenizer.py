"""A tokenizer for a model that is trained from scratch: SentencePiece BPE of LLaMA's kind, made of a user's dialogues
and plain texts.

As LLaMA's: byte fallback, digits apart, a leading space, no normalization, <unk> 0, <s> 1, </s> 2.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

from koala_local.disk import write_whole
from koala_local.errors import KoalaError

from .examples import Example, texts
from .sources import OWN, read_source

_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": True,
    "clean_up_tokenization_spaces": False,
}
_PRINTABLE = "".join(map(chr, (*range(0x21, 0x7F), *range(0xC0, 0x100)))) + "‘’“”–—…€"
_MOST, _SEED = 200_000, 42  # lines that are looked at, and what draws them
_LONGEST_LINE = 4096  # bytes; longer ones are cut in parts: sentencepiece would leave them out


class NewTokenizerError(KoalaError):
    """A tokenizer that cannot be made of these texts."""


def train_tokenizer(paths: Sequence[Path], size: int, out: Path) -> int:
    """Write the folder `out` with a tokenizer.model of `size` pieces and a tokenizer_config.json; return how many lines
    it was made of: at most 200,000 of those of the files' dialogues and texts, drawn at random. The same files and size
    give the same bytes.

    Raises NewTokenizerError, and what reading the files raises."""
    if out.exists():
        raise NewTokenizerError(f"{str(out)!r} exists already", "give another name with -o")
    lines = _sample(_lines(paths))
    if not lines:
        raise NewTokenizerError("the files hold no dialogue and no text", f"give {OWN.schema}")
    model = _train(lines, size)
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    write_whole(partial / "tokenizer.model", [model])
    write_whole(partial / "tokenizer_config.json", [json.dumps(_CONFIG, indent=2).encode()])
    os.rename(partial, out)
    return len(lines)


def _lines(paths: Sequence[Path]) -> Iterator[str]:
    for found in read_source(OWN, paths, 0):
        if isinstance(found, Example):
            for line in "\n".join(texts(found.content)).splitlines():
                if line.strip():
                    yield from _parts(line.encode())


def _parts(line: bytes) -> Iterator[str]:
    for start in range(0, len(line), _LONGEST_LINE):
        yield line[start : start + _LONGEST_LINE].decode(errors="ignore")


def _sample(lines: Iterable[str]) -> list[str]:
    """At most `_MOST` of the lines, each with the same chance, in one pass."""
    random, kept = Random(_SEED), []
    for number, line in enumerate(lines):
        if number < _MOST:
            kept.append(line)
        elif (place := random.randrange(number + 1)) < _MOST:
            kept[place] = line
    return kept


def _train(lines: Sequence[str], size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            byte_fallback=True,
            split_digits=True,
            required_chars=_PRINTABLE,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:  # its texts are C++ assertions
        what = f"no tokenizer of {size} pieces can be made of {len(lines):,} lines"
        raise NewTokenizerError(what, _hint(str(error))) from None
    return model.getvalue()


def _hint(error: str) -> str:
    if found := re.search(r"too high .* <= (\d+)", error):
        return f"choose a smaller size, {found[1]} at most, or more text"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return f"choose a larger size, {found[1]} at least: every byte and every common character is a piece"
    return f"choose another size, or more text ({error[-120:].strip()})"
