"""Several teachers as one, and teachers put right by labels."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdistill.losses.divergences import kl, log_probs, target_log_probs
from jaxdistill.losses.registry import register

Teachers = Sequence[Float[Array, "N V"]]
Targets = Int[Array, "N"]


def _weighted(log_p: Float[Array, "M N V"], log_w: Float[Array, "M N"]) -> Float[Array, "N V"]:
    """Return ``log sum_m w_m p_m``, the weights brought to a sum of 1."""
    log_w = jax.nn.log_softmax(log_w, axis=0)
    return jax.nn.logsumexp(log_p + log_w[..., None], axis=0)


def _all_log_probs(teacher_logits: Teachers) -> Float[Array, "M N V"]:
    return jnp.stack([log_probs(z) for z in teacher_logits])


@register(
    "mixture",
    formula="log sum_m w_m p_m, w_m fixed",
    source="You et al. 2017 (multi-teacher networks)",
    when="teachers of about equal worth; or known ones: first=0.7 for the first of two",
    cost="a log-softmax for each teacher",
)
def mean(teacher_logits: Teachers, targets: Targets, *, first: float = 0.0) -> Float[Array, "N V"]:
    """Return the mean of the teachers' probabilities, or give the first a share of its own.

    ``first`` is that share; 0 gives all the same.
    """
    log_p = _all_log_probs(teacher_logits)
    m = log_p.shape[0]
    shares = [first, *[(1 - first) / max(1, m - 1)] * (m - 1)] if first and m > 1 else [1 / m] * m
    log_w = jnp.log(jnp.asarray(shares, jnp.float32))[:, None]
    return _weighted(log_p, jnp.broadcast_to(log_w, log_p.shape[:2]))


@register(
    "mixture",
    formula="w_m = (1 - exp(CE_m) / sum_j exp(CE_j)) / (M - 1), CE_m = -log p_m[target]",
    source="Zhang et al. 2022 (CA-MKD), arXiv 2201.00007",
    when="teachers that are good at different texts: each token asks who knows its label",
    cost="as mean",
)
def confidence(teacher_logits: Teachers, targets: Targets) -> Float[Array, "N V"]:
    """Return the mixture that trusts, for each token, who finds the label likely."""
    log_p = _all_log_probs(teacher_logits)
    if log_p.shape[0] == 1:
        return log_p[0]
    loss = -jnp.stack([target_log_probs(z, targets) for z in teacher_logits])
    share = (1 - jax.nn.softmax(loss, axis=0)) / (log_p.shape[0] - 1)
    return _weighted(log_p, jnp.log(jnp.maximum(share, 1e-30)))


@register(
    "mixture",
    formula="w_m = softmax_m(-KL(p_m || mean_j p_j) / scale)",
    source="a soft vote; cf. Du et al. 2020 (AE-KD)",
    when="one of three or more teachers may be off: the odd one out counts less",
    cost="as mean, and a KL for each teacher",
)
def agreement(
    teacher_logits: Teachers, targets: Targets, *, scale: float = 1.0
) -> Float[Array, "N V"]:
    """Return the mixture that trusts, for each token, who is near the teachers' mean."""
    log_p = _all_log_probs(teacher_logits)
    middle = _weighted(log_p, jnp.zeros(log_p.shape[:2]))
    return _weighted(log_p, -jax.vmap(kl, (0, None))(log_p, middle) / scale)


@register(
    "correction",
    formula="z[target] and max z change places where argmax z is not the target",
    source="Wen et al. 2019 (probability shift), arXiv 1911.07471",
    when="trustworthy labels: the teacher's mistakes are not learnt, its doubts are",
    cost="nothing to speak of",
)
def probability_shift(teacher_logits: Float[Array, "N V"], targets: Targets) -> Float[Array, "N V"]:
    """Return the logits with the label's and the largest one exchanged where they differ."""
    rows = jnp.arange(teacher_logits.shape[0])
    top = jnp.argmax(teacher_logits, axis=-1)
    at_target = teacher_logits[rows, targets]
    shifted = teacher_logits.at[rows, targets].set(teacher_logits[rows, top])
    return jnp.where(
        (top == targets)[:, None], teacher_logits, shifted.at[rows, top].set(at_target)
    )


@register(
    "correction",
    formula="log((1-share) p + share onehot(target))",
    source="Hinton et al. 2015, arXiv 1503.02531; as one distribution, Yuan et al. 2020",
    when="labels with some noise: both are believed in part, whatever the divergence",
    cost="nothing to speak of",
)
def label_mix(
    teacher_logits: Float[Array, "N V"], targets: Targets, *, share: float = 0.1
) -> Float[Array, "N V"]:
    """Return the teacher's probabilities with a share of the label mixed in, as logits."""
    log_p = jnp.log1p(-share) + log_probs(teacher_logits)
    rows = jnp.arange(log_p.shape[0])
    return log_p.at[rows, targets].set(jnp.logaddexp(log_p[rows, targets], jnp.log(share)))
