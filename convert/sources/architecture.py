"""What a checkpoint is, whatever file it came from: a LLaMA-family configuration and named tensors, read lazily.

Every source presents Hugging Face's names and layout (`model.layers.0.self_attn.q_proj.weight`, rotary halves), so that
nothing behind this line knows where weights came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from koala_local.models.configuration import ModelConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor that can be read: shape (rows first) and stored type ("F32", "F16" or "BF16")."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint(Protocol):
    """An opened checkpoint. Nothing large stays in memory; each `read` reads what it is asked for."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors by Hugging Face name, in the order a model runs through them."""

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where tokenizer files lie, or None (the vocabulary then has to be given, or is in the GGUF itself)."""

    @property
    def description(self) -> str:
        """What was opened, for reports: format, files, bytes."""

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or some of its rows (a contiguous slice of the first dimension), in its stored type, on the CPU.
        Raises ModelFileError."""
