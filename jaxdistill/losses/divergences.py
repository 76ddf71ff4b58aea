"""Divergences over rows of logits: each takes ``[N, V]`` logits, returns ``[N]`` values in nats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def forward_kl(
    student_logits: Float[Array, "N V"],
    teacher_logits: Float[Array, "N V"],
    *,
    temperature: float = 1.0,
) -> Float[Array, "N"]:
    """Return ``T^2 * sum_v p log(p / q)``; softmax(z / T) is the teacher's ``p``, student's ``q``.

    The entropy of ``p`` is included, so equal logits give 0 (Hinton et al., arXiv 1503.02531).
    """
    log_q = jax.nn.log_softmax(student_logits / temperature, axis=-1)
    log_p = jax.nn.log_softmax(teacher_logits / temperature, axis=-1)
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def cross_entropy(logits: Float[Array, "N V"], targets: Int[Array, "N"]) -> Float[Array, "N"]:
    """Return ``-log softmax(z)[target]`` of each row."""
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked
