"""Products with sums in float32, forward and backward, whatever form a weight is held in."""

from __future__ import annotations

import functools
from typing import Any

import jax
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
    return contract("ni,oi->no" if turned else "ni,io->no", x, jnp.asarray(kernel))


def contract(how: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return ``einsum(how, a, b)`` in float32, with operands of the first one's type.

    JAX would take the gradient of a bfloat16 product by float32 ones, since the cotangent of a
    float32 sum is float32: at a half to a sixteenth of the rate, by device. Here the cotangent is
    rounded to the operands' type first. Float32 products stay as they are, so that they may be
    differentiated in any mode.

    Args:
        how: of two operands, each of whose letters the other or the result has too.
        a: the first operand.
        b: the second, which may have another float type; its gradient has that type.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(how, a, b.astype(a.dtype), preferred_element_type=jnp.float32)
    return _contract(how, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(how: str, a: Array, b: Array) -> Array:
    return jnp.einsum(how, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _forward(how: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return _contract(how, a, b), (a, b)


def _backward(how: str, saved: tuple[Array, Array], ct: Array) -> tuple[Array, Array]:
    (a, b), ct = saved, ct.astype(saved[0].dtype)
    (of_a, of_b), of_ct = how.split("->")[0].split(","), how.split("->")[1]
    by_a = jnp.einsum(
        f"{of_ct},{of_b}->{of_a}", ct, b.astype(a.dtype), preferred_element_type=jnp.float32
    )
    # XLA for CPUs multiplies by the transposed operand of a weight's gradient at half the rate,
    # unless it lies transposed in memory (benchmarks/NOTES.md).
    left, of_left = (jax.lax.optimization_barrier(a.T), of_a[::-1]) if a.ndim == 2 else (a, of_a)
    by_b = jnp.einsum(f"{of_left},{of_ct}->{of_b}", left, ct, preferred_element_type=jnp.float32)
    return by_a.astype(a.dtype), by_b.astype(b.dtype)


_contract.defvjp(_forward, _backward)
