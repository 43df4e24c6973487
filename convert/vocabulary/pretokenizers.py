"""Which of llama.cpp's text-splitting rules a tokenizer.json asks for.

A byte-level tokenizer splits text with regular expressions before it merges; llama.cpp has the common ones built in, by
name. A description is compared step by step with those known to be equal, or nearly (a note says so); anything else is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from koala_local.errors import ModelFileError

_Step = tuple[object, ...]
_SPACE = "\u2581"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = f"{_CONTRACTIONS}|{_WORDS_AND_REST}" % r"\p{N}{1,3}"
_QWEN_2 = f"{_CONTRACTIONS}|{_WORDS_AND_REST}" % r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(regex: str) -> _Step:
    return ("Split", regex)


_NFC_NOTE = "the tokenizer composes characters (Unicode NFC) first; llama.cpp takes text as it comes"
_TEKKEN_NOTE = (
    "the tokenizer splits words between small letters and capitals; llama.cpp tells them apart in ASCII alone: ids of "
    "other words may differ"
)
_GPT_2_STEP: _Step = ("ByteLevel", True)
_BYTES_ONLY: _Step = ("ByteLevel", False)
_DIGITS: _Step = ("Digits", True)
# steps, and whether merges are ignored for a word that is a token -> llama.cpp's name
_KNOWN: dict[tuple[tuple[_Step, ...], bool], str] = {
    ((_GPT_2_STEP,), False): "gpt-2",
    ((_DIGITS, _GPT_2_STEP), False): "smollm",
    ((_split(_LLAMA_3), _BYTES_ONLY), True): "llama-bpe",
    ((_split(_LLAMA_3), _BYTES_ONLY), False): "dbrx",
    ((_split(_QWEN_2), _BYTES_ONLY), False): "qwen2",
    ((_split(_TEKKEN), _BYTES_ONLY), True): "tekken",
}


def _steps(part: Any, many: str) -> list[Any]:
    """A pre-tokenizer or normalizer as a list of steps; `many` is where a sequence keeps them."""
    if part is None:
        return []
    if isinstance(part, dict) and part.get("type") == "Sequence":
        inner = part.get(many)
        return [step for item in inner for step in _steps(item, many)] if isinstance(inner, list) else [inner]
    return [part]


def _canonical(step: Any) -> _Step:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return ("ByteLevel", step.get("use_regex", True))
        case {"type": "Digits"}:
            return ("Digits", step.get("individual_digits", False))
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
            return ("Split", regex)
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True}:
            return ("Split", regex)
    return ("unknown",)


def is_byte_level(description: Mapping[str, Any]) -> bool:
    """Whether tokens are written in GPT-2's byte alphabet."""
    steps = _steps(description.get("pre_tokenizer"), "pretokenizers")
    return any(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in steps)


def byte_level_pre(description: Mapping[str, Any]) -> tuple[str, list[str]]:
    """llama.cpp's name for a byte-level tokenizer's splitting, and notes. Raises ModelFileError for one it lacks."""
    steps = tuple(_canonical(step) for step in _steps(description.get("pre_tokenizer"), "pretokenizers"))
    model = description.get("model")
    ignore_merges = isinstance(model, dict) and model.get("ignore_merges") is True
    name = _KNOWN.get((steps, ignore_merges))
    if name is None:
        raise ModelFileError(
            f"the tokenizer splits text in a way that is not known: {str(description.get('pre_tokenizer'))[:300]}",
            f"known: {', '.join(_KNOWN.values())}; the token ids would differ with any of them",
        )
    normalizers = _steps(description.get("normalizer"), "normalizers")
    notes = [_TEKKEN_NOTE] if name == "tekken" else []
    if normalizers == [{"type": "NFC"}]:
        return name, [*notes, _NFC_NOTE]
    if normalizers:
        raise _unknown_normalizer(description)
    return name, notes


def space_prefix(description: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a SentencePiece-like tokenizer puts a space before text, and notes. Raises ModelFileError for one that
    prepares text in another way."""
    normalizers = _steps(description.get("normalizer"), "normalizers")
    splits = _steps(description.get("pre_tokenizer"), "pretokenizers")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if not splits and normalizers in ([replace], [prepend, replace]):
        return prepend in normalizers, []
    match splits:
        case [{"type": "Metaspace", "replacement": "\u2581", "split": False, **rest}] if not normalizers:
            scheme = rest.get("prepend_scheme", "always")
            note = "llama.cpp writes a space after every control token; transformers only at the start of a text"
            return scheme != "never", [note] if scheme == "first" else []
    raise _unknown_normalizer(description)


def _unknown_normalizer(description: Mapping[str, Any]) -> ModelFileError:
    found = f"{description.get('normalizer')} {description.get('pre_tokenizer')}"
    return ModelFileError(
        f"the tokenizer prepares text in a way that llama.cpp does not have: {found[:300]}", "no LLaMA has such a one"
    )
