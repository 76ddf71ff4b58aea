"""Objectives: ``(params, teacher_params, batch) -> (loss_sum, count, metrics)``, pure functions."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdistill.losses.chunked import chunked_sums
from jaxdistill.losses.divergences import cross_entropy, forward_kl
from jaxdistill.models.decoder import ApplyFn, Params

Batch = dict[str, Array]  # tokens, loss_mask, segment_ids, positions, each [B, T]
Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # name -> (sum, count)


@runtime_checkable
class Objective(Protocol):
    """Score a student on a batch; means are taken over (sum, count), never over padding."""

    def __call__(
        self, params: Params, teacher_params: Params | None, batch: Batch
    ) -> tuple[Float[Array, ""], Float[Array, ""], Metrics]:
        """Return the loss's sum, the count that it is a sum over, and the metrics."""
        ...


def next_token_targets(batch: Batch) -> tuple[Array, Array]:
    """Return each place's next token and whether it counts, both ``[B*T]``.

    ``batch["loss_mask"]`` marks tokens that are targets; the place before predicts them. The first
    token of a segment is never one.
    """
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    mask = jnp.roll(batch["loss_mask"].astype(bool), -1, axis=1).at[:, -1].set(False)
    return targets.reshape(-1), mask.reshape(-1)


def kd_objective(
    student: ApplyFn,
    teacher: ApplyFn | None,
    *,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    chunk: int = 256,
    fused: bool = True,
) -> Objective:
    """Build logit distillation: ``(1 - w) * forward_kl + w * cross_entropy`` a target token.

    Args:
        student: the student's ``ApplyFn``, its transform (fake quantization) inside.
        teacher: the teacher's ``ApplyFn``; None trains on cross-entropy alone (``ce_weight`` 1).
        temperature: softens both distributions of the divergence, which is scaled by its square.
        ce_weight: ``w`` in [0, 1].
        chunk: tokens whose logits exist at once.
        fused: see ``losses.chunked``; False where the objective is differentiated twice.

    Returns:
        an ``Objective`` whose metrics are ``loss``, ``nll``, and with a teacher ``kl`` (at
        temperature 1, in nats) and ``agreement`` (equal argmax).
    """

    def rows(z_student, z_teacher, targets, mask):
        count = jnp.sum(mask, dtype=jnp.float32)

        def total(values):
            return jnp.sum(jnp.where(mask, values, jnp.zeros_like(values)))

        nll = total(cross_entropy(z_student, targets))
        if z_teacher is None:
            return {"loss": nll, "nll": nll, "count": count}
        divergence = forward_kl(z_student, z_teacher, temperature=temperature)
        kl = divergence if temperature == 1.0 else forward_kl(z_student, z_teacher)
        same = jnp.argmax(z_student, -1) == jnp.argmax(z_teacher, -1)
        loss = total(divergence)
        if ce_weight:
            loss = (1 - ce_weight) * loss + ce_weight * nll
        return {
            "loss": loss,
            "nll": nll,
            "kl": total(kl),
            "agreement": total(same.astype(jnp.float32)),
            "count": count,
        }

    def flat(x: Array) -> Array:
        return x.reshape(-1, x.shape[-1])

    def objective(params: Params, teacher_params: Params | None, batch: Batch):
        inputs = (batch["tokens"], batch.get("positions"), batch.get("segment_ids"))
        targets, mask = next_token_targets(batch)
        out = student(params, *inputs)
        guide = None if teacher is None else teacher(teacher_params, *inputs)  # pyright: ignore
        sums: dict[str, Any] = chunked_sums(
            rows,
            flat(out.hidden),
            out.head,
            None if guide is None else flat(guide.hidden),
            None if guide is None else guide.head,
            targets,
            mask,
            chunk=chunk,
            fused=fused,
        )
        count = sums.pop("count")
        return sums["loss"], count, {name: (value, count) for name, value in sums.items()}

    return objective
