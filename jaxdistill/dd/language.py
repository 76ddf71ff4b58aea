"""Data set distillation of language models: rows of embeddings, soft labels, scores of texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxdistill.dd.mixed_mode import LossFn
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.dd.unroll import Unroll, make_unroll
from jaxdistill.kd.objective import Batch, Objective
from jaxdistill.models.decoder import ApplyFn


def objective_loss(objective: Objective) -> LossFn:
    """Return an objective's mean, ``(params, data) -> scalar``, for inner and outer losses.

    ``data`` is a batch, and where the objective has a live teacher, that teacher's params under
    ``teacher``. Build the objective with ``fused=False``: it is differentiated twice.
    """

    def loss(params: Any, data: Any) -> Array:
        batch = {name: x for name, x in data.items() if name != "teacher"}
        total, count, _ = objective(params, data.get("teacher"), batch)
        return total / jnp.where(count > 0, count, jnp.ones_like(count))

    return loss


def embedded_rows(
    rows: Batch,
    table: Float[Array, "V D"],
    *,
    teacher_logits: Float[Array, "M T V"] | None = None,
    rate: float | int | None = None,
    steps: int | None = None,
) -> Synthetic:
    """Return a set of input embeddings ``[M, T, D]`` that begins as the embeddings of real rows.

    Args:
        rows: M packed rows: tokens (they stay as the hard labels), masks, positions.
        table: the embeddings that the student and, where it is live, the teacher read.
        teacher_logits: soft labels to begin with, which are then learned too; kd_objective reads
            them as its teacher.
        rate: inner learning rate to begin with, where it is learned.
        steps: K, where every step has a rate of its own; None for one rate.
    """
    learned = {"embeddings": jnp.take(table, jnp.asarray(rows["tokens"]), axis=0)}
    if teacher_logits is not None:
        learned["teacher_logits"] = teacher_logits
    if rate is not None:
        shape = () if steps is None else (steps,)
        learned["log_rates"] = jnp.full(shape, jnp.log(jnp.asarray(rate, jnp.float32)))
    return Synthetic(learned=learned, fixed={name: jnp.asarray(x) for name, x in rows.items()})


def with_teacher_labels(
    synthetic: Synthetic, teacher: ApplyFn, teacher_params: Any, *, vocab_size: int | None = None
) -> Synthetic:
    """Return the set with what a teacher says of its rows as fixed soft labels ``[M, T, V]``."""
    rows = synthetic.batch()
    read = rows["embeddings"] if "embeddings" in rows else rows["tokens"]
    out = teacher(teacher_params, read, rows.get("positions"), rows.get("segment_ids"))
    logits = out.logits()[..., :vocab_size]
    learned = {k: x for k, x in synthetic.learned.items() if k != "teacher_logits"}
    return Synthetic(learned=learned, fixed={**synthetic.fixed, "teacher_logits": logits})


def row_scores(
    inner_loss: LossFn,
    outer_loss: LossFn,
    *,
    tx: optax.GradientTransformation,
    unroll: Unroll,
    rate: float | int,
    inner_batch: int | None = None,
) -> Callable[[Any, Batch, Batch, Array], Float[Array, "N"]]:
    """Build the meta-gradient score of texts: what a row more of each would save on real text.

    ``-dL_real(theta_K(w))/dw_i`` at ``w = 1``, ``w_i`` the weight of all tokens of row i in
    training: the influence that the row has through K steps of training, not of one gradient.

    Args:
        inner_loss: ``(params, rows)``, weighted by the rows' ``weights`` as ``kd_objective`` is.
        outer_loss: ``(params, real rows)``.
        tx: inner optimizer of rate one.
        unroll: steps, window, memory.
        rate: inner learning rate.
        inner_batch: rows of a step; None for all.

    Returns:
        jitted ``(params, rows, real, key) -> scores [N]``.
    """
    train = make_unroll(inner_loss, tx, unroll, inner_batch=inner_batch)

    def value(weights: Array, params: Any, rows: Batch, real: Batch, key: Array) -> Array:
        weighted = {**rows, "weights": jnp.broadcast_to(weights[:, None], rows["tokens"].shape)}
        rates = jnp.full((unroll.steps,), rate, jnp.float32)
        return outer_loss(train(params, weighted, rates, key), real)

    def scores(params: Any, rows: Batch, real: Batch, key: Array) -> Array:
        ones = jnp.ones((rows["tokens"].shape[0],), jnp.float32)
        return -jax.grad(value)(ones, params, rows, real, key)

    return jax.jit(scores)
