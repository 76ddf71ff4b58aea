"""Kernel ridge regression: against numpy's least squares, and its gradient against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.dd.condense import init_condense, make_condense_step
from jaxdistill.dd.kernel import kernel_ridge, kernel_ridge_predict
from jaxdistill.dd.synthetic import Synthetic
from tests.dd.nets import CLASSES, data, init
from tests.dd.slopes import slopes_agree


def features(params, inputs):
    return jnp.tanh(inputs @ params["w1"] + params["b1"][None])


def lstsq(support, targets, queries, ridge):
    """Least squares on the examples and, for the ridge, one row of ``sqrt(r)`` for each feature."""
    r = ridge * np.trace(support @ support.T) / len(support)
    rows = np.concatenate([support, np.sqrt(r) * np.eye(support.shape[1])])
    wanted = np.concatenate([targets, np.zeros((support.shape[1], targets.shape[1]))])
    return queries @ np.linalg.lstsq(rows, wanted, rcond=None)[0]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=["few examples", "few features"])
def test_the_prediction_is_that_of_least_squares(shape):
    rng = np.random.default_rng(0)
    s, y, q = rng.normal(size=shape), rng.normal(size=(shape[0], 3)), rng.normal(size=(4, shape[1]))
    with jax.enable_x64(True):
        predict = jax.jit(kernel_ridge_predict, static_argnames="ridge")
        for ridge in (1e-6, 0.3):
            got = predict(*map(jnp.asarray, (s, y, q)), ridge=ridge)
            np.testing.assert_allclose(got, lstsq(s, y, q, ridge), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(60, 200), (200, 60)], ids=["few examples", "few features"])
def test_float32_holds_with_equal_examples_and_one_large_direction(shape):
    """All-positive features, every one there twice: the kernel is singular but for the ridge."""
    rng = np.random.default_rng(0)
    s = np.repeat(np.abs(rng.normal(size=(shape[0] // 2, shape[1]))) + 2, 2, axis=0)
    y, q = np.eye(2)[np.arange(shape[0]) // 2 % 2], s[::7] + 0.1
    got = jax.jit(kernel_ridge_predict)(*(jnp.asarray(x, jnp.float32) for x in (s, y, q)))
    np.testing.assert_allclose(got, lstsq(s, y, q, 1e-6), atol=2e-2)


@pytest.mark.parametrize("rows", [3, 6], ids=["few examples", "few features"])
def test_the_gradient_is_that_of_finite_differences(rows):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        params = {"w1": rng.normal(size=(4, 5)), "b1": rng.normal(size=5)}
        params = jax.tree.map(jnp.asarray, params)
        meta_loss = kernel_ridge(features, lambda key: params, num_classes=CLASSES, ridge=1e-2)
        learned = {
            "inputs": data(3, rows)["inputs"],
            "label_logits": jnp.asarray(rng.normal(size=(rows, CLASSES))),
        }

        def value(learned):
            return meta_loss(Synthetic(learned, {}), data(1, 9), jax.random.key(0))[0]

        gradient = slopes_agree(value, learned)
        assert min(np.abs(g).max() for g in gradient.values()) > 1e-3


def test_condensing_lowers_the_held_out_error():
    start = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    synthetic = Synthetic(
        {"inputs": jnp.asarray(start)}, {"labels": jnp.arange(3, dtype=jnp.int32)}
    )
    real, other = (data(seed, 90) for seed in (1, 2))
    meta_loss = kernel_ridge(features, lambda key: init(key, 40), num_classes=CLASSES)
    tx = optax.adam(0.1)
    step = make_condense_step(meta_loss, tx, networks=2)
    state = init_condense(synthetic, tx)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        for _ in range(60):
            state, metrics = step(state, real)

    def error(synthetic, seed):
        """The error on other data with a network that was not seen, all in numpy."""
        w1 = np.random.default_rng(seed).normal(size=(4, 40)) * 0.7
        support, queries = (np.tanh(np.asarray(x) @ w1) for x in (synthetic, other["inputs"]))
        predicted = lstsq(support, np.eye(3) - 1 / 3, queries, 1e-6)
        return np.mean(np.argmax(predicted, axis=1) != np.asarray(other["labels"]))

    after, before = (
        np.mean([error(s.learned["inputs"], seed) for seed in range(20)])
        for s in (state.synthetic, synthetic)
    )
    assert after < 0.25 < 0.4 < before
    assert metrics["accuracy"] > 0.75
