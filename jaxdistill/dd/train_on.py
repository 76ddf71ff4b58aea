"""Train a classifier on a batch of examples, for judging sets: the same trainer for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array

from jaxdistill.dd.classification import classification_loss


def train_classifier(
    classifier: Any,
    data: dict[str, Any],
    *,
    steps: int,
    rate: float | int | Array,
    key: Array,
    batch_size: int | None = None,
    init: Any = None,
) -> Any:
    """Return the params after ``steps`` of Adam on ``data``; pure, and at home in ``vmap``.

    Args:
        classifier: has ``init(key)`` and ``apply(params, inputs)``, see ``models.classifiers``.
        data: ``inputs`` ``[M, ...]``, and ``labels`` ``[M]`` or ``label_logits`` ``[M, C]``.
        steps: updates.
        rate: Adam's; may be traced.
        key: of the fresh params and the minibatches.
        batch_size: rows of an update, drawn anew with replacement; None, or at least M, takes all.
        init: params to start from; by default fresh ones.
    """
    points = train_points(
        classifier, data, points=[steps], rate=rate, key=key, batch_size=batch_size, init=init
    )
    return jax.tree.map(lambda x: x[0], points)


def train_points(
    classifier: Any,
    data: dict[str, Any],
    *,
    points: Sequence[int] | Array,
    rate: float | int | Array,
    key: Array,
    batch_size: int | None = None,
    init: Any = None,
) -> Any:
    """Return the params of one training after each of ``points`` steps, stacked on axis 0.

    See ``train_classifier`` for the arguments. ``points`` rise; the rate is constant, so that the
    params at a point are what a training of that length ends with.
    """
    loss = classification_loss(classifier.apply)
    tx = optax.scale_by_adam()
    init_key, batch_key = jax.random.split(key)
    params = classifier.init(init_key) if init is None else init
    data = {name: data[name] for name in ("inputs", "labels", "label_logits") if name in data}
    size = data["inputs"].shape[0]

    def step(i: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        params, moments = state
        batch = data
        if batch_size is not None and batch_size < size:
            rows = jax.random.randint(jax.random.fold_in(batch_key, i), (batch_size,), 0, size)
            batch = jax.tree.map(lambda x: x[rows], data)
        gradient = jax.grad(loss)(params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to counts
            updates, moments = tx.update(gradient, moments)
        scaled = jax.tree.map(lambda u: -jnp.asarray(rate, u.dtype) * u, updates)
        return optax.apply_updates(params, scaled), moments

    def stretch(state: tuple[Any, Any], ends: tuple[Array, Array]) -> tuple[Any, Any]:
        state = lax.fori_loop(*ends, step, state)
        return state, state[0]

    ends = jnp.asarray(points, jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    return lax.scan(stretch, (params, tx.init(params)), (starts, ends))[1]
