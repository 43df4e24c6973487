"""Koala Nano, the bundled miniature chat model: where its file lies. See `MODEL_CARD.md`."""

from __future__ import annotations

from pathlib import Path

MODEL_PATH: Path = Path(__file__).with_name("koala-nano-q4_k_m.gguf")
