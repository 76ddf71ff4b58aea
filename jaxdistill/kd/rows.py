"""What training asks of a data set: a length, rows and slices of rows."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Rows(Protocol):
    """Serve rows of tokens, as ``train.packing.Packed`` does."""

    def __len__(self) -> int:
        """Count the rows."""
        ...

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        """Give one row, arrays [T], or a slice of rows, arrays [B, T]."""
        ...
