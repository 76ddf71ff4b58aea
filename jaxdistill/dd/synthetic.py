"""A synthetic set: what is learned of it, and what is given."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp


@flax.struct.dataclass
class Synthetic:
    """Hold M synthetic examples; a pytree.

    Attributes:
        learned: float arrays that condensing trains: ``inputs`` ``[M, ...]`` (features
            ``[M, D]``, images, input embeddings ``[M, T, D]``), ``label_logits`` ``[M, C]`` (soft
            labels before their softmax), ``log_rates`` ``[]`` or ``[K]`` (inner learning rates).
        fixed: arrays that stay: hard ``labels`` ``[M]``, masks, positions.
    """

    learned: dict[str, Any]
    fixed: dict[str, Any]

    def batch(self) -> dict[str, Any]:
        """Return all of it as one batch, without the rates."""
        rest = {name: x for name, x in self.learned.items() if name != "log_rates"}
        return {**self.fixed, **rest}

    @property
    def size(self) -> int:
        """Return M."""
        return int(jnp.shape(next(iter(self.batch().values())))[0])
