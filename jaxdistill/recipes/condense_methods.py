"""What ``condense`` does by each method: the loss a set is learned by, or the rows selected."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int, Int32

from jaxdistill.dd.classification import classification_loss
from jaxdistill.dd.condense import MetaLoss
from jaxdistill.dd.inner import inner_optimizer
from jaxdistill.dd.kernel import kernel_ridge
from jaxdistill.dd.matching import (
    distribution_matching,
    expert_segment,
    expert_trajectory,
    gradient_matching,
    trajectory_matching,
)
from jaxdistill.dd.meta_gradient import meta_gradient
from jaxdistill.dd.selection import el2n_scores, meta_gradient_scores, select
from jaxdistill.dd.stored_set import Level
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.dd.train_on import train_classifier
from jaxdistill.dd.unroll import make_unroll
from jaxdistill.mesh import fetch
from jaxdistill.models.classifiers import Classifier, make_classifier
from jaxdistill.recipes.condense_data import Real, RealBatches
from jaxdistill.recipes.condense_options import Condense

_POOL = 1024  # examples that are weighed in one unrolled training
_EXPERTS = 1
_POINTS = 20  # stored points of an expert's trajectory, at least


def classifier_of(o: Condense, level: Level, shape: tuple[int, ...], classes: int) -> Classifier:
    """Return the inner network; raise ``UserError`` where it cannot read examples of the shape."""
    usual = {"images": "convnet", "embeddings": "transformer"}.get(level, "mlp")
    return make_classifier(
        o.architecture or usual, input_shape=shape, num_classes=classes, width=o.width
    )


def first_set(o: Condense, real: Real, rows: Int[np.ndarray, "M"]) -> Synthetic:
    """Return what learning starts from: real examples, or noise, with their labels."""
    inputs, labels = real.inputs(rows), real.data.labels[rows]
    if o.start == "noise":
        inputs = np.random.default_rng(o.seed).normal(size=inputs.shape)
    learned: dict[str, Any] = {"inputs": jnp.asarray(inputs, jnp.float32)}
    if o.soft_labels:
        classes = len(real.data.classes)
        probs = 0.9 * np.eye(classes)[labels] + 0.1 / classes
        learned["label_logits"] = jnp.asarray(np.log(probs), jnp.float32)
    if o.learn_rates:
        shape = (o.inner_steps,) if o.method == "meta-gradient" else ()
        learned["log_rates"] = jnp.full(shape, np.log(o.inner_rate), jnp.float32)
    return Synthetic(learned=learned, fixed={"labels": jnp.asarray(labels)})


def meta_loss_of(o: Condense, net: Classifier, classes: int) -> MetaLoss:
    """Return what each update makes less."""
    loss, tx = classification_loss(net.apply), inner_optimizer(o.inner_optimizer)
    match o.method:
        case "meta-gradient":
            return meta_gradient(
                loss,
                loss,
                net.init,
                tx=tx,
                unroll=o.unroll,
                rate=o.inner_rate,
                inner_batch=o.inner_batch or None,
            )
        case "gradient-matching":
            return gradient_matching(
                loss,
                net.init,
                per_class=o.per_class,
                warm_steps=o.inner_steps,
                warm_rate=o.inner_rate,
            )
        case "distribution-matching":
            return distribution_matching(net.features, net.init, num_classes=classes)
        case "trajectory-matching":
            return trajectory_matching(
                loss,
                unroll=o.unroll,
                tx=tx,
                rate=o.inner_rate,
                inner_batch=o.inner_batch or None,
            )
        case "kernel-ridge":
            return kernel_ridge(net.features, net.init, num_classes=classes)
        case _:
            raise ValueError(f"{o.method} learns nothing")


def batches_of(o: Condense, real: Real, net: Classifier, weights: np.ndarray | None) -> Any:
    """Return what serves the real data of each update."""
    if o.method == "trajectory-matching":
        return _ExpertBatches(o, real, net)
    grouped = o.method == "gradient-matching"
    return RealBatches(real, o.batch_size, o.seed, weights=weights, grouped=grouped)


def kept_every(steps: int, span: int) -> int:
    """Return how many expert steps lie between two stored points.

    Both numbers are multiples of it. It is the largest such number that stores at least 20 points,
    or 1.
    """
    common = math.gcd(steps, span)
    return max(n for n in range(1, common + 1) if common % n == 0 and n <= max(1, steps // _POINTS))


class _ExpertBatches:
    """Serve stretches of the experts' trajectories; batch i depends on the seed and i alone."""

    def __init__(self, o: Condense, real: Real, net: Classifier) -> None:
        steps_span = o.expert_span or o.expert_steps // 2
        every = kept_every(o.expert_steps, steps_span)
        self._seed, self._experts = o.seed, o.experts
        self._span = steps_span // every
        data = {"inputs": jnp.asarray(real.all_inputs()), "labels": jnp.asarray(real.data.labels)}
        small = o.batch_size < len(real.data)

        @jax.jit
        def train(keys: Any) -> Any:
            def one(key: Any) -> Any:
                return expert_trajectory(
                    classification_loss(net.apply),
                    net.init,
                    data,
                    key,
                    tx=optax.sgd(o.inner_rate),
                    steps=o.expert_steps,
                    every=every,
                    batch_size=o.batch_size if small else None,
                )

            return jax.vmap(one)(keys)

        self._points = train(jax.random.split(jax.random.key(o.seed), o.experts))

        def segment(points: Any, expert: Any, key: Any) -> Any:
            chosen = jax.tree.map(lambda x: x[expert], points)
            return expert_segment(chosen, key, span=self._span)

        self._segment = jax.jit(segment)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return the stretch of step i: ``start`` and ``end``."""
        key = jax.random.fold_in(jax.random.key(self._seed), i)
        key = jax.random.fold_in(key, _EXPERTS)  # not the key of the update itself
        expert_key, place_key = jax.random.split(key)
        expert = jax.random.randint(expert_key, (), 0, self._experts, jnp.int32)
        return self._segment(self._points, expert, place_key)


def draw_weights(
    groups: np.ndarray, quotas: dict[Any, int], slices: dict[str, Any]
) -> np.ndarray | None:
    """Return how often each example is drawn: half as often as it is, half by its group's quota.

    Without named slices None: every example as often as another.
    """
    if not slices:
        return None
    weights = np.zeros(len(groups))
    for group, quota in quotas.items():
        rows = groups == group
        weights[rows] = quota / rows.sum()
    # A group without a quota of its own is real all the same.
    return (weights / weights.sum() + 1 / len(groups)) / 2


def selected(
    o: Condense, real: Real, net: Classifier, groups: np.ndarray, quotas: dict[Any, int]
) -> Int[np.ndarray, "M"]:
    """Return the rows that a method of selection picks."""
    if o.method in ("random", "herding", "k-center"):
        return select(o.method, real.features, groups, quotas, o.seed)
    if o.method == "el2n":
        easiest = keeps_easiest(o, real.data.labels)
        return select("easiest" if easiest else "hardest", _el2n(o, real, net), groups, quotas)
    return select("hardest", _meta_gradient_scores(o, real, net), groups, quotas)


def keeps_easiest(o: Condense, labels: Int32[np.ndarray, "N"]) -> bool:
    """Return whether ``el2n`` keeps the examples of the smallest scores.

    Pruning up to half of a data set works best without its easiest examples (Paul et al., arXiv
    2107.07075). The less is kept, the more the easy examples are worth (Sorscher et al., arXiv
    2206.14486); a few of the hardest are mostly outliers and wrong labels.
    """
    if o.hardness != "auto":
        return o.hardness == "easiest"
    assert o.per_class is not None
    return 2 * o.per_class < int(np.bincount(labels).min())


def _el2n(o: Condense, real: Real, net: Classifier) -> Float[np.ndarray, "N"]:
    """Score every example by networks that were trained on all of them for a while."""
    whole = {"inputs": jnp.asarray(real.all_inputs()), "labels": jnp.asarray(real.data.labels)}

    @jax.jit
    def experts(keys: Any) -> Any:
        def one(key: Any) -> Any:
            return train_classifier(
                net, whole, steps=o.expert_steps, rate=1e-3, key=key, batch_size=o.batch_size
            )

        return jax.vmap(one)(keys)

    params = experts(jax.random.split(jax.random.key(o.seed), o.experts))
    score = jax.jit(lambda batch: el2n_scores(net.apply, params, batch))
    found = []
    for rows in np.array_split(np.arange(len(real.data)), -(-len(real.data) // _POOL)):
        part = jax.tree.map(lambda x, rows=rows: x[rows], whole)
        found.append(fetch(score(part)))
    return np.concatenate(found)


def _meta_gradient_scores(o: Condense, real: Real, net: Classifier) -> Float[np.ndarray, "N"]:
    """Score every example by its weight in an unrolled training, pool by pool.

    The loss after training is on examples of other pools, where there are several.
    """
    rng = np.random.default_rng(o.seed)
    number = len(real.data)
    order = rng.permutation(number)
    pools = np.array_split(order, -(-number // _POOL))
    loss = classification_loss(net.apply)
    train = make_unroll(
        loss, inner_optimizer(o.inner_optimizer), o.unroll, inner_batch=o.inner_batch or None
    )
    rates = jnp.full((o.inner_steps,), o.inner_rate, jnp.float32)

    @jax.jit
    def score(pool: Any, outer: Any, keys: Any) -> Any:
        def value(weights: Any) -> Any:
            def one(key: Any) -> Any:
                init_key, train_key = jax.random.split(key)
                batch = {**pool, "weights": weights}
                return loss(train(net.init(init_key), batch, rates, train_key), outer)

            return jnp.mean(jax.lax.map(one, keys))

        return meta_gradient_scores(value, pool["labels"].shape[0])

    def served(rows: np.ndarray) -> dict[str, Any]:
        return {"inputs": real.inputs(rows), "labels": real.data.labels[rows]}

    scores = np.zeros(number, np.float32)
    keys = jax.random.split(jax.random.key(o.seed), o.experts)
    for pool in pools:
        others = np.setdiff1d(order, pool) if len(pools) > 1 else pool
        outer = rng.choice(others, min(_POOL, len(others)), replace=False)
        scores[pool] = fetch(score(served(pool), served(outer), keys))
    return scores
