"""Matching: sets whose gradients, features or training end where those of real data do.

Each function builds a ``MetaLoss``. Where a method compares class by class, a real batch may come
grouped, ``inputs`` ``[C, n, ...]`` and ``labels`` ``[C, n]``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxdistill.dd.classification import label_probs
from jaxdistill.dd.condense import Batch, MetaLoss
from jaxdistill.dd.inner import inner_sgd
from jaxdistill.dd.meta_gradient import inner_rates
from jaxdistill.dd.mixed_mode import LossFn
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.dd.unroll import Unroll, make_unroll
from jaxdistill.errors import UserError

Init = Callable[..., Any]
Distance = Literal["cosine", "l2"]


def gradient_distance(ours: Any, theirs: Any, distance: Distance = "cosine") -> Float[Array, ""]:
    """Compare two gradients.

    ``cosine``: ``sum over output units of 1 - cos``, as Zhao et al. (arXiv 2006.05929) for every
    layer. An output unit is an index of the last axis, as in a kernel ``[..., in, out]``. Leaves of
    one axis (biases, norm scales) are left out, as in the authors' code. ``l2``: ``||ours -
    theirs||^2`` over all leaves.

    Raises:
        UserError: ``cosine`` without a leaf of two axes or more.
    """
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    if distance == "l2":
        return functools.reduce(jnp.add, (jnp.sum((a - b) ** 2) for a, b in pairs))
    pairs = [(a, b) for a, b in pairs if a.ndim > 1]
    if not pairs:
        raise UserError(
            "cosine gradient matching compares kernels, and this network has no parameter of two "
            "axes or more; use distance='l2'"
        )

    def of_kernel(a: Array, b: Array) -> Array:
        a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
        # Within the root: a unit without gradient has distance 1 and a bounded derivative.
        norms = [jnp.sqrt(jnp.sum(x * x, axis=0) + 1e-12) for x in (a, b)]
        return jnp.sum(1 - jnp.sum(a * b, axis=0) / (norms[0] * norms[1]))

    return functools.reduce(jnp.add, (of_kernel(a, b) for a, b in pairs))


def gradient_matching(
    loss: LossFn,
    init: Init,
    *,
    distance: Distance = "cosine",
    per_class: int | None = None,
    warm_steps: int = 0,
    warm_rate: float | int = 0.01,
) -> MetaLoss:
    """Build ``D(grad L(theta, S), grad L(theta, real))`` at fresh networks (arXiv 2006.05929).

    Args:
        loss: ``(params, batch) -> scalar``.
        init: ``key -> params``.
        distance: see ``gradient_distance``.
        per_class: synthetic examples of each class. Gradients are compared class by class, and the
            set is then sorted by class and the real batch grouped, classes in the same order. None
            compares the gradients of whole batches.
        warm_steps: the network takes a number of steps of gradient descent on S first, drawn
            uniformly from 0 to this; nothing is differentiated through them.
        warm_rate: the rate of these.

    Raises:
        UserError: an unknown distance; or, at the first call, batches that are not grouped alike.
    """
    if distance not in ("cosine", "l2"):
        raise UserError(f"distance {distance!r} given; accepted: cosine, l2")
    if warm_steps < 0 or (per_class is not None and per_class < 1):
        raise UserError(
            f"{warm_steps} warm steps and {per_class} examples per class given; accepted: 0 or "
            "more, and 1 or more (or None)"
        )
    of_params = jax.grad(loss)

    def warmed(params: Any, batch: Batch, key: Array) -> Any:
        batch = lax.stop_gradient(batch)

        def step(_: Array, params: Any) -> Any:
            gradient = of_params(params, batch)
            return jax.tree.map(
                lambda p, g: p - jnp.asarray(warm_rate, p.dtype) * g, params, gradient
            )

        steps = jax.random.randint(key, (), 0, warm_steps + 1, jnp.int32)
        return lax.stop_gradient(lax.fori_loop(0, steps, step, params))

    def meta_loss(synthetic: Synthetic, real: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        init_key, warm_key = jax.random.split(key)
        batch, params = synthetic.batch(), init(init_key)
        if warm_steps:
            params = warmed(params, batch, warm_key)
        if per_class is None:
            real = _flat(real)
            return gradient_distance(
                of_params(params, batch), of_params(params, real), distance
            ), {}
        grouped = _grouped(batch, real, per_class)
        ours, theirs = (jax.vmap(of_params, (None, 0))(params, b) for b in (grouped, real))
        each = jax.vmap(lambda a, b: gradient_distance(a, b, distance))(ours, theirs)
        return jnp.sum(each), {}

    return meta_loss


def distribution_matching(
    features: Callable[..., Any], init: Init, *, num_classes: int
) -> MetaLoss:
    """Build ``sum_c ||mean phi(S_c) - mean phi(real_c)||^2`` over random networks phi.

    Zhao and Bilen, arXiv 2110.04181. An example with soft labels is in each class by its share. A
    class that the batch or the set lacks is left out.

    Args:
        features: ``(params, inputs) -> [B, F]``.
        init: ``key -> params``.
        num_classes: C.
    """

    def class_means(params: Any, batch: Batch) -> tuple[Array, Array]:
        phi = features(params, batch["inputs"])
        share = label_probs(batch, num_classes).astype(phi.dtype)
        size = jnp.sum(share, axis=0)
        return share.T @ phi / jnp.where(size > 0, size, 1)[:, None], size > 0

    def meta_loss(synthetic: Synthetic, real: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        params = init(key)
        ours, in_set = class_means(params, synthetic.batch())
        theirs, in_real = class_means(params, _flat(real))
        each = jnp.sum((ours - theirs) ** 2, axis=-1)
        return jnp.sum(jnp.where(in_set & in_real, each, 0)), {}

    return meta_loss


def trajectory_matching(
    loss: LossFn,
    *,
    unroll: Unroll,
    tx: optax.GradientTransformation | None = None,
    rate: float | int = 0.01,
    inner_batch: int | None = None,
) -> MetaLoss:
    """Build ``||theta_N(S) - end||^2 / ||start - end||^2`` (MTT, Cazenavette, arXiv 2203.11932).

    A real batch is a segment of an expert's training, ``{"start": params, "end": params}``, see
    ``expert_segment``; theta_N(S) is what N inner steps on S make of ``start``.

    Args:
        loss: ``(params, batch) -> scalar``, of training on S.
        unroll: N and how it is differentiated.
        tx: inner optimizer of rate one, see ``dd.inner``; gradient descent by default.
        rate: inner rate where the set has no ``log_rates``.
        inner_batch: rows of an inner step; None for the whole set.
    """
    train = make_unroll(loss, tx or inner_sgd(), unroll, inner_batch=inner_batch)

    def meta_loss(synthetic: Synthetic, real: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        rates = inner_rates(synthetic, rate, unroll.steps)
        start, end = real["start"], real["end"]
        missed = _squared_distance(train(start, synthetic.batch(), rates, key), end)
        metrics = {"rate": jnp.mean(rates)} if "log_rates" in synthetic.learned else {}
        return missed / (_squared_distance(start, end) + 1e-12), metrics

    return meta_loss


def expert_trajectory(
    loss: LossFn,
    init: Init,
    data: Batch,
    key: Array,
    *,
    tx: optax.GradientTransformation,
    steps: int,
    every: int,
    batch_size: int | None = None,
) -> Any:
    """Train a network on real data and return its parameters, stacked ``[1 + steps/every, ...]``.

    Pure; ``vmap`` it over keys for several experts.

    Args:
        loss: ``(params, batch) -> scalar``.
        init: ``key -> params``.
        data: arrays ``[N, ...]``.
        key: of the start and of the batches.
        tx: any optimizer, with its own rate.
        steps: in all.
        every: steps between two that are kept.
        batch_size: rows of a step, drawn with replacement; None for all.

    Raises:
        UserError: ``every`` does not divide ``steps``.
    """
    if every < 1 or steps < every or steps % every:
        raise UserError(f"{steps} steps kept every {every}: give a multiple of 1 or more steps")
    init_key, batch_key = jax.random.split(key)
    size = jax.tree.leaves(data)[0].shape[0]

    def step(state: tuple[Any, Any], k: Array) -> tuple[tuple[Any, Any], None]:
        params, opt_state = state
        batch = data
        if batch_size is not None:
            rows = jax.random.randint(jax.random.fold_in(batch_key, k), (batch_size,), 0, size)
            batch = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), data)
        updates, opt_state = tx.update(jax.grad(loss)(params, batch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def kept(state: tuple[Any, Any], ks: Array) -> tuple[tuple[Any, Any], Any]:
        state, _ = lax.scan(step, state, ks)
        return state, state[0]

    params = init(init_key)
    ks = jnp.arange(steps, dtype=jnp.int32).reshape(-1, every)
    _, rest = lax.scan(kept, (params, tx.init(params)), ks)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), params, rest)


def expert_segment(expert: Any, key: Array, *, span: int, latest: int | None = None) -> Batch:
    """Draw ``{"start": params, "end": params}`` from a trajectory, ``span`` kept points apart.

    Args:
        expert: parameters stacked along their first axis, as ``expert_trajectory`` gives them.
        key: of the draw.
        span: kept points from start to end.
        latest: the last point to start at; by default the last that fits.

    Raises:
        UserError: the trajectory is too short.
    """
    last = jax.tree.leaves(expert)[0].shape[0] - 1 - span
    last = last if latest is None else min(last, latest)
    if span < 1 or last < 0:
        raise UserError(
            f"a span of {span} does not fit a trajectory of {last + 1 + span} points: train the "
            "expert for longer, or keep its parameters more often"
        )
    start = jax.random.randint(key, (), 0, last + 1, jnp.int32)

    def at(place: Array) -> Any:
        pick = functools.partial(lax.dynamic_index_in_dim, index=place, keepdims=False)
        return jax.tree.map(pick, expert)

    return {"start": at(start), "end": at(start + span)}


def _squared_distance(a: Any, b: Any) -> Array:
    return optax.tree.norm(optax.tree.sub(a, b), squared=True)


def _flat(real: Batch) -> Batch:
    """Return a batch ``[B, ...]`` of one that may be grouped ``[C, n, ...]``."""
    if "labels" not in real or real["labels"].ndim == 1:
        return real
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in real.items()}


def _grouped(batch: Batch, real: Batch, per_class: int) -> Batch:
    """Return the set's batch as ``[C, per_class, ...]``, with the C of the real batch."""
    size = batch["inputs"].shape[0]
    labels = real["labels"].shape
    if len(labels) != 2 or labels[0] * per_class != size:
        raise UserError(
            f"a set of {size} with {per_class} examples per class and real labels {list(labels)} "
            "cannot be compared by class: group the real batch as [classes, examples]"
        )
    return {name: x.reshape(-1, per_class, *x.shape[1:]) for name, x in batch.items()}
