"""What a training step eats: rows of packed documents, each token with its position, its document and its weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of `length` tokens; all arrays are (rows, length). The place behind the last document is padding."""

    ids: NDArray[np.int64]  # token ids; 0 in padding
    targets: NDArray[np.int64]  # the token that follows in the same document; 0 where the weight is 0
    weights: NDArray[np.float32]  # of each target; 0: not trained. A step's loss is sum(weight x loss) / sum(weight)
    positions: NDArray[np.int64]  # counted from each document's first token
    documents: NDArray[np.int32]  # number of the document within its row, from 0; padding is -1

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return int((self.documents >= 0).sum())
