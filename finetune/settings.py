"""The keys of a training run: a TOML file's, overruled by KEY=VALUE words of the command line.

A key of a table is written with a dot: `model.hidden_size=512`, `lora.rank=16`, `weights.sharegpt=2`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from koala_local.errors import KoalaError

from .data.packing import LossNorm


class SettingsError(KoalaError):
    """A key that there is not, or a value that it cannot have."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A LLaMA to train from scratch, in place of `--base`."""

    hidden_size: int
    feed_forward_size: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    tied_embeddings: bool = False
    norm_epsilon: float = 1e-6
    rope_base: float = 10_000.0


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters on every linear layer of the blocks; `four_bit` keeps the base in NF4 (QLoRA)."""

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    four_bit: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the numbers of a run. Counts are of steps, sizes of sequences."""

    epochs: float = 2.0
    max_steps: int | None = None  # None: as many as the epochs have
    sequence_length: int = 2048
    global_batch: int = 32  # sequences of each optimizer step, over all ranks
    micro_batch: int = 1  # sequences of each forward pass, on each rank
    learning_rate: float = 2e-5
    warmup_steps: int = 100
    min_learning_rate: float = 0.1  # of the peak, at the end of the cosine
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    dropout: float = 0.05  # residual and embedding
    attention_dropout: float = 0.0
    loss_norm: LossNorm = "token"
    seed: int = 42
    save_every: int = 200
    keep: int = 2  # checkpoints
    eval_every: int = 200  # 0: only at the end
    spike_limit: float = (
        3.0  # nats over what the last steps' losses vary by, at which one stops the run (twice that at first); 0: none
    )
    recompute: Literal["none", "selective", "full"] = "selective"  # of activations
    compile: bool = False
    deterministic: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    master_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    compute_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: bfloat16 on CUDA, else float32
    lora: LoraSettings | None = None
    model: ModelShape | None = None
    weights: dict[str, float] = field(default_factory=dict)  # times per epoch of each source's examples; unnamed: 1


# What may differ when a run is resumed: where and how it is computed, watched and kept. But for dropout's draws, which
# go by micro-batch, the numbers stay the same up to the order of additions.
FREE_KEYS = frozenset(
    ("micro_batch", "save_every", "keep", "eval_every", "spike_limit", "recompute", "compile", "deterministic")
)

_TABLES: dict[str, type] = {"lora": LoraSettings, "model": ModelShape}
_COUNT = (1, 2**31 - 1)
_SHARE = (0.0, 1.0)
_LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("max_steps", "global_batch", "micro_batch", "save_every", "keep"), _COUNT),
    **dict.fromkeys(("beta1", "beta2", "dropout", "attention_dropout", "lora.dropout"), (0.0, 0.999999)),
    **dict.fromkeys(("min_learning_rate", "weight_decay"), _SHARE),
    **dict.fromkeys(("model.layers", "model.heads", "model.kv_heads", "lora.rank"), (1, 65_536)),
    **dict.fromkeys(("model.hidden_size", "model.feed_forward_size"), (1, 2**20)),
    **dict.fromkeys(("sequence_length", "model.context"), (2, 2**24)),
    "epochs": (1e-6, 1e6),
    **dict.fromkeys(("warmup_steps", "eval_every"), (0, 2**31 - 1)),
    "learning_rate": (1e-12, 10.0),
    "clip": (1e-9, 1e9),
    "seed": (0, 2**63 - 1),
    "spike_limit": (0.0, 1e9),
    "lora.alpha": (1e-6, 1e6),
    "model.norm_epsilon": (1e-12, 1.0),
    "model.rope_base": (1.0, 1e9),
    "weights": (0.0, 1e6),
}


def read_settings(
    file: Path | None = None,
    words: Sequence[str] = (),
    *,
    lora: bool = False,
    four_bit: bool = False,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Settings:
    """The settings of the file with those of the words over them; `lora` and `four_bit` (QLoRA) stand for the options
    of these names. `defaults`, such as a recipe's epochs and weights, are under both. Raises SettingsError."""
    tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in defaults.items()}
    for key, value in (_read_file(file) if file else {}).items():
        below = tree.get(key)
        tree[key] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
    for word in words:
        _put(tree, *_split(word))
    if lora or four_bit:
        table = tree.setdefault("lora", {})
        if isinstance(table, dict) and four_bit:
            table["four_bit"] = True
    return settings_from(tree)


def settings_from(tree: Mapping[str, Any]) -> Settings:
    """The settings of a nested mapping, such as `as_tree` gives. Raises SettingsError."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key in _TABLES:
            values[key] = None if value is None else _table(key, value)
        elif key == "weights":
            values[key] = {name: _value(f"weights.{name}", each, float) for name, each in _mapping(key, value).items()}
        else:
            values[key] = _value(key, value, _hint(Settings, key))
    settings = Settings(**values)
    _check_together(settings)
    return settings


def as_tree(settings: Settings) -> dict[str, Any]:
    """The settings as nested mappings of plain values: what `settings_from` reads."""
    return asdict(settings)


def differences(before: Settings, now: Settings) -> list[str]:
    """What differs and decides numbers, each as "key was X and is Y"."""
    old, new = dict(_leaves(as_tree(before))), dict(_leaves(as_tree(now)))
    keys = [key for key in _unequal(old, new) if key not in FREE_KEYS]
    return [f"{key} was {_shown(old.get(key))} and is {_shown(new.get(key))}" for key in keys]


def changed_keys(before: str, now: str) -> list[str]:
    """What differs between two `as_tree` in JSON."""
    return _unequal(dict(_leaves(json.loads(before))), dict(_leaves(json.loads(now))))


def _unequal(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{str(path)!r} cannot be read: {error.strerror}", "check the path") from None
    except (ValueError, RecursionError) as error:  # also of bytes that are no UTF-8, and of endless numbers
        raise SettingsError(f"{str(path)!r} is not valid TOML: {error}", "its lines are KEY = VALUE") from None


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise SettingsError(f"{word!r} is no setting", "write KEY=VALUE, such as epochs=3")
    return key.strip(), value.strip()


def _put(tree: dict[str, Any], key: str, text: str) -> None:
    """Set the key of a word; its value is read as TOML would read it, or is the text itself."""
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except (ValueError, RecursionError):
        value = {"True": True, "False": False}.get(text, text)
    table, dot, name = key.partition(".")
    if not dot:
        tree[key] = value
    elif isinstance(inner := tree.setdefault(table, {}), dict):
        inner[name] = value


def _table(name: str, value: Any) -> Any:
    kind = _TABLES[name]
    values = {key: _value(f"{name}.{key}", each, _hint(kind, key, name)) for key, each in _mapping(name, value).items()}
    try:
        return kind(**values)
    except TypeError:
        needed = [f"{name}.{each.name}" for each in fields(kind) if each.default is MISSING and each.name not in values]
        raise SettingsError(f"not set: {', '.join(needed)}", "a model from scratch needs its whole shape") from None


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(f"{key} is {value!r}, not a table", f"write {key}.NAME=VALUE")
    return value


def list_keys(kind: type = Settings, prefix: str = "") -> list[str]:
    """Every key, dotted."""
    names = [each.name for each in fields(kind)]
    if prefix:
        return [f"{prefix}.{name}" for name in names]
    return [name for name in names if name not in _TABLES] + [
        key for table, inner in _TABLES.items() for key in list_keys(inner, table)
    ]


def _hint(kind: type, name: str, prefix: str = "") -> Any:
    hints = get_type_hints(kind)
    if name in hints:
        return hints[name]
    key = f"{prefix}.{name}" if prefix else name
    near = get_close_matches(key, list_keys(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {', '.join(list_keys())}"
    raise SettingsError(f"there is no setting called {key!r}", hint)


def _value(key: str, value: Any, hint: Any) -> Any:
    """The value in the type of its key, within its limits. Raises SettingsError."""
    if get_origin(hint) in (UnionType, Union):
        if value is None or value == "none":
            return None
        hint = next(each for each in get_args(hint) if each is not NoneType)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise _wrong(key, value, f"one of {', '.join(get_args(hint))}")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise _wrong(key, value, "true or false")
        return value
    return _number(key, value, hint)


def _number(key: str, value: Any, kind: type) -> Any:
    what = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not isinstance(value, int)):
        raise _wrong(key, value, what)
    low, high = _LIMITS[key if key in _LIMITS else key.partition(".")[0]]
    if not low <= value <= high:  # NaN is not either
        raise _wrong(key, value, f"{what} from {low:g} to {high:g}")
    return kind(value)


def _wrong(key: str, value: Any, what: str) -> SettingsError:
    return SettingsError(f"{key} is {str(value)[:80]!r}, not {what}", f"set {key} to {what}")


def _check_together(settings: Settings) -> None:
    """What no value breaks on its own."""
    shape = settings.model
    if shape is None:
        return
    if settings.lora is not None:
        what = "adapters (lora) cannot go with model.* keys: new weights have nothing to adapt"
        raise SettingsError(what, "give --base in place of model.*, or leave out --lora, --qlora and lora.* keys")
    if shape.hidden_size % (2 * shape.heads):
        what = f"model.hidden_size={shape.hidden_size} is no even multiple of model.heads={shape.heads}"
        raise SettingsError(what, "each head has the same even number of dimensions")
    if shape.heads % shape.kv_heads:
        what = f"model.heads={shape.heads} is no multiple of model.kv_heads={shape.kv_heads}"
        raise SettingsError(what, "each key-value head serves the same number of heads")
    if settings.sequence_length > shape.context:
        what = f"sequence_length={settings.sequence_length} is over model.context={shape.context}"
        raise SettingsError(what, "make the context as long, or the sequences shorter")
