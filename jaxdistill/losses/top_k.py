"""A teacher by its k likeliest tokens and one bucket for all others: an exact (k+1)-way teacher.

A divergence of the (k+1)-way distributions is 0 only where the student gives each kept token, and
the rest together, the teacher's probability; the KL's, JSD's, skewed ones' and total variation are
lower bounds of those of the whole distributions (data processing inequality). Without the bucket a
student would be free to empty the top k into the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.losses.divergences import Scalar, log_probs, log_sum_exp


class TopK(NamedTuple):
    """Hold a teacher's ``softmax(z / temperature)``: k log-probabilities, their ids, the rest."""

    log_probs: Float[Array, "N k"]
    indices: Int[Array, "N k"]
    log_tail: Float[Array, "N"]


def _log_tail(log_p: Float[Array, "N V"], indices: Int[Array, "N k"]) -> Float[Array, "N"]:
    """Return the log of the probability of all other tokens, summed and not taken from 1."""
    rows = jnp.arange(log_p.shape[0])[:, None]
    return log_sum_exp(log_p.at[rows, indices].set(-jnp.inf))


def top_k_of(logits: Float[Array, "N V"], k: int, temperature: Scalar = 1.0) -> TopK:
    """Return the k likeliest tokens of each row, likeliest first, and the tail."""
    log_p = log_probs(logits, temperature)
    kept, indices = jax.lax.top_k(log_p, min(k, logits.shape[-1]))
    return TopK(kept, indices, _log_tail(log_p, indices))


def with_tail(
    student_logits: Float[Array, "N V"], teacher: TopK, temperature: Scalar = 1.0
) -> tuple[Float[Array, "N W"], Float[Array, "N W"]]:
    """Return student and teacher as (k+1)-way logits, to be divided by the same ``temperature``.

    W is k + 1, the tail's bucket the last.

    Args:
        student_logits: over the whole vocabulary.
        teacher: taken at this temperature: buckets cannot be softened afterwards.
        temperature: of the divergence that will see the result.
    """
    log_q = log_probs(student_logits, temperature)
    kept = jnp.take_along_axis(log_q, teacher.indices, axis=-1)
    tail = _log_tail(log_q, teacher.indices)
    student = jnp.concatenate([kept, tail[:, None]], axis=-1)
    values = (teacher.log_probs, teacher.log_tail[:, None])
    guide = jnp.concatenate([x.astype(jnp.float32) for x in values], axis=-1)
    return student * temperature, guide * temperature
