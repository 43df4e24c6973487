"""What the command line hands to every rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .data.corpus import open_corpus
from .data.packing import PackPlan, make_plan
from .data.tokens import DialogueTokenizer
from .settings import Settings


@dataclass(frozen=True, slots=True)
class Job:
    """A run as the command line has it, the data being prepared."""

    settings: Settings
    base: Path | None  # None: from scratch
    tokenizer: DialogueTokenizer  # read once; a rank that is started reads it again
    corpus: Path
    out: Path
    gpus: int  # of each node; 0: the processor
    resume: bool = False
    price: float | None = None  # dollars an hour of all GPUs

    def packed(self) -> PackPlan:
        """What is trained on. Raises KoalaError for data that cannot be packed, or was made for another tokenizer."""
        corpus, settings = open_corpus(self.corpus, self.tokenizer.key), self.settings
        return make_plan(
            corpus, settings.sequence_length, epochs=settings.epochs, seed=settings.seed, weights=settings.weights
        )
