"""From a checkpoint's tokenizer files to a GGUF vocabulary that gives the same token ids.

Two kinds exist in the LLaMA family: SentencePiece BPE with byte fallback (a `tokenizer.model`, or the same as
`tokenizer.json`), GGUF's "llama"; and byte-level BPE (Llama 3, SmolLM), GGUF's "gpt2", where `pre` names the rule that
splits text before merging. What llama.cpp cannot reproduce is refused, not approximated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from koala_local.dialogue import KOALA_TEMPLATE
from koala_local.errors import ModelFileError
from koala_local.models.configuration import ModelConfig, read_template

from .pretokenizers import byte_level_pre, is_byte_level, space_prefix
from .sentencepiece_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, parse_sentencepiece
from .tokenizer_files import AddedToken, added_tokens, read_bytes, read_json, special_text

_SPACE = "\u2581"
_BYTE_PIECE = re.compile(rb"<0x([0-9A-F]{2})>")
_PADDING_SCORE = -10000.0
_ADDED_SCORE = -1000.0


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as GGUF keeps it: one entry per row of the embedding. `notes` says what was corrected."""

    model: Literal["llama", "gpt2"]
    pre: str | None
    tokens: list[bytes]
    scores: list[float]
    types: list[int]
    merges: list[str]
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    add_bos: bool
    add_space_prefix: bool
    chat_template: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Trained:
    """The trained vocabulary by id, before added tokens and padding."""

    model: Literal["llama", "gpt2"]
    pieces: dict[int, tuple[bytes, float, int]]
    add_space_prefix: bool
    pre: str | None = None
    merges: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # special ids that the model file itself names
    add_bos: bool | None = None
    notes: list[str] = field(default_factory=list)


def read_vocabulary(folder: Path, config: ModelConfig) -> Vocabulary:
    """The vocabulary of the tokenizer files in `folder`, padded to the embedding's rows.

    Raises ModelFileError when there is no tokenizer, when it has more tokens than the embedding has rows, when a file
    is damaged, and for tokenizers that llama.cpp does not have.
    """
    settings = read_json(folder / "tokenizer_config.json")
    trained = _read_trained(folder)
    notes = trained.notes
    tokens, scores, types = _table(trained, added_tokens(folder), config.vocabulary_size, notes)
    if trained.model == "llama":
        _check_bytes(tokens, types)
    ids = _special_ids(folder, settings, trained, tokens, config, notes)
    prefix = settings.get("add_prefix_space")
    return Vocabulary(
        trained.model,
        trained.pre,
        tokens,
        scores if trained.model == "llama" else [],
        types,
        trained.merges,
        **ids,
        add_bos=_add_bos(settings, trained, ids["bos"]),
        add_space_prefix=prefix if trained.model == "llama" and isinstance(prefix, bool) else trained.add_space_prefix,
        chat_template=_template(folder, config, notes),
        notes=notes,
    )


def _read_trained(folder: Path) -> _Trained:
    model, description = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.is_file():
        try:
            return _from_sentencepiece(model)
        except ModelFileError as error:
            if not description.is_file() or not error.message.startswith("not a SentencePiece"):
                raise
    if description.is_file():
        return _from_tokenizer_json(description)
    raise ModelFileError(f"{folder} has no tokenizer.model and no tokenizer.json", "copy the tokenizer's files there")


def _from_sentencepiece(path: Path) -> _Trained:
    model = parse_sentencepiece(read_bytes(path))
    if model.model_type != BPE:
        raise ModelFileError(f"{path} is not a BPE model", "LLaMA's tokenizers are; Unigram models are not converted")
    if model.remove_extra_whitespaces or model.has_character_map:
        raise ModelFileError(
            f"{path} rewrites text before it splits it, which llama.cpp does not",
            "LLaMA's tokenizers take text as it is",
        )
    ids = {"bos": model.bos, "eos": model.eos, "unk": model.unk, "pad": model.pad}
    pieces, notes = dict(enumerate(model.pieces)), []
    own = {id_: piece for id_, piece in pieces.items() if piece[2] == USER_DEFINED}
    if own:
        notes.append(f"{len(own)} pieces are user-defined: llama.cpp puts a space after each, SentencePiece does not")
    for id_, (text, score, type_) in own.items():
        pieces[id_] = (text.replace(_SPACE.encode(), b" "), score, type_)  # matched before spaces are escaped
    known = {key: id_ for key, id_ in ids.items() if id_ >= 0}
    return _Trained("llama", pieces, model.add_dummy_prefix, ids=known, notes=notes)


def _from_tokenizer_json(path: Path) -> _Trained:
    description = read_json(path)
    model = description.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(vocabulary, dict):
        raise ModelFileError(f"{path} is not a BPE tokenizer", "LLaMA's tokenizers are")
    merges = _merges(model.get("merges"), path)
    pieces = {_id(id_, path): text for text, id_ in vocabulary.items()}
    if len(pieces) != len(vocabulary):
        raise ModelFileError(f"{path} gives one id to two tokens", "fetch the file again")
    if is_byte_level(description):
        table = {id_: (text.encode("utf-8", "replace"), 0.0, NORMAL) for id_, text in pieces.items()}
        pre, notes = byte_level_pre(description)
        trained = _Trained("gpt2", table, False, pre, [f"{left} {right}" for left, right in merges], notes=notes)
    else:
        trained = _sentencepiece_like(description, model, pieces, merges)
    first = _first_special(description)
    trained.add_bos = None if first is None else bool(first)
    named = {"bos": first or "<s>", "eos": "</s>"} if trained.model == "llama" else {"bos": first}
    by_text = _added_ids(description) | vocabulary
    trained.ids |= {key: by_text[text] for key, text in named.items() if text in by_text}
    return trained


def _id(value: Any, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ModelFileError(f"{path} has a token with the id {str(value)[:40]!r}", "fetch the file again")
    return value


def _merges(value: Any, path: Path) -> list[tuple[str, str]]:
    """Merges in rank order; files write them as "a b" or as ["a", "b"]."""
    items: list[Any] = value if isinstance(value, list) else [None]
    pairs = [item.split(" ") if isinstance(item, str) else item for item in items]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ModelFileError(f"{path} has a merge that is not a pair: {str(pair)[:80]!r}", "fetch the file again")
    return [(left, right) for left, right in pairs]


def _sentencepiece_like(
    description: Mapping[str, Any], model: Mapping[str, Any], pieces: Mapping[int, str], merges: list[tuple[str, str]]
) -> _Trained:
    """A tokenizer.json made from a SentencePiece model. Its scores are gone, but their order is in the merges."""
    if not model.get("byte_fallback") or model.get("ignore_merges"):
        raise ModelFileError(
            "tokenizer.json is neither byte-level BPE nor BPE with byte fallback", "no LLaMA has such a one"
        )
    prefix, notes = space_prefix(description)
    ranks = _ranks(merges, set(pieces.values()), set(_added_ids(description)))
    unknown = model.get("unk_token")
    lowest = -float(len(merges))
    table = {
        id_: (text.encode("utf-8", "replace"), *_score_and_type(text, unknown, ranks.get(text, lowest)))
        for id_, text in pieces.items()
    }
    ids = {id_ for id_, text in pieces.items() if text == unknown}
    return _Trained("llama", table, prefix, ids={"unk": min(ids)} if ids else {}, notes=notes)


def _added_ids(description: Mapping[str, Any]) -> dict[str, Any]:
    listed = description.get("added_tokens")
    items = listed if isinstance(listed, list) else []
    return {str(item.get("content")): item.get("id") for item in items if isinstance(item, dict)}


def _score_and_type(text: str, unknown: Any, score: float) -> tuple[float, int]:
    if text == unknown:
        return 0.0, UNKNOWN
    if _BYTE_PIECE.fullmatch(text.encode("utf-8", "replace")):
        return 0.0, BYTE
    return score, NORMAL


def _ranks(merges: Sequence[tuple[str, str]], texts: set[str], added: set[str]) -> dict[str, float]:
    """A score for every merged token. llama.cpp joins any two neighbours whose union is a token, best score first: that
    is the same only if all splits of a token are merges, one after the other. Raises ModelFileError otherwise."""
    scores: dict[str, float] = {}
    splits: dict[str, int] = {}
    previous = ""
    for rank, (left, right) in enumerate(merges):
        text = left + right
        if text in scores and text != previous:
            raise _not_sentencepiece(text)
        scores.setdefault(text, -float(rank))
        splits[text] = splits.get(text, 0) + 1
        previous = text
    for text in texts - added:
        possible = sum(text[:cut] in texts and text[cut:] in texts for cut in range(1, len(text)))
        if possible > splits.get(text, 0):
            raise _not_sentencepiece(text)
    return scores


def _not_sentencepiece(text: str) -> ModelFileError:
    return ModelFileError(
        f"tokenizer.json merges {text[:40]!r} in an order that SentencePiece cannot have, nor llama.cpp follow",
        "if the model has a tokenizer.model, put it into the folder",
    )


def _first_special(description: Mapping[str, Any]) -> str | None:
    """The special token that the post-processor puts first, "" when it puts none, None where it does not say."""
    processor = description.get("post_processor")
    if not isinstance(processor, dict):
        return None
    steps = processor.get("processors") if processor.get("type") == "Sequence" else [processor]
    for step in steps if isinstance(steps, list) else []:
        match step:
            case {"single": [{"SpecialToken": {"id": str(text)}}, *_]}:
                return text
            case {"single": [*_]}:
                return ""
    return None


def _table(
    trained: _Trained, added: Sequence[AddedToken], rows: int, notes: list[str]
) -> tuple[list[bytes], list[float], list[int]]:
    """Token, score and type of every row: the trained vocabulary, then added tokens, the rest padding."""
    table = dict(trained.pieces)
    for token in added:
        previous = table.get(token.id)
        text = token.text.encode("utf-8", "replace")
        if previous is not None and previous[2] in (UNKNOWN, BYTE) and previous[0] == text:
            continue
        if previous is not None and previous[0] != text:
            notes.append(
                f"token {token.id} is {token.text!r}, an added token, and not {previous[0].decode(errors='replace')!r}"
            )
        if trained.model == "llama" and not token.special:
            text = token.text.replace(_SPACE, " ").encode("utf-8", "replace")
        table[token.id] = (text, _ADDED_SCORE, CONTROL if token.special else USER_DEFINED)
    if max(table, default=0) >= rows:
        last = max(table)
        raise ModelFileError(
            f"token {last} ({table[last][0][:40].decode(errors='replace')!r}) has no row: the embedding has {rows}",
            "the tokenizer belongs to another model, or added_tokens.json has a token that the model never learned",
        )
    if len(table) < rows:
        notes.append(
            f"the embedding has {rows} rows and the tokenizer {len(table)} tokens: {rows - len(table)} unused added"
        )
    padded = [table.get(id_, (b"[PAD%d]" % id_, _PADDING_SCORE, UNUSED)) for id_ in range(rows)]
    return [text for text, _, _ in padded], [score for _, score, _ in padded], [type_ for _, _, type_ in padded]


def _check_bytes(tokens: Sequence[bytes], types: Sequence[int]) -> None:
    """llama.cpp ends the process over a character that has neither a token nor byte tokens."""
    held = {text for text, type_ in zip(tokens, types, strict=True) if type_ == BYTE}
    if len({match[1] for text in held if (match := _BYTE_PIECE.fullmatch(text))}) < 256:
        raise ModelFileError(
            "the tokenizer has no byte fallback", "LLaMA's tokenizers have 256 byte tokens; llama.cpp needs them"
        )


def _special_ids(
    folder: Path,
    settings: Mapping[str, Any],
    trained: _Trained,
    tokens: Sequence[bytes],
    config: ModelConfig,
    notes: list[str],
) -> dict[str, int | None]:
    """bos, eos, unk and pad: what tokenizer_config.json names, else the model file's own, else config.json's."""
    named = read_json(folder / "special_tokens_map.json")
    by_text = {text: id_ for id_, text in enumerate(tokens)}
    fallbacks = {"bos": config.bos, "eos": config.eos[0] if config.eos else None}
    ids: dict[str, int | None] = {}
    for key in ("bos", "eos", "unk", "pad"):
        texts = (special_text(settings, f"{key}_token"), special_text(named, f"{key}_token"))
        found = next((by_text[text.encode()] for text in texts if text and text.encode() in by_text), None)
        if found is None:
            found = trained.ids.get(key, fallbacks.get(key))
        ids[key] = found if found is not None and 0 <= found < len(tokens) else None
    _compare("BOS", ids["bos"], () if config.bos is None else (config.bos,), notes)
    _compare("EOS", ids["eos"], config.eos, notes)
    return ids


def _compare(what: str, token: int | None, configured: Sequence[int], notes: list[str]) -> None:
    if configured and token not in configured:
        wrong = ", ".join(map(str, configured))
        notes.append(f"config.json says that {what} is {wrong}; the tokenizer says {token}, and is believed")


def _add_bos(settings: Mapping[str, Any], trained: _Trained, bos: int | None) -> bool:
    says = settings.get("add_bos_token")
    if isinstance(says, bool):
        return says and bos is not None
    default = trained.model == "llama" if trained.add_bos is None else trained.add_bos
    return default and bos is not None


def _template(folder: Path, config: ModelConfig, notes: list[str]) -> str | None:
    template = read_template(folder)
    if template is None and ("koala" in config.name.lower() or "koala" in folder.name.lower()):
        notes.append("the checkpoint has no chat template: Koala's was written")
        return KOALA_TEMPLATE
    return template
