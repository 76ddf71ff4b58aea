"""Fake quantization, straight-through gradient (Bengio et al. 2013; QAT, arXiv 1712.05877)."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxdistill.quant.lattice import Grid, QuantSpec, fixed_grid, round_to_lattice, spread


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

    It has derivatives of every order, in both modes, and they are written without a
    ``jax.custom_jvp``: ``lax.scan`` forgets such a rule of what it scans over when it is
    differentiated a second time (jax 0.10), and a meta-gradient would see no weight at all.

    Args:
        w: float32 master weights, ``[..., in, out]`` for axis -2.
        grid: see ``quant.lattice``; ``[..., groups, out]``.
        spec: gives the integer range.
        axis: the contraction axis, -2 of a kernel and -1 of an embedding table.
    """
    fixed_w, fixed = lax.stop_gradient((w, fixed_grid(grid, spec)))
    scale, *zero = (spread(part, w.shape, axis) for part in fixed)
    v = fixed_w / scale
    place = v + zero[0] if zero else v
    above, below = place > spec.qmax, place < spec.qmin
    inside = ~(above | below)
    value = lax.stop_gradient(round_to_lattice(w, grid, spec, axis)[1])
    value = value + _slope(jnp.where(inside, w, jnp.zeros_like(w)))
    if not spec.learned:
        return value
    parts = [spread(part, w.shape, axis) for part in grid]
    residue = jnp.round(v) - v
    if spec.symmetric:
        members = w.shape[axis] // grid[0].shape[axis]
        by_scale = jnp.where(inside, residue, jnp.clip(v, spec.qmin, spec.qmax))
        return value + _slope(parts[0] * by_scale / math.sqrt(members * spec.qmax))
    low, high = parts
    by_ends = residue * (high - low) / spec.qmax
    return value + _slope(jnp.where(inside, by_ends, jnp.where(above, high, low)))


def _slope(x: Array) -> Array:
    """Return zeros that have the derivative of ``x``."""
    return x - lax.stop_gradient(x)
