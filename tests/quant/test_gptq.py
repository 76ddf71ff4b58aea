"""GPTQ against the paper's algorithm written naively, and what it is for: smaller output error."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.quant import gptq as gptq_module
from jaxdistill.quant.gptq import gptq
from jaxdistill.quant.lattice import QuantSpec, dequantize, quantize
from jaxdistill.quant.ranges import choose_grid

INPUTS, OUTPUTS = 80, 12  # more than one block, and not a multiple of its size


def naive(w, gram, grid, spec, damping=0.01, order=None):
    """Round input after input in float64, from a new inverse of what is left at every step.

    Equation 2 of the paper, for the next input q: ``w_F -= (w_q - quant(w_q)) / [H_F^-1]_qq *
    (H_F^-1)_:,q``, H_F being the rows and columns of the inputs not yet rounded, q included.
    """
    w, h = np.array(w, np.float64), np.array(gram, np.float64)
    scale, *zero = (
        np.repeat(np.asarray(part, np.float64), len(w) // len(part), axis=0) for part in grid
    )
    z = zero[0] if zero else np.zeros_like(w)
    h = h + damping * np.mean(np.diag(h)) * np.eye(len(h))
    integers, left = np.zeros(w.shape, int), list(range(len(w)) if order is None else order)
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        first = left[0]
        q = np.clip(np.rint(w[first] / scale[first]) + z[first], spec.qmin, spec.qmax)
        error = w[first] - (q - z[first]) * scale[first]
        integers[first] = q
        w[left] -= np.outer(inverse[:, 0] / inverse[0, 0], error)
        left = left[1:]
    return integers


@pytest.fixture(scope="module")
def problem():
    """A kernel and 300 rows of correlated inputs, a few of them much larger than the rest."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(300, INPUTS)) @ (rng.normal(size=(INPUTS, INPUTS)) / 6 + np.eye(INPUTS))
    x[:, [3, 40]] *= 8
    w = rng.normal(size=(INPUTS, OUTPUTS))
    w[0, 0] = 7.0
    return jnp.asarray(w, jnp.float32), x.astype(np.float32)


def integers_of(w_hat, grid, spec):
    """The stored integers, which must give the very values back."""
    q = quantize(w_hat, grid, spec)
    np.testing.assert_array_equal(dequantize(q, grid), w_hat)
    return np.asarray(q.astype(jnp.int32))


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "act_order"),
    [
        (4, None, True, False),
        (4, 16, True, True),
        (4, 16, False, False),
        (3, 8, False, True),
        (8, None, True, False),
    ],
)
def test_same_integers_as_the_naive_algorithm(problem, bits, group_size, symmetric, act_order):
    w, x = problem
    spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
    grid, gram = choose_grid(w, spec), x.T @ x
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else None
    got = gptq(w, jnp.asarray(gram), grid, spec, act_order=act_order)
    want = naive(w, gram, grid, spec, order=order)
    np.testing.assert_array_equal(integers_of(got, grid, spec), want)
    assert (want != np.asarray(quantize(w, grid, spec).astype(jnp.int32))).mean() > 0.05


@pytest.mark.parametrize("size", [7, 200])
def test_blocks_change_nothing(problem, size, monkeypatch):
    w, x = problem
    spec = QuantSpec(group_size=16)
    grid, gram = choose_grid(w, spec), jnp.asarray(x.T @ x)
    want = gptq(w, gram, grid, spec)
    monkeypatch.setattr(gptq_module, "_BLOCK", size)
    gptq_module._round.clear_cache()
    got = gptq(w, gram, grid, spec)
    gptq_module._round.clear_cache()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("bits", "group_size"), [(2, None), (4, None), (4, 16)])
def test_output_error_is_below_that_of_rounding_to_nearest(problem, bits, group_size):
    w, x = problem
    spec = QuantSpec(bits=bits, group_size=group_size)
    grid = choose_grid(w, spec)
    nearest = dequantize(quantize(w, grid, spec), grid)
    ours = gptq(w, jnp.asarray(x.T @ x), grid, spec)
    errors = [np.sum((x @ np.asarray(w_hat - w)) ** 2) for w_hat in (ours, nearest)]
    assert errors[0] < 0.8 * errors[1], errors
    # By the weights themselves nothing is nearer than the nearest: there is no free lunch.
    assert np.sum((ours - w) ** 2) > np.sum((nearest - w) ** 2)


def test_inputs_that_do_not_correlate_are_rounded_to_nearest(problem):
    w, _ = problem
    spec = QuantSpec(group_size=16)
    grid = choose_grid(w, spec)
    got = gptq(w, jnp.diag(jnp.linspace(1.0, 50.0, INPUTS)), grid, spec)
    np.testing.assert_array_equal(got, dequantize(quantize(w, grid, spec), grid))


def test_gram_may_have_any_unit(problem):
    w, x = problem
    spec = QuantSpec()
    grid, gram = choose_grid(w, spec), jnp.asarray(x.T @ x)
    want = gptq(w, gram, grid, spec)
    for factor in (2.0**-30, 2.0**20):
        np.testing.assert_array_equal(gptq(w, gram * factor, grid, spec), want)


def test_dead_inputs_get_zero_and_disturb_no_other(problem):
    w, x = problem
    dead = [0, 17, INPUTS - 1]
    alive = [i for i in range(INPUTS) if i not in dead]
    x = x.copy()
    x[:, dead] = 0
    spec = QuantSpec()
    grid = choose_grid(w, spec)
    got = np.asarray(gptq(w, jnp.asarray(x.T @ x), grid, spec))
    assert (got[dead] == 0).all()
    without = gptq(w[jnp.asarray(alive)], jnp.asarray(x[:, alive].T @ x[:, alive]), grid, spec)
    np.testing.assert_array_equal(got[alive], without)
    nothing = gptq(w, jnp.zeros((INPUTS, INPUTS)), grid, spec)
    np.testing.assert_array_equal(nothing, np.zeros_like(nothing))


def test_fewer_rows_than_inputs_are_made_up_for_by_damping(problem):
    w, x = problem
    spec = QuantSpec()
    grid = choose_grid(w, spec)
    gram = x[:9].T @ x[:9]
    got = gptq(w, jnp.asarray(gram), grid, spec)
    want = naive(w, gram, grid, spec)
    np.testing.assert_array_equal(integers_of(got, grid, spec), want)
    with pytest.raises(UserError) as e:
        gptq(w, jnp.asarray(gram), grid, spec, damping=-0.5, name="layers/mlp/up_proj/kernel")
    assert str(e.value) == (
        "the Gram matrix of layers/mlp/up_proj/kernel cannot be factored at damping -0.5; "
        "accepted: a positive one; give a larger one, such as 0.1, or more calibration text"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_named(problem, value):
    w, x = problem
    gram = jnp.asarray(x.T @ x).at[2, 3].set(value)
    with pytest.raises(UserError) as e:
        gptq(w, gram, choose_grid(w, QuantSpec()), QuantSpec(), name="layers/mlp/up_proj/kernel")
    assert str(e.value) == (
        "the calibration inputs of layers/mlp/up_proj/kernel are NaN, infinite or too large; give "
        "a sound checkpoint, or calibrate in float32"
    )
