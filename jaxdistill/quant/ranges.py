"""How a group's scale is chosen from its weights: absmax, or least error on a grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxdistill.quant.lattice import QuantSpec, split_groups

# Clips tried by the search, as shares of absmax. The least is where a Gaussian channel of many
# thousand weights at 2 bits would still clip; 1 + 1/qmax lets the asymmetric end (-8 at 4 bits) be
# used.
_GRID = 48
_LEAST_CLIP = 0.25
# The error's exponent, GPTQ's (arXiv 2210.17323, its published code): a little above 2, it clips
# fewer of the few large weights that a language model depends on. See benchmarks/ranges.py.
_NORM = 2.4


def _to_float16(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return float16 scales, none of them zero (an all-zero group takes 1, its integers are 0)."""
    half = scale.astype(jnp.float16)
    tiny = jnp.asarray(jnp.finfo(jnp.float16).smallest_subnormal, jnp.float16)
    return jnp.where(half > 0, half, jnp.where(scale > 0, tiny, jnp.ones_like(tiny)))


def absmax_scale(
    w: Float[Array, "..."], spec: QuantSpec, axis: int = -2, *, name: str = "weight"
) -> Float[Array, "..."]:
    """Return ``s = max|w| / qmax`` of each group as float16, ``[..., groups, out]`` for axis -2."""
    groups = split_groups(w, spec.groups(w.shape[axis], name), axis)
    return _to_float16(jnp.max(jnp.abs(groups), axis=axis) / spec.qmax)


def mse_scale(
    w: Float[Array, "..."], spec: QuantSpec, axis: int = -2, *, name: str = "weight"
) -> Float[Array, "..."]:
    """Return the float16 scale of least error of each group, by grid search of the clip.

    The error is ``sum |w_hat - w|^2.4``, as in GPTQ, measured with the scale already rounded to
    float16. Absmax is among the candidates, so by this error the result is never worse.
    """
    groups = split_groups(w, spec.groups(w.shape[axis], name), axis)
    widest = jnp.max(jnp.abs(groups), axis=axis) / spec.qmax
    candidates = jnp.concatenate(
        [jnp.ones(1), jnp.linspace(_LEAST_CLIP, 1.0 + 1.0 / spec.qmax, _GRID)]
    ).astype(jnp.float32)

    def error(scale: Array) -> Array:
        s = jnp.expand_dims(scale.astype(jnp.float32), groups.ndim + axis)
        s = jnp.broadcast_to(s, groups.shape)
        off = jnp.clip(jnp.round(groups / s), spec.qmin, spec.qmax) * s - groups
        return jnp.sum(jnp.abs(off) ** _NORM, axis=axis)

    def consider(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scale = _to_float16(widest * candidates[i])
        cost = error(scale)
        better = cost < best[1]
        return jnp.where(better, scale, best[0]), jnp.where(better, cost, best[1])

    first = _to_float16(widest)
    return lax.fori_loop(1, _GRID + 1, consider, (first, error(first)))[0]


def choose_scale(
    w: Float[Array, "..."], spec: QuantSpec, axis: int = -2, *, name: str = "weight"
) -> Float[Array, "..."]:
    """Return the scale that ``spec.ranges`` names; stacked layers are searched one at a time."""
    rule = {"absmax": absmax_scale, "mse": mse_scale}[spec.ranges]
    spec.groups(w.shape[axis], name)  # the error names the weight before anything is traced
    if w.ndim == 3:
        return lax.map(lambda layer: rule(layer, spec, axis), w)
    return jax.jit(rule, static_argnums=(1, 2), static_argnames=("name",))(w, spec, axis, name=name)
