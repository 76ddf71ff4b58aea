"""The training step: ``(state, teacher_params, batch) -> (state, metrics)``, jitted and donated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxdistill.errors import UserError
from jaxdistill.kd.freeze import (
    Optimizer,
    combine,
    frozen_parts,
    hide,
    init_optimizer,
    partition,
    still,
    with_extra_args,
)
from jaxdistill.kd.objective import Batch, Metrics, Objective
from jaxdistill.kd.schedule import Schedule
from jaxdistill.paths import Params, path_of


@flax.struct.dataclass
class TrainState:
    """Hold everything a step changes: updates done, float32 masters, optimizer, schedule."""

    step: Any  # int32 []; not checked, for jax also builds states of shapes and of donation marks
    params: Params
    opt_state: Any
    schedule: Any = ()


def init_state(params: Params, tx: Optimizer, schedule: Schedule | None = None) -> TrainState:
    """Return the state before the first step; it owns copies, for the step donates its state."""
    params = jax.tree.map(jnp.array, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=init_optimizer(tx, params),
        schedule=schedule.init() if schedule else (),
    )


def adamw(
    learning_rate: float | int | Array,
    steps: int,
    *,
    warmup: float = 0.05,
    final: float = 0.1,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Build AdamW behind global-norm clipping, with linear warm-up and cosine decay.

    Args:
        learning_rate: the peak; may be traced, so that runs of many rates can be one ``vmap``.
        steps: updates in all.
        warmup: share of the steps that rise linearly to the peak.
        final: the last rate, as a share of the peak.
        weight_decay: decoupled decay of matrices; vectors (norms, biases) have none.
        clip_norm: largest global norm of the gradient.
    """
    rise = max(1, round(warmup * steps))
    shape = optax.warmup_cosine_decay_schedule(1 / rise, 1.0, rise, max(steps, rise + 1), final)

    def decayed(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: path_of(keys).rsplit("/", 1)[-1] in ("kernel", "embedding"), params
        )

    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            lambda count: learning_rate * shape(count),
            b2=0.95,
            weight_decay=weight_decay,
            mask=decayed,
        ),
    )


def _or_one(count: Array) -> Array:
    """Return what a sum is divided by: the count, a sum of weights may be below 1; 1 for none."""
    return jnp.where(count > 0, count, jnp.ones_like(count))


def _moved_on(schedule: Schedule | None, state: TrainState, loss: tuple[Array, Array]) -> Any:
    """Return the schedule's state after a step of this (loss sum, count)."""
    if schedule is None:
        return state.schedule
    return schedule.update(state.schedule, state.step, loss[0] / _or_one(loss[1]))


def make_step(
    objective: Objective,
    tx: Optimizer,
    *,
    accumulate: int = 1,
    rollout: Callable[[Params, Batch, Array], Batch] | None = None,
    schedule: Schedule | None = None,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Build the jitted step.

    Gradients are taken of the trainable part of the params only: data (fixed scales, stored
    integers) and what a ``kd.freeze`` froze, wherever in ``tx`` it is (``optax.chain``,
    ``optax.MultiSteps``, ...), pass through untouched and their gradients are never computed. The
    optimizer does not see them. The state is donated: use the returned one.

    The optimizer gets ``value``, ``grad`` and ``value_fn`` (the mean loss of this batch), which
    ``optax.contrib.reduce_on_plateau``, ``optax.polyak_sgd`` and line searches ask for.

    Args:
        objective: see ``kd.objective``.
        tx: any optax optimizer, usually ``ov_freeze(...)`` of one.
        accumulate: micro-batches a step; the batch's rows are divided among them, and the loss is
            the same mean over all their tokens (of terms with counts of their own, on states or
            across tokenizers, the mean of the micro-batches' means).
        rollout: ``(params, batch, step) -> batch``, which may put the student's own text in place
            of the data's before the loss is taken (``kd.rollout``); no gradient passes through it.
        schedule: hands the objective its ``knobs`` (``kd.schedule``); ``init_state`` needs it too.
    """
    tx = with_extra_args(tx)

    if accumulate < 1:
        raise UserError(f"accumulate is {accumulate}; accepted: 1 or more")

    def step(state: TrainState, teacher_params: Any, batch: Batch):
        rows = len(jax.tree.leaves(batch)[0])
        if rows % accumulate:
            raise UserError(f"accumulate={accumulate} does not divide a batch of {rows} rows")
        parts = frozen_parts(tx, state.params)
        _check_state(tx, state, parts)
        trainable, frozen = partition(state.params, parts)
        knobs = (schedule.knobs(state.schedule, state.step),) if schedule else ()
        if rollout:
            batch = rollout(jax.lax.stop_gradient(state.params), batch, state.step)

        def loss(trainable: Params, part: Batch):
            params = combine(trainable, frozen)
            total, count, metrics = objective(params, teacher_params, part, *knobs)
            return total, (count, metrics)

        def gradient_and_sums(trainable: Params, part: Batch):
            (total, (count, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(
                trainable, part
            )
            return gradient, total, count, metrics

        def total_and_count(trainable: Params, part: Batch):
            total, (count, _) = loss(trainable, part)
            return total, count

        def mean_loss(trainable: Any):
            total, count = _summed(total_and_count, trainable, batch, accumulate)
            return total / _or_one(count)

        gradient, total, count, metrics = _summed(gradient_and_sums, trainable, batch, accumulate)
        gradient = still(jax.tree.map(lambda g: g / _or_one(count), gradient), parts)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by counts
            updates, opt_state = tx.update(
                gradient,
                state.opt_state,
                trainable,
                value=total / _or_one(count),
                grad=gradient,
                value_fn=mean_loss,
            )
            moved = cast(Params, optax.apply_updates(trainable, still(updates, parts)))
        ones = jnp.ones(())
        metrics = metrics | {"grad_norm": (optax.tree.norm(gradient), ones)}
        metrics |= {knob: (value, ones) for knob, value in (knobs[0] if knobs else {}).items()}
        new = TrainState(
            step=state.step + 1,
            params=combine(moved, frozen),
            opt_state=opt_state,
            schedule=_moved_on(schedule, state, metrics["loss"]),
        )
        return new, metrics

    return jax.jit(step, donate_argnums=0)


def _summed(fn: Callable[..., Any], trainable: Params, batch: Batch, accumulate: int) -> Any:
    """Return the sum of ``fn(trainable, part)`` over the micro-batches."""
    if accumulate == 1:
        return fn(trainable, batch)
    parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, trainable, first)
    )
    return jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, fn(trainable, part)), None), zeros, parts
    )[0]


def _check_state(tx: Optimizer, state: TrainState, parts: Any) -> None:
    """Raise ``UserError`` unless the optimizer's state is of this optimizer and its freeze."""
    wanted = jax.eval_shape(tx.init, hide(state.params, parts))
    if jax.tree.structure(wanted) != jax.tree.structure(state.opt_state):
        raise UserError(
            "a state of another optimizer or freeze given; accepted: what init_state(params, tx) "
            "returns for this tx, or kd.freeze.migrate makes of another freeze's"
        )
