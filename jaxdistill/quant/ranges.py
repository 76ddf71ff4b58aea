"""How a group's range is chosen from its weights: all of them, most of them, or least error."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxdistill.quant.lattice import Grid, QuantSpec, range_grid, split_groups, to_float16

# Clips tried by the search, as shares of the whole range. The least is where a Gaussian channel of
# many thousand weights at 2 bits would still clip; 1 + 1/qmax lets the asymmetric end (-8 at 4
# bits) be used.
_CANDIDATES = 48
_LEAST_CLIP = 0.25


def _shrinkable(ends: tuple[Array, Array], spec: QuantSpec) -> Callable[[Array | float], Grid]:
    """Return ``share -> fixed grid`` of a range ``(low, high)`` cut to that share of itself."""
    low, high = ends
    if spec.symmetric:
        widest = jnp.maximum(-low, high) / spec.qmax
        return lambda share: (to_float16(widest * share),)
    return lambda share: range_grid(low * share, high * share, spec)


def _ends(groups: Array, spec: QuantSpec, axis: int) -> tuple[Array, Array]:
    """Return the least and greatest weight of each group, zero between them."""
    if spec.ranges == "percentile":
        if spec.symmetric:
            high = jnp.quantile(jnp.abs(groups), spec.percentile / 100, axis=axis)
            return -high, high
        tail = (1 - spec.percentile / 100) / 2
        low, high = (jnp.quantile(groups, q, axis=axis) for q in (tail, 1 - tail))
    else:
        low, high = jnp.min(groups, axis=axis), jnp.max(groups, axis=axis)
    return jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)


def _least_error(groups: Array, grid_at: Callable[..., Grid], spec: QuantSpec, axis: int) -> Grid:
    """Search the share of the range whose grid makes ``sum |w_hat - w|^norm`` least, by group."""

    def error(grid: Grid) -> Array:
        scale, *zero = (
            jnp.broadcast_to(
                jnp.expand_dims(part.astype(jnp.float32), groups.ndim + axis), groups.shape
            )
            for part in grid
        )
        z = zero[0] if zero else jnp.zeros_like(scale)
        q = jnp.clip(jnp.round(groups / scale) + z, spec.qmin, spec.qmax)
        return jnp.sum(jnp.abs((q - z) * scale - groups) ** spec.norm, axis=axis)

    widest = 1.0 + 1.0 / spec.qmax if spec.symmetric else 1.0
    shares = jnp.linspace(_LEAST_CLIP, widest, _CANDIDATES, dtype=jnp.float32)

    def consider(i: Array, best: tuple[Grid, Array]) -> tuple[Grid, Array]:
        grid = grid_at(shares[i])
        cost = error(grid)
        better = cost < best[1]
        kept = tuple(jnp.where(better, new, old) for new, old in zip(grid, best[0], strict=True))
        return kept, jnp.where(better, cost, best[1])

    whole = grid_at(1.0)  # the whole range is among the candidates: the result is never worse
    return lax.fori_loop(0, _CANDIDATES, consider, (whole, error(whole)))[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _range_of(w: Array, spec: QuantSpec, axis: int) -> Grid:
    """Return the fixed grid of one weight of two axes."""
    groups = split_groups(w, spec.groups(w.shape[axis]), axis)
    grid_at = _shrinkable(_ends(groups, spec, axis), spec)
    if spec.ranges == "mse":
        return _least_error(groups, grid_at, spec, axis)
    return grid_at(1.0)


def choose_grid(
    w: Float[Array, "..."], spec: QuantSpec, axis: int = -2, *, name: str = "weight"
) -> Grid:
    """Return the grid that ``spec.ranges`` names; stacked layers are searched one at a time.

    ``absmax`` takes the whole range: ``s = max|w| / qmax``, asymmetric ``(max - min) / (2^bits -
    1)``. ``percentile`` leaves ``spec.percentile`` percent of the weights unclipped. ``mse`` makes
    ``sum |w_hat - w|^norm`` least over a grid of clips, measured with the float16 scale.

    Args:
        w: float32 weights, ``[..., in, out]`` for axis -2.
        spec: see ``QuantSpec``.
        axis: the contraction axis.
        name: of the weight, for the error.

    Returns:
        float16 ``(scale,)`` or ``(scale, zero)``; where ``spec.learned``, what the gradient starts
        from: float32 ``(scale,)`` or ``(low, high)``. Each ``[..., groups, out]`` for axis -2.

    Raises:
        UserError: the group size does not divide the weight's inputs.
    """
    spec.groups(w.shape[axis], name)  # the error names the weight before anything is traced
    grid = (
        lax.map(lambda layer: _range_of(layer, spec, axis), w)
        if w.ndim == 3
        else _range_of(w, spec, axis)
    )
    if not spec.learned:
        return grid
    scale, *zero = (part.astype(jnp.float32) for part in grid)
    return (scale,) if not zero else (-zero[0] * scale, (spec.qmax - zero[0]) * scale)
