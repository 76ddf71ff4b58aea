"""Training as a function: K optimizer steps on a synthetic set, to be differentiated through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array

from jaxdistill.dd.checkpointing import checkpointed_scan, levels_for, tree_bytes
from jaxdistill.dd.mixed_mode import LossFn, gradient
from jaxdistill.errors import UserError
from jaxdistill.kd.freeze import combine, frozen_parts, partition, still

# (params, batch, rates [K], key) -> trained params
Train = Callable[[Any, Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unroll:
    """Say how many steps are taken, how many are differentiated, and at what cost.

    Attributes:
        steps: K, inner optimizer steps.
        window: W, the steps that are differentiated; None for all of them.
        placement: where the window lies: ``"end"``, the last W of K steps (truncated
            backpropagation), or ``"random"``: training stops after n steps, n drawn uniformly from
            W to K, and the last W before n are differentiated (RaT-BPTT, arXiv 2310.00648). In
            expectation that is the mean, over n, of the truncated gradients of the loss after n
            steps; like any truncated gradient it leaves out what earlier steps did.
        mixed_mode: see ``dd.mixed_mode``.
        levels: of checkpoints, see ``dd.checkpointing``.
        memory_budget: bytes for the states that checkpoints hold; chooses ``levels`` itself.
    """

    steps: int
    window: int | None = None
    placement: Literal["end", "random"] = "end"
    mixed_mode: bool = True
    levels: int = 2
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"{self.steps} inner steps given; accepted: 1 or more")
        if self.window is not None and not 1 <= self.window <= self.steps:
            raise UserError(
                f"a window of {self.window} given for {self.steps} inner steps; accepted: 1 to "
                f"{self.steps}"
            )
        if self.placement not in ("end", "random"):
            raise UserError(f"placement {self.placement!r} given; accepted: end, random")
        if self.levels < 0:
            raise UserError(f"{self.levels} levels given; accepted: 0 or more")


def make_unroll(
    loss: LossFn,
    tx: optax.GradientTransformation,
    how: Unroll,
    *,
    inner_batch: int | None = None,
) -> Train:
    """Build ``train(params, batch, rates, key) -> params``, differentiable in reverse mode.

    Step k is ``params += rates[k] * tx.update(dL/dparams(params, batch_k))``. What a ``kd.freeze``
    anywhere in ``tx`` froze, and data such as fixed scales, stays as it is and has no optimizer
    state; its gradients are not computed. The result has derivatives by params
    (within the window), by the float leaves of the batch and by the rates.

    Args:
        loss: ``(params, batch) -> scalar``; see ``mixed_mode.gradient`` for what it may hold.
        tx: an optax transformation of rate one, see ``dd.inner``, or a ``kd.freeze.freeze`` of one.
        how: steps, window, memory.
        inner_batch: rows of a step, drawn anew in every epoch; None for the whole set.

    Raises:
        UserError: an ``inner_batch`` below 1.

    Returns:
        the function. ``batch`` is a dict of arrays ``[M, ...]``, ``rates`` is ``[K]``; ``key``
        serves the random window and the order of the rows.
    """
    if inner_batch is not None and inner_batch < 1:
        raise UserError(f"an inner batch of {inner_batch} given; accepted: 1 or more, or None")
    of_moving = gradient(
        lambda moving, data: loss(combine(moving, data["frozen"]), data["batch"]),
        mixed_mode=how.mixed_mode,
    )
    window = how.window or how.steps

    def train(params: Any, batch: Any, rates: Array, key: Array) -> Any:
        window_key, order_key = jax.random.split(key)
        rows = None
        if inner_batch is not None:
            size = next(iter(_examples(batch).values())).shape[0]
            rows = _orders(order_key, size, min(inner_batch, size), how.steps)

        parts = frozen_parts(tx, params)
        moving, frozen = partition(params, parts)

        def step(
            state: tuple[Any, Any], k: Array, frozen: Any, batch: Any, rates: Array
        ) -> tuple[Any, Any]:
            moving, opt_state = state
            picked = batch
            if rows is not None:
                arrays = _examples(batch)
                own = {name: jnp.take(x, rows[k], axis=0) for name, x in arrays.items()}
                picked = {**batch, **own}
            found = still(of_moving(moving, {"frozen": frozen, "batch": picked}), parts)
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to counts
                updates, opt_state = tx.update(found, opt_state, moving)
            updates = still(cast(Any, updates), parts)
            scaled = jax.tree.map(lambda u: u * rates[k].astype(u.dtype), updates)
            return optax.apply_updates(moving, scaled), opt_state

        state = (moving, tx.init(moving))
        levels = how.levels
        if how.memory_budget is not None:
            levels = levels_for(window, tree_bytes(state), how.memory_budget)
        start: Any = how.steps - window
        if window < how.steps:
            if how.placement == "random":
                start = jax.random.randint(window_key, (), 0, start + 1, jnp.int32)
            fixed = lax.stop_gradient((frozen, batch, rates))
            state = lax.fori_loop(
                0, start, lambda k, s: step(s, k, *fixed), lax.stop_gradient(state)
            )
            state = lax.stop_gradient(state)
        ks = jnp.arange(window, dtype=jnp.int32) + start
        moving = checkpointed_scan(
            lambda s, k: step(s, k, frozen, batch, rates), state, ks, levels=levels
        )[0]
        return combine(moving, frozen)

    return train


def _examples(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what of a batch has a row for each example: all but a teacher's params."""
    return {name: x for name, x in batch.items() if name != "teacher"}


def _orders(key: Array, size: int, batch: int, steps: int) -> Array:
    """Return the rows of every step, ``[K, b]``: epochs in fresh orders, cut where K ends."""
    per_epoch = size // batch
    epochs = -(-steps // per_epoch)
    orders = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(key, epochs))
    return orders[:, : per_epoch * batch].reshape(-1, batch)[:steps]
