"""The symmetric integer lattice ``w_hat = s * q``: its spec, rounding and exact dequantization.

A kernel ``[..., in, out]`` is quantized along ``in`` (axis -2), an embedding table ``[V, D]`` along
``D`` (axis -1), which is the contraction axis of each. Scales are float16 everywhere, the training
forward included, so that one lattice serves training and every export.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.errors import UserError

Ranges = Literal["absmax", "mse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Say how one weight is quantized.

    Attributes:
        bits: width of the stored integer, 2 to 8; these lie in ``[-2^(bits-1), 2^(bits-1) - 1]``.
        group_size: weights along the contraction axis that share a scale; None for a whole channel.
        ranges: how the scale is chosen, see ``quant.ranges``.
    """

    bits: int = 4
    group_size: int | None = None
    ranges: Ranges = "mse"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise UserError(f"{self.bits} bits given; accepted: 2, 3, 4 or 8")
        if self.group_size is not None and self.group_size < 1:
            raise UserError(
                f"group size {self.group_size} given; accepted: a positive number or channel"
            )

    @property
    def qmin(self) -> int:
        """Return the least integer, -8 at 4 bits."""
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Return the greatest integer, 7 at 4 bits."""
        return 2 ** (self.bits - 1) - 1

    @property
    def storage_dtype(self) -> jnp.dtype:
        """Return the type that stored integers have: int4 up to 4 bits, else int8."""
        return jnp.dtype(jnp.int4 if self.bits <= 4 else jnp.int8)

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


def spread(scale: Float[Array, "..."], shape: tuple[int, ...], axis: int) -> Float[Array, "..."]:
    """Repeat float16 group scales over their members, as float32 of the weight's ``shape``."""
    at = len(shape) + axis
    groups = scale.shape[at]
    split = (*shape[:at], groups, shape[at] // groups, *shape[at + 1 :])
    wide = jnp.expand_dims(scale.astype(jnp.float32), at + 1)
    return jnp.broadcast_to(wide, split).reshape(shape)


def quantize(
    w: Float[Array, "..."], scale: Float[Array, "..."], spec: QuantSpec, axis: int = -2
) -> Int[Array, "..."]:
    """Round to the lattice: ``q = clip(round(w / s), qmin, qmax)``, stored as int4 or int8.

    Args:
        w: float32 weights, ``[..., in, out]`` for axis -2.
        scale: float16 scales, ``[..., groups, out]``.
        spec: gives the integer range and the stored type.
        axis: the contraction axis, -2 of a kernel and -1 of an embedding table.
    """
    v = w.astype(jnp.float32) / spread(scale, w.shape, axis)
    return jnp.clip(jnp.round(v), spec.qmin, spec.qmax).astype(spec.storage_dtype)


def dequantize(
    q: Int[Array, "..."], scale: Float[Array, "..."], axis: int = -2
) -> Float[Array, "..."]:
    """Return ``s * q`` in float32: exact, for an 11-bit by 8-bit product fits its 24 bits."""
    return q.astype(jnp.float32) * spread(scale, q.shape, axis)
