"""What a chat needs of a model: token ids in, token ids out. An engine knows no dialogue.

An engine holds its KV cache in `slots` numbered sequences. A slot is a list of tokens at positions 0, 1, 2, ..; all
slots share `context_size` cells. Where `shares_cells` is true a copied prefix costs nothing until the copies part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from koala_local.engine.sampling import Sampling
from koala_local.errors import KoalaError


class Vocabulary(NamedTuple):
    """The special tokens of a vocabulary, and a key that says whose ids are whose."""

    key: str  # SHA-256 over every token's text and type: ids mean the same only under the same key
    size: int
    bos: int | None
    eos: int | None
    add_bos: bool
    adds_space: bool  # SentencePiece's dummy prefix: every string is tokenized with a space before it
    control: Mapping[str, int]  # control tokens by their text
    user_defined: Mapping[str, int]  # matched in any text, even with special tokens unparsed
    unknown: int | None = None
    ends: frozenset[int] = frozenset()  # the tokens that end a reply
    longest: int = 1024  # bytes: no token stands for more text

    def __repr__(self) -> str:
        return f"Vocabulary({self.size} tokens, {self.key})"


class Sampler(Protocol):
    """A seeded chain of samplers that has seen the tokens before the reply."""

    def sample(self) -> int:
        """Draw the next token from the logits of the last evaluated one, and remember it."""

    def close(self) -> None: ...


class Engine(Protocol):
    """A loaded model with its KV cache. Not for two threads at once, `interrupt` apart."""

    name: str
    vocabulary: Vocabulary
    context_size: int  # tokens, over all slots
    trained_context: int
    placed: str  # in words, where the weights lie
    slots: int
    can_shift: bool
    shares_cells: bool
    evaluated_tokens: int  # every token evaluated since the model was loaded
    cache_key: str  # what must be equal for a saved KV cache to be valid: model, context, KV type, flash attention

    def tokenize(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of `text`, no special token parsed, no BOS. `continues`: without SentencePiece's dummy prefix."""

    def piece(self, token: int) -> bytes:
        """The bytes of a token, possibly half a character; empty for a control token."""

    def evaluate(self, ids: Sequence[int], *, slot: int, position: int) -> None:
        """Evaluate `ids` at `position`, which is the slot's length. Raises Interrupted; `evaluated_tokens` then says
        how many were done, the slot holds exactly these."""

    def stepper(self, slot: int) -> Callable[[int, int], None]:
        """A function that evaluates a token at a position, as `evaluate` does. Good until another is made."""

    def sampler(self, sampling: Sampling, seed: int, before: Sequence[int]) -> Sampler:
        """A sampler whose penalties have seen the tokens `before` the reply."""

    def crop(self, slot: int, length: int) -> int:
        """Keep the first `length` tokens of a slot; returns how many remain, fewer where a memory cannot be cut."""

    def copy(self, source: int, target: int) -> None:
        """Make `target` equal to `source`."""

    def shift(self, slot: int, start: int, end: int, last: int) -> None:
        """Forget positions [start, end) and move what follows down; `last`, the slot's last token, is evaluated again.
        Approximate: the moved keys saw what is gone. Only where `can_shift`."""

    def save(self, slot: int, ids: Sequence[int], path: Path) -> None:
        """Write a slot's KV and token ids to `path` (not atomic). Raises OSError."""

    def load(self, slot: int, path: Path) -> list[int]:
        """Read what `save` wrote and return its ids. The file must have been checked before. Raises OSError."""

    def interrupt(self) -> None:
        """From any thread: make the running `evaluate` stop soon. Stays set until `resume`."""

    def resume(self) -> None:
        """Clear `interrupt`."""

    def close(self) -> None: ...


def lost(name: str, held: Sequence[str]) -> Exception:
    """What an engine raises that has no attribute `name`: those in `held` went when it was closed."""
    return KoalaError("no model is loaded", "/model FILE loads one") if name in held else AttributeError(name)
