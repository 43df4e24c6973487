"""Short names for models. Each stands for a repository on the hub that was seen to exist."""

from __future__ import annotations

import difflib

ALIASES = {
    "koala-13b": "mradermacher/koala-13B-HF-GGUF",
    "koala-13b-gptq": "TheBloke/koala-13B-GPTQ",
    "llama-7b": "TheBloke/LLaMA-7b-GGUF",
    "llama-13b": "TheBloke/LLaMA-13b-GGUF",
    "tinyllama": "TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF",
    "vicuna-7b": "TheBloke/vicuna-7B-v1.5-GGUF",
    "vicuna-13b": "TheBloke/vicuna-13B-v1.5-GGUF",
}


def repository(name: str) -> str | None:
    """The repository that an alias stands for, whatever its case."""
    return ALIASES.get(name.lower())


def alias_of(repository: str) -> str | None:
    """The short name of a repository, where it has one."""
    return next((alias for alias, target in ALIASES.items() if target.lower() == repository.lower()), None)


def nearest(name: str) -> list[str]:
    """Aliases that a mistyped `name` may have meant, the likeliest first."""
    return difflib.get_close_matches(name.lower(), ALIASES, n=3, cutoff=0.6)
