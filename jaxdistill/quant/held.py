"""Quantized weights as products read them while text is generated: a byte or half a byte each.

One new token multiplies one row by every weight, so a decoder is as fast as its weights are read.
``held_product`` multiplies them as the integers they are, or makes floats of a block at a time: no
float copy of a whole weight is written.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8, UInt, UInt8

from jaxdistill.quant.lattice import Grid, dequantize
from jaxdistill.quant.packed_matmul import fits, packed_matmul


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


def _grid(w: Held) -> Grid:
    return tuple(x for x in w[1:] if x is not None)


def _halves(w: Held) -> tuple[Held, ...]:
    """Return a packed weight's first and last outputs, a byte each; any other as it is."""
    if w.q.dtype == jnp.int8:
        return (w,)
    grids = zip(*(jnp.split(x, 2, axis=-2) for x in _grid(w)), strict=True)
    parts = zip((w.q & 15, w.q >> 4), grids, strict=True)
    return tuple(Held(_whole_numbers(q, w), *grid) for q, grid in parts)


def _whole_numbers(unsigned: UInt8[Array, "..."], w: Held) -> Int8[Array, "..."]:
    q = unsigned.astype(jnp.int8)
    return q - jnp.int8(8) if w.zero is None else q


def held_values(w: Held) -> Float[Array, "... O I"]:
    """Return a weight's lattice values in float32."""
    return jnp.concatenate([dequantize(h.q, _grid(h), -1) for h in _halves(w)], axis=-2)


def held_rows(w: Held, ids: Int[Array, "N"]) -> Float[Array, "N I"]:
    """Return the lattice values of some rows of a table ``[out, in]``."""
    if w.q.dtype == jnp.uint8:
        there = jnp.take(w.q, ids % w.q.shape[0], axis=0)
        high = (ids >= w.q.shape[0])[:, None]
        q = _whole_numbers(jnp.where(high, there >> 4, there & 15), w)
    else:
        q = jnp.take(w.q, ids, axis=0)
    return dequantize(q, tuple(jnp.take(x, ids, axis=0) for x in _grid(w)), -1)


def held_product(x: Float[Array, "N I"], w: Held) -> Float[Array, "N O"]:
    """Return ``x @ w.T`` in float32.

    On a CPU few rows and one scale a channel go by integers, ``_split_product``; otherwise a block
    of weights at a time becomes floats, that stay in the cache. On an NVIDIA GPU few rows go by a
    kernel that reads 4 bits, ``packed_matmul``, where no mesh divides the weights. Elsewhere the
    weights become floats before the product, which XLA for GPUs and TPUs may do inside it.
    """
    few = x.shape[0] <= _FEW and w.scale.shape[-1] == 1
    on_cpu = _split_product if few else _product_in_blocks
    alone = jax.sharding.get_abstract_mesh().empty
    on_gpu = _packed_product if alone and fits(x, w.q, w.scale) else _float_product
    return lax.platform_dependent(x, w, cpu=on_cpu, cuda=on_gpu, default=_float_product)


def _packed_product(x: Float[Array, "N I"], w: Held) -> Float[Array, "N O"]:
    return packed_matmul(x, *w)


def _float_product(x: Float[Array, "N I"], w: Held) -> Float[Array, "N O"]:
    values = (dequantize(h.q, _grid(h), -1).astype(x.dtype) for h in _halves(w))
    y = [jnp.einsum("ni,oi->no", x, v, preferred_element_type=jnp.float32) for v in values]
    return jnp.concatenate(y, axis=1)


def _product_in_blocks(x: Float[Array, "N I"], w: Held) -> Float[Array, "N O"]:
    rows, inputs = w.q.shape
    halves = 2 if w.q.dtype == jnp.uint8 else 1  # a packed row is an output of each half
    blocks = -(-rows * halves * inputs // _BLOCK)
    size = -(-rows // blocks)

    def body(i: Array, y: Float[Array, "N H R"]) -> Float[Array, "N H R"]:
        start = jnp.minimum(i * size, rows - size)  # the last block takes some of the one before

        def part(of: Array) -> Array:
            starts = (start + half * rows for half in range(of.shape[0] // rows))
            return jnp.concatenate([lax.dynamic_slice_in_dim(of, at, size) for at in starts])

        made = _float_product(x, _when_known(x, jax.tree.map(part, w)))
        made = made.reshape(x.shape[0], halves, size)
        return lax.dynamic_update_slice_in_dim(y, made, start, axis=2)

    empty = jnp.zeros((x.shape[0], halves, rows))
    return lax.fori_loop(0, blocks, body, empty).reshape(x.shape[0], -1)


def _when_known(x: Float[Array, "N I"], w: Held) -> Held:
    """Return the weight as it is, not to be read before the rows are known.

    What depends on weights alone XLA for CPUs does first: it would unpack those of all layers, and
    keep them. It does not see that no number is both this large and this small.
    """
    most = jnp.finfo(x.dtype).max
    never = (x[0, 0] > most) & (x[0, 0] < -most)
    return w._replace(q=w.q | never.astype(w.q.dtype))


_BLOCK = 2**19  # weights that are floats at once
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
    # A byte each is read as it lies, and nothing need be unpacked.
    halves = _halves(w if w.q.dtype == jnp.int8 else _when_known(x, w))
    y = [jnp.einsum("ni,oi->no", rows, h.q, preferred_element_type=jnp.int32) for h in halves]
    parts = jnp.concatenate(y, axis=1).astype(jnp.float32).reshape(x.shape[0], _DIGITS, -1)
    total = sum(parts[:, k] * 254.0**-k for k in reversed(range(_DIGITS)))
    if w.zero is not None:
        whole = jnp.sum(x, axis=1, keepdims=True) / jnp.where(unit > 0, unit, 1.0)
        total = total - whole * w.zero[:, 0][None]
    return total * unit * w.scale[:, 0][None]
