"""Quantized weights as products read them while text is generated: a byte or half a byte each.

One new token multiplies one row by every weight, so a decoder is as fast as its weights are read.
``held_product`` unpacks them inside that product: no float copy of a weight is written for it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8, UInt, UInt8

from jaxdistill.quant.lattice import dequantize


class Held(NamedTuple):
    """Hold one weight ``[out, in]``: an embedding table as it is, a kernel transposed.

    Attributes:
        q: integers; as ``uint8`` two of 4 bits, rows ``o`` and ``o + O/2`` in the low and the high
            half, plus 8 where the lattice is symmetric.
        scale: float32, one a group of inputs.
        zero: the like, of an asymmetric lattice.
    """

    q: Int8[Array, "... O I"] | UInt8[Array, "... O/2 I"]
    scale: Float[Array, "... O G"]
    zero: Float[Array, "... O G"] | None = None


def hold(
    q: Int[Array, "..."] | UInt[Array, "..."],
    scale: Float[Array, "..."],
    zero: Float[Array, "..."] | None = None,
    *,
    axis: int,
    packed: bool,
) -> Held:
    """Bring a stored weight into the form that products read.

    Args:
        q: stored integers, ``[..., in, out]`` for axis -2, ``[..., out, in]`` for -1.
        scale: its grid, beside it.
        zero: the like.
        axis: the contraction axis.
        packed: two integers a byte, where they have 4 bits and the outputs are even in number.
    """
    four, below = q.dtype in (jnp.int4, jnp.uint4), 128 if q.dtype == jnp.uint8 else 0
    q = (q.astype(jnp.int32) - below).astype(jnp.int8)
    scale = scale.astype(jnp.float32)
    zero = None if zero is None else zero.astype(jnp.float32) - below
    if axis == -2:
        q, scale = q.swapaxes(-1, -2), scale.swapaxes(-1, -2)
        zero = None if zero is None else zero.swapaxes(-1, -2)
    if packed and four and q.shape[-2] % 2 == 0:
        unsigned = (q + jnp.int8(8 if zero is None else 0)).astype(jnp.uint8)
        low, high = jnp.split(unsigned, 2, axis=-2)
        q = low | (high << 4)
    return Held(q, scale, zero)


def _integers(w: Held) -> Int8[Array, "... O I"]:
    if w.q.dtype == jnp.int8:
        return w.q
    return _whole_numbers(jnp.concatenate([w.q & 15, w.q >> 4], axis=-2), w)


def _whole_numbers(unsigned: UInt8[Array, "..."], w: Held) -> Int8[Array, "..."]:
    q = unsigned.astype(jnp.int8)
    return q - jnp.int8(8) if w.zero is None else q


def held_values(w: Held) -> Float[Array, "... O I"]:
    """Return a weight's lattice values in float32."""
    return dequantize(_integers(w), tuple(x for x in w[1:] if x is not None), -1)


def held_rows(w: Held, ids: Int[Array, "N"]) -> Float[Array, "N I"]:
    """Return the lattice values of some rows of a table ``[out, in]``."""
    if w.q.dtype == jnp.uint8:
        there = jnp.take(w.q, ids % w.q.shape[0], axis=0)
        high = (ids >= w.q.shape[0])[:, None]
        q = _whole_numbers(jnp.where(high, there >> 4, there & 15), w)
    else:
        q = jnp.take(w.q, ids, axis=0)
    grid = (jnp.take(x, ids, axis=0) for x in w[1:] if x is not None)
    return dequantize(q, tuple(grid), -1)


def held_product(x: Float[Array, "N I"], w: Held) -> Float[Array, "N O"]:
    """Return ``x @ w.T`` in float32.

    On a CPU few rows and one scale a channel go by integers, ``_split_product``. Otherwise the
    weights become floats first: more rows pay for that, and XLA for GPUs and TPUs may do it inside
    the product.
    """
    if x.shape[0] > _FEW or w.scale.shape[-1] > 1:
        return _float_product(x, w)
    return lax.platform_dependent(x, w, cpu=_split_product, default=_float_product)


def _float_product(x: Float[Array, "N I"], w: Held) -> Float[Array, "N O"]:
    values = held_values(w).astype(x.dtype)
    return jnp.einsum("ni,oi->no", x, values, preferred_element_type=jnp.float32)


_FEW, _DIGITS = 3, 3  # rows; 8-bit digits of a float's 24


def _split_product(x: Float[Array, "N I"], w: Held) -> Float[Array, "N O"]:
    """Return ``x @ w.T`` by products of 8-bit integers, exact in 32 bits.

    Each row is split into digits, ``x = unit * sum_k d_k / 254^k`` with ``|d_k| <= 127``, after
    Ootomo et al. (arXiv 2306.11975); three of them hold it to 2^-24 of the row's greatest.
    """
    x = x.astype(jnp.float32)
    unit = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127
    rest, digits = x / jnp.where(unit > 0, unit, 1.0), []
    for _ in range(_DIGITS):
        digits.append(jnp.round(rest))
        rest = (rest - digits[-1]) * 254
    rows = jnp.stack(digits, axis=1).reshape(-1, x.shape[1]).astype(jnp.int8)
    y = jnp.einsum("ni,oi->no", rows, _integers(w), preferred_element_type=jnp.int32)
    parts = y.astype(jnp.float32).reshape(x.shape[0], _DIGITS, -1)
    total = sum(parts[:, k] * 254.0**-k for k in reversed(range(_DIGITS)))
    if w.zero is not None:
        whole = jnp.sum(x, axis=1, keepdims=True) / jnp.where(unit > 0, unit, 1.0)
        total = total - whole * w.zero[:, 0][None]
    return total * unit * w.scale[:, 0][None]
