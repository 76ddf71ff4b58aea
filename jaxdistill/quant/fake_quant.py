"""Fake quantization, straight-through gradient (Bengio et al. 2013; QAT, arXiv 1712.05877)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.quant.lattice import QuantSpec, spread


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def fake_quant(
    w: Float[Array, "..."], scale: Float[Array, "..."], spec: QuantSpec, axis: int = -2
) -> Float[Array, "..."]:
    """Return the lattice value of each weight; let gradients through where it is not clipped.

    Forward: exactly ``s * clip(round(w / s), qmin, qmax)``, what ``dequantize(quantize(w))`` gives.
    Derivative: 1 where ``qmin <= w / s <= qmax``, else 0. The scale is data: it gets no gradient.

    Args:
        w: float32 master weights, ``[..., in, out]`` for axis -2.
        scale: float16 scales, ``[..., groups, out]``.
        spec: gives the integer range.
        axis: the contraction axis, -2 of a kernel and -1 of an embedding table.
    """
    s = spread(scale, w.shape, axis)
    return jnp.clip(jnp.round(w / s), spec.qmin, spec.qmax) * s


@fake_quant.defjvp
def _fake_quant_jvp(spec, axis, primals, tangents):
    w, scale = primals
    v = w / spread(scale, w.shape, axis)
    inside = (v >= spec.qmin) & (v <= spec.qmax)
    value = fake_quant(w, scale, spec, axis)  # by itself, so that it has derivatives of any order
    return value, jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0]))
