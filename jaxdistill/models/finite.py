"""A check that a model's weights are numbers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.paths import path_of


def check_finite(params: Any, source: str) -> None:
    """Check that no weight is NaN or infinite.

    A sum over each array finds out, which reads it once and holds nothing. Only an array whose sum
    is not finite is counted through.

    Args:
        params: numpy or JAX arrays; integers are passed over.
        source: name of the model, for the message.

    Raises:
        UserError: some weight is NaN or infinite; the first array that has one is named.
    """
    first, arrays, weights = "", 0, 0
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        x = _near(leaf)
        if math.isfinite(_sum(x)):
            continue
        layers = x if leaf.ndim > 2 else x[None]
        bad = [int((~jnp.isfinite(layer)).sum()) for layer in layers]
        if sum(bad):  # a sum of finite weights may overflow
            at = next(i for i, number in enumerate(bad) if number)
            first = first or path_of(keys) + (f" of layer {at}" if leaf.ndim > 2 else "")
            arrays, weights = arrays + 1, weights + sum(bad)
    if arrays:
        raise UserError(
            f"{source} has {weights} weights that are NaN or infinite, in {arrays} of its arrays, "
            f"the first in {first}; train or fetch it again"
        )


def _near(leaf: Any) -> Any:
    """Return the array as numpy sees it, where that takes no copy."""
    if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
        (device, *others) = leaf.devices()
        return np.asarray(leaf) if device.platform == "cpu" and not others else leaf
    return leaf


def _sum(x: Any) -> float:
    if not isinstance(x, np.ndarray):
        return float(jnp.sum(x, dtype=jnp.float32))
    with np.errstate(all="ignore"):
        return float(np.sum(x, dtype=np.float32))
