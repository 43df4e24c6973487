"""Short names for models. Each stands for a repository on the hub that was seen to exist, with the files named here."""

from __future__ import annotations

ALIASES = {
    "koala-13b": "mradermacher/koala-13B-HF-GGUF",  # Q2_K to Q8_0, such as koala-13B-HF.Q4_K_M.gguf
    "koala-7b": "mradermacher/koala-7B-HF-GGUF",
    "koala-13b-gptq": "TheBloke/koala-13B-GPTQ",  # 4 bits, groups of 128, model.safetensors
    "koala-7b-gptq": "TheBloke/koala-7B-GPTQ",
    "koala-13b-hf": "TheBloke/koala-13B-HF",  # 16 bits, pytorch_model-*.bin: what the ones above were made from
    "koala-7b-hf": "TheBloke/koala-7B-HF",
    "llama-7b": "TheBloke/LLaMA-7b-GGUF",  # the first LLaMA, which Koala was trained from: no chat model
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
    import difflib

    return difflib.get_close_matches(name.lower(), ALIASES, n=3, cutoff=0.6)
