"""Rotary position embeddings (RoFormer, arXiv 2104.09864), in HF's rotate-half layout."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill.models.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> Float[Array, "F"]:
    """Return the angular frequency of each of ``head_dim / 2`` pairs, in radians a position.

    ``f_i = theta^(-2i/head_dim)``; ``linear`` divides all by ``factor``; ``llama3`` divides
    the frequencies whose wave length is above ``original / low_freq_factor`` by it, keeps those
    below ``original / high_freq_factor``, and blends linearly between (Llama 3.1).
    """
    freqs = config.rope_theta ** (
        -np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    )
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "linear":
        freqs = freqs / scaling.factor
    elif scaling is not None:
        assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None
        assert scaling.original_max_position_embeddings is not None
        turns = scaling.original_max_position_embeddings * freqs / (2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        blend = np.clip(blend, 0.0, 1.0)
        freqs = freqs * (blend + (1 - blend) / scaling.factor)
    return jnp.asarray(freqs, jnp.float32)


def rope_tables(
    config: ModelConfig, positions: Float[Array, "#B T"] | Int[Array, "#B T"]
) -> tuple[Float[Array, "#B T 1 F"], Float[Array, "#B T 1 F"]]:
    """Return cosine and sine of each position's angles, in float32.

    They are one array, cut in two. XLA for CPUs would otherwise compute them again for every head
    of every layer, inside the fusion that rotates, where layers stand in a row: a twentieth of a
    training step (benchmarks/NOTES.md).
    """
    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(config)[None, None]
    both = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    cos, sin = jnp.split(both[:, :, None], 2, axis=-1)
    return cos, sin


def apply_rope(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "#B T 1 F"],
    sin: Float[Array, "#B T 1 F"],
) -> Float[Array, "B T N H"]:
    """Rotate each pair ``(x_i, x_{i + H/2})`` of every head by its position's angle, in float32."""
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
