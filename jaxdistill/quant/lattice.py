"""The integer lattice, ``w_hat = s * q`` or ``s * (q - z)``: its spec, rounding, dequantization.

A kernel ``[..., in, out]`` is quantized along ``in`` (axis -2), an embedding table ``[V, D]`` along
``D`` (axis -1), which is the contraction axis of each. Scales are float16 everywhere, the training
forward included, so that one lattice serves training and every export.

A **grid** is the tuple of arrays that place the lattice of one weight, each ``[..., groups, out]``
for axis -2: ``(scale,)`` where it is symmetric, ``(scale, zero)`` where it is not, in float16. A
learned range is trained in float32: ``(step,)``, LSQ's name for its scale, or ``(low, high)``.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from jaxdistill.errors import UserError

Ranges = Literal["absmax", "mse", "percentile"]
Grid = tuple[Float[Array, "..."], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Say how one weight is quantized.

    Attributes:
        bits: width of the stored integer: 2, 3, 4 or 8.
        group_size: weights along the contraction axis that share a range; None for a channel.
        ranges: how the range is chosen, see ``quant.ranges``.
        symmetric: integers in ``[-2^(bits-1), 2^(bits-1) - 1]`` around zero; else in
            ``[0, 2^bits - 1]`` around a zero point.
        learned: the range is trained by gradient from there on: LSQ where symmetric
            (arXiv 1902.08153), minimum and maximum where not (arXiv 2201.08442).
        norm: the exponent of the error that ``mse`` makes least; 2 is the mean square, 2.4 GPTQ's.
        percentile: share of the weights, in percent, that ``percentile`` leaves unclipped.
    """

    bits: int = 4
    group_size: int | None = None
    ranges: Ranges = "mse"
    symmetric: bool = True
    learned: bool = False
    norm: float | int = 2.4
    percentile: float | int = 99.9

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise UserError(f"{self.bits} bits given; accepted: 2, 3, 4 or 8")
        if self.group_size is not None and self.group_size < 1:
            raise UserError(
                f"group size {self.group_size} given; accepted: a positive number or channel"
            )
        if not 0 < self.norm <= 10 or not 50 < self.percentile <= 100:
            raise UserError(
                f"range norm {self.norm}, percentile {self.percentile} given; accepted: "
                "0 < norm <= 10, 50 < percentile <= 100"
            )

    @property
    def qmin(self) -> int:
        """Return the least integer, at 4 bits -8 or, asymmetric, 0."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Return the greatest integer, at 4 bits 7 or, asymmetric, 15."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def storage_dtype(self) -> jnp.dtype:
        """Return the type that stored integers have: (u)int4 up to 4 bits, else (u)int8."""
        width = 4 if self.bits <= 4 else 8
        return jnp.dtype(f"int{width}" if self.symmetric else f"uint{width}")

    @property
    def grid_leaves(self) -> tuple[str, ...]:
        """Return the names of a training grid's parts, as they stand behind a leaf's name."""
        if self.learned:
            return ("step",) if self.symmetric else ("min", "max")
        return ("scale",) if self.symmetric else ("scale", "zero")

    def groups(self, size: int, name: str = "weight") -> int:
        """Return how many groups an axis of ``size`` has; ``UserError`` if it does not divide."""
        group = self.group_size or size
        if size % group:
            raise UserError(
                f"group size {group} does not divide the {size} inputs of {name}; choose a divisor "
                f"of {size}, or channel"
            )
        return size // group


def split_groups(w: Float[Array, "..."], groups: int, axis: int) -> Float[Array, "..."]:
    """Split ``axis`` (-1 or -2) of ``w`` into ``(groups, members)``; members are at ``axis``."""
    at = w.ndim + axis
    return w.reshape(*w.shape[:at], groups, w.shape[at] // groups, *w.shape[at + 1 :])


def spread(part: Float[Array, "..."], shape: tuple[int, ...], axis: int) -> Float[Array, "..."]:
    """Repeat one part of a grid over its groups' members, as float32 of the weight's ``shape``."""
    at = len(shape) + axis
    groups = part.shape[at]
    split = (*shape[:at], groups, shape[at] // groups, *shape[at + 1 :])
    wide = jnp.expand_dims(part.astype(jnp.float32), at + 1)
    return jnp.broadcast_to(wide, split).reshape(shape)


def to_float16(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return float16 scales, none of them zero (an all-zero group takes 1, its integers are 0)."""
    half = scale.astype(jnp.float16)
    tiny = jnp.asarray(jnp.finfo(jnp.float16).smallest_subnormal, jnp.float16)
    return jnp.where(half > 0, half, jnp.where(scale == 0, jnp.ones_like(tiny), tiny))


def fixed_grid(grid: Grid, spec: QuantSpec) -> Grid:
    """Return the float16 ``(scale,)`` or ``(scale, zero)`` that a grid stands for.

    A learned scale that fell to zero or below is the least float16; a learned range always holds
    zero, so the zero point is one of the integers.
    """
    if not spec.learned:
        return grid
    return (to_float16(grid[0]),) if spec.symmetric else range_grid(grid[0], grid[1], spec)


def range_grid(low: Float[Array, "..."], high: Float[Array, "..."], spec: QuantSpec) -> Grid:
    """Return the float16 ``(scale, zero)`` of the asymmetric range from ``low`` to ``high``."""
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    scale = to_float16((high - low) / spec.qmax)
    zero = jnp.clip(jnp.round(-low / scale.astype(jnp.float32)), 0, spec.qmax)
    return scale, zero.astype(jnp.float16)


def round_to_lattice(
    w: Float[Array, "..."], grid: Grid, spec: QuantSpec, axis: int
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return ``(q, s * (q - z))`` in float32, ``q = clip(round(w / s) + z, qmin, qmax)``."""
    scale, *zero = (spread(part, w.shape, axis) for part in fixed_grid(grid, spec))
    q = jnp.round(w.astype(jnp.float32) / scale)
    if not zero:
        q = jnp.clip(q, spec.qmin, spec.qmax)
        return q, q * scale
    q = jnp.clip(q + zero[0], spec.qmin, spec.qmax)
    return q, (q - zero[0]) * scale


def quantize(
    w: Float[Array, "..."], grid: Grid, spec: QuantSpec, axis: int = -2
) -> Int[Array, "..."] | UInt[Array, "..."]:
    """Round to the lattice: ``q = clip(round(w / s) + z, qmin, qmax)``, in the stored type.

    Args:
        w: float32 weights, ``[..., in, out]`` for axis -2.
        grid: see the module.
        spec: gives the integer range and the stored type.
        axis: the contraction axis, -2 of a kernel and -1 of an embedding table.
    """
    return round_to_lattice(w, grid, spec, axis)[0].astype(spec.storage_dtype)


def dequantize(
    q: Int[Array, "..."] | UInt[Array, "..."], grid: Grid, axis: int = -2
) -> Float[Array, "..."]:
    """Return ``s * (q - z)`` in float32: exact, for an 11-bit by 9-bit product fits its 24 bits."""
    scale, *zero = (spread(part, q.shape, axis) for part in grid)
    values = q.astype(jnp.float32)
    return (values - zero[0] if zero else values) * scale
