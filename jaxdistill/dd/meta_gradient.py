"""Data set distillation by meta-gradients: the set that trains to the least loss on real data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxdistill.dd.condense import Batch, MetaLoss
from jaxdistill.dd.mixed_mode import LossFn
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.dd.unroll import Unroll, make_unroll


def inner_rates(synthetic: Synthetic, rate: float | int, steps: int) -> Array:
    """Return the rate of every inner step, ``[K]``: the set's learned ones, or else ``rate``."""
    log_rates = synthetic.learned.get("log_rates")
    if log_rates is None:
        return jnp.full((steps,), rate, jnp.result_type(float))
    return jnp.broadcast_to(jnp.exp(log_rates), (steps,))


def meta_gradient(
    inner_loss: LossFn,
    outer_loss: LossFn,
    init: Callable[[Array], Any] | None,
    *,
    tx: optax.GradientTransformation,
    unroll: Unroll,
    rate: float | int = 0.01,
    inner_batch: int | None = None,
) -> MetaLoss:
    """Build ``min over S of L_real(theta_K(S))`` (Wang et al., arXiv 1811.10959).

    Args:
        inner_loss: ``(params, synthetic batch) -> scalar``, what training on S makes less.
        outer_loss: ``(params, real batch) -> scalar``, what S is for. Any pair will do: any
            ``Objective`` (``dd.language.objective_loss``), with any teacher.
        init: ``key -> params``, the start of training: fresh weights, for a set that shall serve
            any network. None for one student, whose params are the real batch's ``student``: an
            argument, for a large model must not become a constant of the compiled step.
        tx: inner optimizer of rate one, see ``dd.inner``.
        unroll: steps, window, memory.
        rate: inner learning rate where the set has no ``log_rates`` of its own.
        inner_batch: rows of an inner step; None for the whole set.

    Returns:
        the ``MetaLoss``; where rates are learned its metrics have their mean, ``rate``.
    """
    train = make_unroll(inner_loss, tx, unroll, inner_batch=inner_batch)

    def meta_loss(synthetic: Synthetic, real: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        init_key, train_key = jax.random.split(key)
        rates = inner_rates(synthetic, rate, unroll.steps)
        start = real["student"] if init is None else init(init_key)
        params = train(start, synthetic.batch(), rates, train_key)
        metrics = {"rate": jnp.mean(rates)} if "log_rates" in synthetic.learned else {}
        seen = {name: x for name, x in real.items() if name != "student"}
        return outer_loss(params, seen), metrics

    return meta_loss
