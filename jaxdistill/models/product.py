"""The product of rows and a weight, whatever form the weight is held in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.quant.held import Held, held_product


def product(x: Float[Array, "N I"], kernel: Any, *, turned: bool = False) -> Float[Array, "N O"]:
    """Return ``x @ kernel`` in float32, with operands of the rows' type.

    Args:
        x: rows.
        kernel: ``[in, out]``, or what ``quant.held`` holds.
        turned: a float kernel is ``[out, in]``, as an embedding table is.
    """
    if isinstance(kernel, Held):
        return held_product(x, kernel)
    how = "ni,oi->no" if turned else "ni,io->no"
    return jnp.einsum(how, x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
