"""Selection: by definitions written out here, quotas kept, and what is too few refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.dd.classification import classification_loss
from jaxdistill.dd.selection import (
    PICKS,
    by_score,
    el2n_scores,
    herding,
    k_center,
    meta_gradient_scores,
    quota_per_class,
    quotas_with_slices,
    random_selection,
    select,
)
from jaxdistill.errors import UserError


def points(rows=30, dims=3, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dims))


def test_herding_is_greedy_and_follows_welling_on_unit_norms():
    x = points()
    picked = list(herding(x, 8))
    for t in range(8):  # by definition: each choice is the best of what is left
        left = [i for i in range(30) if i not in picked[:t]]
        away = {i: np.linalg.norm(x[picked[:t] + [i]].mean(0) - x.mean(0)) for i in left}
        assert picked[t] == min(away, key=lambda i: away[i])
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    w, seen = unit.mean(0), []
    for _ in range(8):
        scores = unit @ w
        scores[seen] = -np.inf
        seen.append(int(np.argmax(scores)))
        w = w + unit.mean(0) - unit[seen[-1]]
    assert list(herding(unit, 8)) == seen
    assert sorted(herding(x, 30)) == list(range(30))


def test_herding_of_a_cluster_keeps_the_mean_better_than_chance():
    x = points(400, 8)
    away = [np.linalg.norm(x[herding(x, 20)].mean(0) - x.mean(0))]
    away += [np.linalg.norm(x[random_selection(x, 20, s)].mean(0) - x.mean(0)) for s in range(20)]
    assert away[0] < 0.2 * min(away[1:])


def test_k_center_starts_in_the_middle_goes_farthest_and_is_within_twice_the_best():
    x = points(12, 2)
    picked = list(k_center(x, 3))
    between = np.linalg.norm(x[:, None] - x[None], axis=-1)
    assert picked[0] == np.argmin(np.linalg.norm(x - x.mean(0), axis=1))
    for t in (1, 2):
        assert between[:, picked[:t]].min(1).max() == between[picked[t], picked[:t]].min()
    best = min(between[:, list(c)].min(1).max() for c in itertools.combinations(range(12), 3))
    assert between[:, picked].min(1).max() <= 2 * best
    assert sorted(k_center(np.zeros((4, 2)), 4)) == [0, 1, 2, 3]  # equal points: each once


def test_scores_are_picked_from_either_end():
    scores = [3.0, 1.0, 2.0, 3.0]
    assert list(by_score(scores, 3)) == [0, 3, 2]
    assert list(by_score(scores, 2, largest=False)) == [1, 2]


def test_el2n_is_the_mean_length_of_the_error():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(4, 2, 3)).astype(np.float32)  # four networks
    batch = {"inputs": jnp.asarray(points(5, 2), jnp.float32), "labels": jnp.arange(5) % 3}
    got = el2n_scores(lambda w, x: x @ w, jnp.asarray(weights), batch)
    z = np.asarray(batch["inputs"]) @ weights
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    want = np.linalg.norm(p - np.eye(3)[np.arange(5) % 3], axis=-1).mean(0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_meta_gradient_scores_after_one_step_are_products_of_gradients():
    """One step of rate r: dL(w1)/dw_i = -r <g_real(w1), g_i> / N. A wrong label scores least."""
    x = np.concatenate([points(8, 2) + 3, points(8, 2, 1) - 3])
    y = np.repeat([0, 1], 8)
    y[5] = 1
    loss = classification_loss(lambda w, x: x @ w)
    data = {"inputs": jnp.asarray(x, jnp.float32), "labels": jnp.asarray(y)}
    real = {"inputs": jnp.array([[3.0, 3], [-3, -3]]), "labels": jnp.array([0, 1])}
    start = jnp.zeros((2, 2))

    def trained(weights):
        return start - 0.1 * jax.grad(loss)(start, data | {"weights": weights})

    got = meta_gradient_scores(jax.jit(lambda weights: loss(trained(weights), real)), 16)
    one = np.array(
        [np.outer(a, [0.5 - (b == 0), 0.5 - (b == 1)]) for a, b in zip(x, y, strict=True)]
    )
    outer = jax.jit(lambda: jax.grad(loss)(trained(jnp.ones(16)), real))()
    want = 0.1 / 16 * np.einsum("nij,ij->n", one, np.asarray(outer))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert np.argmin(got) == 5 and got[5] < 0


@pytest.mark.parametrize("method", PICKS)
def test_selection_keeps_quotas_and_order_and_repeats_itself(method):
    x = points(60)
    x = x[:, 0] if method in ("hardest", "easiest") else x
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 10], 20))
    got = select(method, jnp.asarray(x, jnp.float32), labels, {10: 3, 0: 5, 1: 0}, 7)
    assert list(labels[got]) == [0] * 5 + [10] * 3 and len(set(got)) == 8
    again = select(method, x.astype(np.float32), jnp.asarray(labels), {10: 3, 0: 5}, 7)
    np.testing.assert_array_equal(got, again)


def test_random_selection_depends_on_the_seed_and_takes_every_example_as_often():
    labels = np.zeros(6, int)
    picks = [tuple(select("random", points(6), labels, {0: 2}, s)) for s in range(600)]
    assert len(set(picks)) == 30
    counts = np.bincount(np.ravel(picks), minlength=6)
    assert np.abs(counts - 200).max() < 5 * np.sqrt(600 * (1 / 3) * (2 / 3))


def test_a_group_is_picked_from_as_if_it_were_alone():
    x, labels = points(40), np.arange(40) % 2
    got = select("k-center", x, labels, quota_per_class(labels, 4))
    np.testing.assert_array_equal(got[:4], 2 * k_center(x[::2], 4))
    np.testing.assert_array_equal(got[4:], 2 * k_center(x[1::2], 4) + 1)


def test_quotas_keep_rare_slices_within_the_budget():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 3000)
    rare = (labels == 1) & (rng.random(3000) < 0.02)
    across = rng.random(3000) < 0.01
    slices = {"rare": rare, "across": across}
    assert rare.sum() > 8 and across.sum() > 8
    groups, quotas = quotas_with_slices(labels, slices, 20, 6)
    got = select("random", np.zeros((3000, 1)), groups, quotas, 0)
    assert list(np.bincount(labels[got])) == [20, 20, 20]
    assert list(labels[got]) == sorted(labels[got])
    assert rare[got].sum() >= 6 and across[got].sum() >= 6
    assert rare[got].sum() + across[got].sum() <= 14  # no more is taken from the rest than needed


def test_without_slices_the_quota_is_the_classes():
    labels = np.repeat([2, 5], 10)
    groups, quotas = quotas_with_slices(labels, {}, 4, 1)
    assert list(quotas.values()) == [4, 4] and len(set(groups[:10])) == 1


def test_slices_that_compete_for_one_place_are_both_kept():
    """Two classes of one place each: class 0 alone has a ``b``, so class 1 must give the ``a``."""
    labels = np.repeat([0, 1], 100)
    a, b = np.zeros(200, bool), np.zeros(200, bool)
    a[[0, 100]] = b[[1]] = True
    groups, quotas = quotas_with_slices(labels, {"a": a, "b": b}, 1, 1)
    got = select("random", np.zeros((200, 1)), groups, quotas)
    assert a[got].any() and b[got].any() and list(labels[got]) == [0, 1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: select("herding", points(4), [0, 0, 0, 1], {0: 2, 1: 2}),
            "class 1 has 1 examples and its quota is 2",
        ),
        (
            lambda: select("random", points(4), [0, 0, 0, 1], {0: 2, 1: 2}, names=["2", "7"]),
            "class '7' has 1 examples and its quota is 2",
        ),
        (
            lambda: quotas_with_slices([0, 1, 1], {}, 2, 1, ["cat", "dog"]),
            "class 'cat' has 1 examples",
        ),
        (lambda: select("best", points(4), [0] * 4, {0: 2}), "there is no selection 'best'"),
        (lambda: select("herding", points(4), [0] * 3, {0: 2}), "4 examples have 3 groups"),
        (
            lambda: quotas_with_slices([0, 0, 1, 1], {"rare": [True, False, False, False]}, 1, 2),
            "slice 'rare' has 1 examples and its quota is 2",
        ),
        (
            lambda: quotas_with_slices([0, 0, 1, 1], {"a": [True, True, False, False]}, 1, 2),
            "1 examples a class cannot hold 2 of each of the slices a:",
        ),
        (lambda: quotas_with_slices([0, 1, 1], {}, 2, 1), "class 0 has 1 examples"),
        (lambda: quotas_with_slices([0, 1], {"a": [True]}, 1, 1), r"slice 'a' has shape \[1\]"),
    ],
)
def test_what_cannot_be_selected_is_refused(call, says):
    with pytest.raises(UserError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
