"""Fake quantization, straight-through gradient (Bengio et al. 2013; QAT, arXiv 1712.05877)."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.quant.lattice import Grid, QuantSpec, fixed_grid, round_to_lattice, spread


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def fake_quant(
    w: Float[Array, "..."], grid: Grid, spec: QuantSpec, axis: int = -2
) -> Float[Array, "..."]:
    """Return the lattice value of each weight; let gradients through where it is not clipped.

    Forward: exactly ``s * (clip(round(w / s) + z, qmin, qmax) - z)``, what
    ``dequantize(quantize(w))`` gives. Derivative by the weight: 1 where ``qmin <= w / s + z <=
    qmax``, else 0. By a fixed grid: none. By a learned one, with ``v = w / s``:

    * LSQ (arXiv 1902.08153, equations 3 and 5): ``d w_hat / d s`` is ``round(v) - v`` inside and
      ``qmin`` or ``qmax`` outside, times ``1 / sqrt(N * qmax)`` for the N weights that share s.
    * Minimum and maximum (range learning, arXiv 2201.08442): ``(round(v) - v) / (2^bits - 1)``
      inside, with the sign of its end; the clipped weights follow the end that clips them.

    Args:
        w: float32 master weights, ``[..., in, out]`` for axis -2.
        grid: see ``quant.lattice``; ``[..., groups, out]``.
        spec: gives the integer range.
        axis: the contraction axis, -2 of a kernel and -1 of an embedding table.
    """
    return round_to_lattice(w, grid, spec, axis)[1]


@fake_quant.defjvp
def _fake_quant_jvp(spec, axis, primals, tangents):
    (w, grid), (dw, dgrid) = primals, tangents
    scale, *zero = (spread(part, w.shape, axis) for part in fixed_grid(grid, spec))
    v = w / scale
    place = v + zero[0] if zero else v
    above, below = place > spec.qmax, place < spec.qmin
    inside = ~(above | below)
    value = fake_quant(w, grid, spec, axis)  # by itself, so that it has derivatives of any order
    tangent = jnp.where(inside, dw, jnp.zeros_like(dw))
    if not spec.learned:
        return value, tangent
    parts = [spread(part, w.shape, axis) for part in dgrid]
    residue = jnp.round(v) - v
    if spec.symmetric:
        members = w.shape[axis] // grid[0].shape[axis]
        by_scale = jnp.where(inside, residue, jnp.clip(v, spec.qmin, spec.qmax))
        return value, tangent + parts[0] * by_scale / math.sqrt(members * spec.qmax)
    low, high = parts
    by_ends = residue * (high - low) / spec.qmax
    return value, tangent + jnp.where(inside, by_ends, jnp.where(above, high, low))
