"""Fake quantization: exact forward, straight-through derivative, under every JAX transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.quant.fake_quant import fake_quant
from jaxdistill.quant.lattice import QuantSpec, dequantize, quantize
from jaxdistill.quant.ranges import choose_grid

SPEC = QuantSpec(group_size=16)


@pytest.fixture
def weight():
    w = jax.random.normal(jax.random.key(3), (64, 8)).at[0, 0].set(20.0).at[17, 1].set(-20.0)
    # A clipped range: some weights lie outside of it.
    return w, (choose_grid(w, SPEC)[0] * jnp.float16(0.5),)


def test_forward_is_exactly_the_stored_value(weight):
    w, grid = weight
    stored = dequantize(quantize(w, grid, SPEC), grid)
    np.testing.assert_array_equal(fake_quant(w, grid, SPEC), stored)
    np.testing.assert_array_equal(jax.jit(fake_quant, static_argnums=2)(w, grid, SPEC), stored)


def test_gradient_is_one_inside_and_zero_where_clipped(weight):
    w, grid = weight
    got = jax.grad(lambda x: jnp.sum(fake_quant(x, grid, SPEC)))(w)
    v = np.asarray(w) / np.repeat(np.asarray(grid[0], np.float32), 16, axis=0)
    np.testing.assert_array_equal(got, ((v >= -8) & (v <= 7)).astype(np.float32))
    assert 0 < float(jnp.mean(got)) < 1


def test_fixed_scale_gets_no_gradient(weight):
    w, grid = weight
    (got,) = jax.grad(lambda g: jnp.sum(fake_quant(w, g, SPEC)))(grid)
    np.testing.assert_array_equal(got, np.zeros_like(grid[0]))


def test_same_under_jvp_second_order_scan_remat_and_vmap(weight):
    w, grid = weight

    def loss(x):
        return jnp.sum(fake_quant(x, grid, SPEC) ** 3)

    gradient = jax.grad(loss)(w)
    inside = jax.grad(lambda x: jnp.sum(fake_quant(x, grid, SPEC)))(w)
    value = fake_quant(w, grid, SPEC)
    np.testing.assert_allclose(gradient, 3 * value**2 * inside, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(loss))(w), gradient, rtol=1e-6)
    direction = jnp.ones_like(w)
    np.testing.assert_allclose(jax.jvp(loss, (w,), (direction,))[1], jnp.sum(gradient), rtol=1e-5)
    # Forward over reverse and reverse over reverse: d/dw of 3 v^2 is 6 v inside the range.
    forward = jax.jvp(jax.grad(loss), (w,), (direction,))[1]
    reverse = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x)))(w)
    np.testing.assert_allclose(forward, 6 * value * inside, rtol=1e-6)
    np.testing.assert_allclose(reverse, forward, rtol=1e-6)

    # The same of weights that a scan goes over, as the layers of a decoder are.
    def layers(x):
        return jax.lax.scan(lambda s, y: (s + loss(y), None), jnp.zeros(()), x[None])[0]

    again = jax.jvp(jax.grad(layers), (w,), (direction,))[1]
    np.testing.assert_allclose(again, 6 * value * inside, rtol=1e-6)
    again = jax.grad(lambda x: jnp.sum(jax.grad(layers)(x)))(w)
    np.testing.assert_allclose(again, 6 * value * inside, rtol=1e-6)
    stacked = jnp.stack([w, 2 * w])
    many = jax.vmap(lambda x: fake_quant(x, grid, SPEC))(stacked)
    scanned = jax.lax.scan(lambda _, x: (None, fake_quant(x, grid, SPEC)), None, stacked)[1]
    np.testing.assert_array_equal(many[0], value)
    np.testing.assert_array_equal(scanned, many)
