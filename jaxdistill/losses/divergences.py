"""Divergences over rows of logits: each takes ``[N, V]`` logits, returns ``[N]`` values in nats.

``p`` is the teacher's and ``q`` the student's ``softmax(z / temperature)``; every divergence of the
two is multiplied by ``temperature^2``, which keeps the size of its gradient (Hinton et al., arXiv
1503.02531). All are computed in float32.

A logit may be -inf, a token that cannot come next: ``0 log 0`` is 0, so a token that neither model
can say changes neither value nor gradient. One that only the student cannot say makes the forward
KL infinite, one that only the teacher cannot say the reverse KL.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.losses.registry import register

Scalar = float | int | Float[Array, ""]  # traced where it follows a schedule
Logits = Float[Array, "N V"]
Values = Float[Array, "N"]


def log_probs(logits: Logits, temperature: Scalar = 1.0) -> Logits:
    """Return float32 ``log softmax(logits / temperature)``."""
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def kl(log_p: Logits, log_q: Logits) -> Values:
    """Return ``sum_v p log(p / q)`` of log-probabilities; ``0 log 0`` is 0."""
    p = jnp.exp(log_p)
    # Where p is 0 both logs may be -inf, and their difference NaN.
    return jnp.sum(p * jnp.where(p > 0, log_p - log_q, jnp.zeros_like(p)), axis=-1)


def entropy(log_p: Logits) -> Values:
    """Return ``-sum_v p log p`` of log-probabilities; ``0 log 0`` is 0."""
    return -kl(log_p, jnp.zeros_like(log_p))


def _part(weight: Scalar | Values, log_p: Logits, log_q: Logits) -> Values:
    """Return ``weight * kl(log_p, log_q)``: 0 at weight 0, also of an infinite KL."""
    weight = jnp.asarray(weight, jnp.float32)
    used = jnp.broadcast_to(jnp.expand_dims(weight > 0, -1), log_p.shape)
    return weight * kl(jnp.where(used, log_p, -jnp.inf), log_q)


def log_sum_exp(x: Logits) -> Values:
    """Return ``log sum_v exp(x)``: of no gradient, not of NaN, where every entry is -inf."""
    possible = jnp.any(x > -jnp.inf, axis=-1)
    total = jax.nn.logsumexp(jnp.where(possible[:, None], x, jnp.zeros_like(x)), axis=-1)
    return jnp.where(possible, total, -jnp.inf)


def _mixed(log_a: Logits, log_b: Logits, share: Scalar) -> Logits:
    """Return ``log(share * a + (1 - share) * b)``."""
    share = jnp.asarray(share, jnp.float32)
    log_a, log_b = jnp.log(share) + log_a, jnp.log1p(-share) + log_b
    possible = (log_a > -jnp.inf) | (log_b > -jnp.inf)
    zeros = jnp.zeros_like(log_a)  # logaddexp of -inf twice has a gradient of NaN
    mixed = jnp.logaddexp(jnp.where(possible, log_a, zeros), jnp.where(possible, log_b, zeros))
    return jnp.where(possible, mixed, -jnp.inf)


@register(
    "divergence",
    formula="T^2 * sum_v p log(p / q)",
    source="Hinton et al. 2015, arXiv 1503.02531",
    when="the default: the student covers all that the teacher finds likely",
    cost="a log-softmax of each model's logits",
)
def forward_kl(
    student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0
) -> Values:
    """Return the divergence from teacher to student, entropy included: equal logits give 0."""
    log_p, log_q = log_probs(teacher_logits, temperature), log_probs(student_logits, temperature)
    return temperature**2 * kl(log_p, log_q)


@register(
    "divergence",
    formula="T^2 * sum_v q log(q / p)",
    source="Gu et al. 2023 (MiniLLM), arXiv 2306.08543",
    when="a student too small for all of the teacher: it keeps to the teacher's main modes",
    cost="as forward_kl",
)
def reverse_kl(
    student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0
) -> Values:
    """Return the divergence from student to teacher."""
    log_p, log_q = log_probs(teacher_logits, temperature), log_probs(student_logits, temperature)
    return temperature**2 * kl(log_q, log_p)


@register(
    "divergence",
    formula="KL(p||q) + KL(q||p)",
    source="Jeffreys 1946",
    when="neither a missed nor an invented mode is welcome",
    cost="as forward_kl",
)
def jeffreys(
    student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0
) -> Values:
    """Return the sum of forward and reverse KL."""
    log_p, log_q = log_probs(teacher_logits, temperature), log_probs(student_logits, temperature)
    return temperature**2 * (kl(log_p, log_q) + kl(log_q, log_p))


@register(
    "divergence",
    formula="beta KL(p||m) + (1-beta) KL(q||m), m = beta p + (1-beta) q; KL(p||q) at beta 0, "
    "KL(q||p) at 1",
    source="Agarwal et al. 2023 (GKD), arXiv 2306.13649",
    when="on-policy training: bounded, so a strange sample cannot blow it up",
    cost="as forward_kl, and the mixture",
)
def jsd(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    beta: Scalar = 0.5,
    temperature: Scalar = 1.0,
) -> Values:
    """Return the generalized Jensen-Shannon divergence.

    The formula is 0 at both ends of ``beta``, whatever the models. There it is the forward (0) and
    the reverse (1) KL, to which ``jsd / beta`` and ``jsd / (1 - beta)`` tend.
    """
    log_p, log_q = log_probs(teacher_logits, temperature), log_probs(student_logits, temperature)
    beta = jnp.asarray(beta, jnp.float32)
    log_m = _mixed(log_p, log_q, beta)  # q at beta 0, p at 1
    of_p, of_q = jnp.where(beta > 0, beta, 1.0), jnp.where(beta < 1, 1 - beta, 1.0)
    return temperature**2 * (of_p * kl(log_p, log_m) + of_q * kl(log_q, log_m))


@register(
    "divergence",
    formula="KL(p || alpha p + (1-alpha) q)",
    source="Ko et al. 2024 (DistiLLM), arXiv 2402.03898",
    when="a weak student: bounded gradients where it has no mass yet",
    cost="as forward_kl, and the mixture",
)
def skew_forward_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    alpha: Scalar = 0.1,
    temperature: Scalar = 1.0,
) -> Values:
    """Return the forward KL to a student that a share ``alpha`` of the teacher is mixed into."""
    log_p, log_q = log_probs(teacher_logits, temperature), log_probs(student_logits, temperature)
    return temperature**2 * kl(log_p, _mixed(log_p, log_q, alpha))


@register(
    "divergence",
    formula="KL(q || (1-alpha) p + alpha q)",
    source="Ko et al. 2024 (DistiLLM), arXiv 2402.03898",
    when="the student's own samples, off-policy ones too: bounded",
    cost="as forward_kl, and the mixture",
)
def skew_reverse_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    alpha: Scalar = 0.1,
    temperature: Scalar = 1.0,
) -> Values:
    """Return the reverse KL to a teacher that a share ``alpha`` of the student is mixed into."""
    log_p, log_q = log_probs(teacher_logits, temperature), log_probs(student_logits, temperature)
    return temperature**2 * kl(log_q, _mixed(log_q, log_p, alpha))


@register(
    "divergence",
    formula="1/2 sum_v |p - q|",
    source="Wen et al. 2023 (f-distill), arXiv 2307.15190",
    when="a symmetric and bounded loss; slow to start where p and q do not overlap",
    cost="as forward_kl",
)
def total_variation(
    student_logits: Logits, teacher_logits: Logits, *, temperature: Scalar = 1.0
) -> Values:
    """Return half of the absolute difference between the two distributions."""
    log_p, log_q = log_probs(teacher_logits, temperature), log_probs(student_logits, temperature)
    return temperature**2 * 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def _likeliest(p: Logits, share: Scalar) -> Bool[Array, "N V"]:
    """Return which entries, largest first, sum up to at most ``share``, and the largest always.

    A bisection for the smallest of them: on the bits of the floats, which are in the same order, so
    it ends at an exact entry. A sort of a vocabulary takes many times longer.
    """
    bits = lax.bitcast_convert_type(p, jnp.int32)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        too_low, fits = bounds
        middle = too_low + (fits - too_low) // 2
        kept = jnp.where(bits >= middle[:, None], p, jnp.zeros_like(p))
        enough = jnp.sum(kept, axis=-1) <= share
        return jnp.where(enough, too_low, middle), jnp.where(enough, middle, fits)

    above_one = jnp.full(p.shape[0], 2**30, jnp.int32)  # the bits of 2.0
    smallest = lax.fori_loop(0, 31, halve, (jnp.full_like(above_one, -1), above_one))[1]
    return (bits >= smallest[:, None]) | (p >= jnp.max(p, axis=-1, keepdims=True))


@register(
    "divergence",
    formula="(g_head KL(p||q) + g_tail KL(q||p)) / (g_head + g_tail), g = sum |p - q| of each part",
    source="Wu et al. 2024 (AKL), arXiv 2404.02657",
    when="short training: each step fits head or tail of p, whichever is further off",
    cost="31 passes over the teacher's probabilities, to find where its head ends",
)
def adaptive_kl(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    head: Scalar = 0.5,
    temperature: Scalar = 1.0,
) -> Values:
    """Return forward and reverse KL, weighed by the gaps in the teacher's head and tail.

    The head holds the teacher's likeliest tokens while their cumulative probability is at most
    ``head``, and the likeliest one always; equally likely ones stay together. No gradient passes
    through the weights.
    """
    log_p, log_q = log_probs(teacher_logits, temperature), log_probs(student_logits, temperature)
    p, q = (lax.stop_gradient(jnp.exp(x)) for x in (log_p, log_q))
    gap = jnp.abs(p - q)
    in_head = _likeliest(p, head)
    g_head = jnp.sum(jnp.where(in_head, gap, 0.0), axis=-1)
    g_all = jnp.sum(gap, axis=-1)
    share = jnp.where(g_all > 0, g_head / jnp.where(g_all > 0, g_all, 1.0), 0.5)
    return temperature**2 * (_part(share, log_p, log_q) + _part(1 - share, log_q, log_p))


@register(
    "divergence",
    formula="c KL(q||p) + (1-c) KL(p||q), c the teacher's mean top probability",
    source="Du et al. 2024 (BitDistiller), arXiv 2402.10631",
    when="low-bit students: a sure teacher is sought, an unsure one is covered",
    cost="as forward_kl; c is measured once, before training",
)
def cakld(
    student_logits: Logits,
    teacher_logits: Logits,
    *,
    confidence: Scalar,
    temperature: Scalar = 1.0,
) -> Values:
    """Return reverse and forward KL, weighed by the teacher's confidence on the data.

    ``confidence`` is a constant of teacher and data, which the command line measures by itself
    (``evals.confidence``).
    """
    log_p, log_q = log_probs(teacher_logits, temperature), log_probs(student_logits, temperature)
    mixed = _part(confidence, log_q, log_p) + _part(1 - confidence, log_p, log_q)
    return temperature**2 * mixed


@register(
    "divergence",
    formula="KL(r || q), r = softmax((1-t) stop(z_q) + t z_p)",
    source="Shing et al. 2025 (TAID), arXiv 2501.16937",
    when="a student far smaller than its teacher: the goal moves ahead as the student follows",
    cost="a log-softmax more",
)
def taid(
    student_logits: Logits, teacher_logits: Logits, *, t: Scalar, temperature: Scalar = 1.0
) -> Values:
    """Return the KL from a goal between student (``t`` 0) and teacher (``t`` 1) to the student.

    ``t`` follows the loss where a run's schedule adapts it, see ``kd.schedule``.
    """
    student, teacher = (z.astype(jnp.float32) for z in (student_logits, teacher_logits))
    between = (1 - t) * student + t * teacher
    # At an end the other model has no part, not even the -inf that 0 times -inf would make NaN.
    goal = jnp.where(t <= 0, student, jnp.where(t >= 1, teacher, between))
    return forward_kl(student, lax.stop_gradient(goal), temperature=temperature)


def target_log_probs(logits: Logits, targets: Int[Array, "N"]) -> Values:
    """Return ``log softmax(z)[target]`` of each row."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


@register(
    "divergence",
    formula="-log q[target]",
    source="maximum likelihood; on the teacher's own text, Kim and Rush 2016, arXiv 1606.07947",
    when="labels to trust, as one term of a sum; alone, for text that the teacher wrote",
    cost="less than any other: no teacher",
)
def ce(student_logits: Logits, targets: Int[Array, "N"]) -> Values:
    """Return the cross-entropy of the next token."""
    return -target_log_probs(student_logits, targets)


@register(
    "divergence",
    formula="-stop(log p[y] - log q[y]) log q[y], y sampled from the student",
    source="Lu et al. 2025 (on-policy distillation); Gu et al. 2023, arXiv 2306.08543",
    when="on-policy training at long context: reverse KL by the sampled token alone",
    cost="one logit of each model a token",
)
def policy_gradient(
    student_logits: Logits, teacher_logits: Logits, targets: Int[Array, "N"]
) -> Values:
    """Return a loss whose expected gradient on the student's samples is that of reverse KL.

    Only its gradient has a meaning: the value's mean is no divergence.
    """
    log_q, log_p = (target_log_probs(z, targets) for z in (student_logits, teacher_logits))
    possible = jnp.maximum(log_p, log_q) > -jnp.inf
    log_q = jnp.where(possible, log_q, jnp.zeros_like(log_q))
    advantage = lax.stop_gradient(jnp.where(possible, log_p, jnp.zeros_like(log_p)) - log_q)
    return -advantage * log_q
