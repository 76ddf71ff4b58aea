"""Divergences of models with two vocabularies, where ids mean different text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.errors import UserError
from jaxdistill.losses.divergences import Scalar, kl
from jaxdistill.losses.registry import register

_NEAR_ONE = -1e-6  # log-likelihoods above it count as it: float32 knows no more of 1 - P


@register(
    "cross_tokenizer",
    formula="sum_r |p_(r) - q_(r)|, r the rank; the shorter vocabulary filled with zeros",
    source="Boizard et al. 2024 (ULD), arXiv 2402.12030",
    when="any two models: the student learns how sure to be, not of what; add ce",
    cost="a sort of both vocabularies for every pair",
)
def uld(
    student_logits: Float[Array, "N V"],
    teacher_logits: Float[Array, "N W"],
    *,
    align: str = "spans",
    temperature: Scalar = 1.0,
) -> Float[Array, "N"]:
    """Return the distance between the sorted probabilities.

    Args:
        student_logits: of the student, at one place a row.
        teacher_logits: of the teacher, at the place that goes with it.
        align: which places go together, for the objective: ``spans``, those that have read the same
            text; ``index``, the paper's, the n-th target with the n-th.
        temperature: of both.
    """
    if align not in ("spans", "index"):
        raise UserError(f"uld:align is {align!r}; accepted: spans, index")
    p, q = (
        jnp.sort(jax.nn.softmax(z.astype(jnp.float32) / temperature, axis=-1), descending=True)
        for z in (teacher_logits, student_logits)
    )
    size = max(p.shape[1], q.shape[1])
    p, q = (jnp.pad(x, ((0, 0), (0, size - x.shape[1]))) for x in (p, q))
    return jnp.sum(jnp.abs(p - q), axis=-1)


def log1mexp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return ``log(1 - exp(x))`` of ``x < 0``, by the form that keeps its digits (Mächler 2012)."""
    near = x > -0.6931472
    small = jnp.log(-jnp.expm1(jnp.where(near, x, -1.0)))
    return jnp.where(near, small, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


@register(
    "cross_tokenizer",
    formula="KL((P_p, 1-P_p) || (P_q, 1-P_q)), P = (prod of the span's token probabilities)^(1/T)",
    source="Minixhofer et al. 2025 (ALM), arXiv 2503.20083",
    when="any two models: the student learns how likely each piece of the text is to the teacher",
    cost="one logit a token of each model",
)
def span_likelihood(
    student_log_likelihood: Float[Array, "S"],
    teacher_log_likelihood: Float[Array, "S"],
    *,
    temperature: Scalar = 1.0,
) -> Float[Array, "S"]:
    """Return the KL between the two models' chances to say the span, or anything else.

    As in the paper no factor makes up for the temperature, which divides the log-likelihoods: at a
    high one the loss is small, and long spans, unlikely to both, still tell something.
    """
    log_q, log_p = (
        jnp.minimum(x / temperature, _NEAR_ONE)
        for x in (student_log_likelihood, teacher_log_likelihood)
    )
    pair_p, pair_q = (jnp.stack([x, log1mexp(x)], axis=-1) for x in (log_p, log_q))
    return kl(pair_p, pair_q)
