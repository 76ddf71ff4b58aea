"""Learned ranges: gradients against numerical derivatives of the smoothed forward; training them.

The smoothed function is the quantizer with what makes it a staircase held still: each weight's
rounding residue, and whether it is clipped. Its slope is what straight-through training means.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.quant.fake_quant import fake_quant
from jaxdistill.quant.lattice import QuantSpec, dequantize, fixed_grid, quantize
from jaxdistill.quant.ranges import choose_grid

GROUP = 16


def weights(seed=0):
    return np.asarray(jax.random.normal(jax.random.key(seed), (32, 3)), np.float64)


def by_group(x):
    return x.reshape(2, GROUP, 3)


def numeric(f, x, h=1e-6):
    """Return the slope of a scalar function by each entry, in float64."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        out[i] = (f(x + step) - f(x - step)) / (2 * h)
    return out


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_gradient_is_the_slope_of_the_smoothed_quantizer(bits):
    spec = QuantSpec(bits=bits, group_size=GROUP, learned=True)
    w, weight = weights(), np.asarray(jax.random.normal(jax.random.key(1), (32, 3)), np.float64)
    # Scales that float16 holds, small enough to clip some weights at each end.
    scale = np.full((2, 1, 3), 2.0 ** (2 - bits) * 0.75) * np.array([1.0, 0.75, 1.25])
    v = by_group(w) / scale
    residue, place = np.rint(v) - v, np.clip(v, spec.qmin, spec.qmax)
    clipped = place != v

    def smoothed(s):
        value = np.where(clipped, place * s, by_group(w) + residue * s)
        return np.sum(value * by_group(weight))

    got = jax.grad(lambda s: jnp.sum(fake_quant(jnp.asarray(w, jnp.float32), (s,), spec) * weight))(
        jnp.asarray(scale[:, 0], jnp.float32)
    )
    want = numeric(smoothed, scale)[:, 0] / np.sqrt(GROUP * spec.qmax)
    assert clipped.any(axis=(0, 1)).all() and not clipped.all()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_learned_minimum_and_maximum_move_the_weights_they_clip_and_round():
    spec = QuantSpec(bits=4, group_size=GROUP, symmetric=False, learned=True)
    w, weight = weights(), np.asarray(jax.random.normal(jax.random.key(1), (32, 3)), np.float64)
    scale, zero = 0.125, 7.0
    low, high = np.full((2, 3), -zero * scale), np.full((2, 3), (15 - zero) * scale)
    v = w / scale
    residue, above, below = np.rint(v) - v, v + zero > 15, v + zero < 0
    assert above.any() and below.any()

    def spread(x):
        return np.repeat(x, GROUP, axis=0)

    def smoothed(lo, hi):
        inside = w + residue * (spread(hi) - spread(lo)) / 15
        return np.sum(np.where(above, spread(hi), np.where(below, spread(lo), inside)) * weight)

    got = jax.grad(lambda g: jnp.sum(fake_quant(jnp.asarray(w, jnp.float32), g, spec) * weight))(
        (jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32))
    )
    np.testing.assert_allclose(got[0], numeric(lambda x: smoothed(x, high), low), atol=1e-4)
    np.testing.assert_allclose(got[1], numeric(lambda x: smoothed(low, x), high), atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_gradient_is_one_inside_a_learned_range(symmetric):
    spec = QuantSpec(group_size=GROUP, symmetric=symmetric, learned=True)
    w = jnp.asarray(weights(), jnp.float32)
    grid = tuple(0.5 * part for part in choose_grid(w, spec))
    scale, *zero = (np.repeat(np.asarray(p, np.float32), GROUP, 0) for p in fixed_grid(grid, spec))
    place = np.asarray(w) / scale + (zero[0] if zero else 0)
    inside = (place >= spec.qmin) & (place <= spec.qmax)
    got = jax.grad(lambda x: jnp.sum(fake_quant(x, grid, spec)))(w)
    np.testing.assert_array_equal(got, inside.astype(np.float32))
    assert 0 < inside.mean() < 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_training_a_range_lessens_the_error_it_started_with(symmetric):
    spec = QuantSpec(ranges="absmax", symmetric=symmetric, learned=True)
    w = jax.random.normal(jax.random.key(5), (1024, 3))  # of so many, the largest is far out
    start = grid = choose_grid(w, spec)
    assert all(part.dtype == jnp.float32 for part in grid)

    def error(grid):
        return jnp.sum((fake_quant(w, grid, spec) - w) ** 2)

    step = jax.jit(lambda g: jax.tree.map(lambda x, d: x - 2e-3 * d, g, jax.grad(error)(g)))
    for _ in range(300):
        grid = step(grid)
    assert float(error(grid)) < 0.8 * float(error(start))
    stored = fixed_grid(grid, spec)
    assert all(part.dtype == jnp.float16 for part in stored)
    value = dequantize(quantize(w, grid, spec), stored)
    np.testing.assert_array_equal(value, fake_quant(w, grid, spec))


def test_a_learned_scale_below_zero_is_still_a_lattice():
    spec = QuantSpec(learned=True)
    w = jnp.asarray(weights(), jnp.float32)
    assert np.isfinite(fake_quant(w, (jnp.full((1, 3), -0.5),), spec)).all()
    assert (np.asarray(fixed_grid((jnp.full((1, 3), -0.5),), spec)[0]) > 0).all()
