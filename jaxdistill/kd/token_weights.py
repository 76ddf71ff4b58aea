"""Weights of tokens from how uncertain the teacher is, or how far several teachers disagree."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.errors import UserError
from jaxdistill.losses.divergences import entropy, kl, log_probs
from jaxdistill.losses.registry import register

Teachers = Sequence[Float[Array, "N V"]]


@register(
    "token_weight",
    formula="(1 - H(p) / log V)^power",
    source="after Guo et al. 2024 and earlier entropy weighting; the survey arXiv 2504.14772",
    when="noisy text or a weak teacher: tokens the teacher is sure of count more",
    cost="the teacher's entropy",
)
def certainty(teacher_logits: Teachers, *, power: float = 1.0) -> Float[Array, "N"]:
    """Weigh a token by how sure the teachers are of it, on average."""
    sure = [1 - entropy(log_probs(z)) / jnp.log(z.shape[-1]) for z in teacher_logits]
    return jnp.clip(sum(sure) / len(sure), 0.0, 1.0) ** power


@register(
    "token_weight",
    formula="(H(p) / log V)^power",
    source="as certainty, the other way round",
    when="a good teacher: tokens with more than one right answer hold most of what it knows",
    cost="the teacher's entropy",
)
def uncertainty(teacher_logits: Teachers, *, power: float = 1.0) -> Float[Array, "N"]:
    """Weigh a token by how unsure the teachers are of it, on average."""
    unsure = [entropy(log_probs(z)) / jnp.log(z.shape[-1]) for z in teacher_logits]
    return jnp.clip(sum(unsure) / len(unsure), 0.0, 1.0) ** power


@register(
    "token_weight",
    formula="exp(-scale * mean_m KL(p_m || mean_j p_j))",
    source="ensemble disagreement, Lakshminarayanan et al. 2017, arXiv 1612.01474",
    when="several teachers: tokens on which they contradict each other count less",
    cost="a KL for each teacher",
)
def consensus(teacher_logits: Teachers, *, scale: float = 1.0) -> Float[Array, "N"]:
    """Weigh a token by how far the teachers agree on it (their Jensen-Shannon divergence)."""
    if len(teacher_logits) < 2:
        raise UserError("consensus compares teachers; give two or more, or use certainty")
    log_p = jnp.stack([log_probs(z) for z in teacher_logits])
    middle = jax.nn.logsumexp(log_p, axis=0) - jnp.log(log_p.shape[0])
    return jnp.exp(-scale * jnp.mean(jax.vmap(kl, (0, None))(log_p, middle), axis=0))
