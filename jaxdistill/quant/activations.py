"""Fake quantization of activations: what a quantized linear layer sees in place of its input."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """Say how the input rows of a linear layer are quantized.

    Attributes:
        bits: 8 or 16; integers lie in ``[-(2^(bits-1) - 1), 2^(bits-1) - 1]``.
        scale_per: whether each token has its own scale, or one serves the whole tensor. With
            ``tensor`` a row's result depends on the other rows of its batch, padding included.
    """

    bits: int = 8
    scale_per: Literal["token", "tensor"] = "token"

    def __post_init__(self) -> None:
        if self.bits not in (8, 16) or self.scale_per not in ("token", "tensor"):
            raise UserError(
                f"activations of {self.bits} bits per {self.scale_per} given; accepted: 8 or 16 "
                "bits, per token or per tensor"
            )


def fake_quant_activation(x: Float[Array, "N I"], spec: ActivationSpec) -> Float[Array, "N I"]:
    """Return ``s * round(x / s)``, ``s = max|x| / qmax`` of each token or of the whole tensor.

    The range is that of the values at hand, so nothing is clipped, no calibration is needed, and
    the straight-through gradient is 1 everywhere. The type is kept; the arithmetic is float32.
    """
    x32 = jax.lax.stop_gradient(x).astype(jnp.float32)
    axis = -1 if spec.scale_per == "token" else None
    largest = jnp.max(jnp.abs(x32), axis=axis, keepdims=True)
    scale = jnp.where(largest > 0, largest, jnp.ones_like(largest)) / (2 ** (spec.bits - 1) - 1)
    scale = jnp.broadcast_to(scale, x32.shape)
    rounded = (jnp.round(x32 / scale) * scale).astype(x.dtype)
    return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))  # the value is exact
