"""Weights as products read them: the values are the stored ones', few rows or many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.quant.held import held_product, held_rows, held_values, hold
from jaxdistill.quant.lattice import QuantSpec, dequantize, quantize
from jaxdistill.quant.ranges import choose_grid

SPECS = {
    f"{bits} bits, {'symmetric' if symmetric else 'asymmetric'}, {group or 'channel'}": QuantSpec(
        bits=bits, symmetric=symmetric, group_size=group, ranges="absmax"
    )
    for bits in (2, 4, 8)
    for symmetric in (True, False)
    for group in (None, 32)
}


def stored(spec, axis, shape=(96, 40)):
    w = jax.random.normal(jax.random.key(0), shape) + 0.3
    grid = choose_grid(w, spec, axis)
    return quantize(w, grid, spec, axis), grid


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("packed", [False, True])
def test_values_rows_and_products_are_those_of_the_stored_weight(name, packed):
    spec = SPECS[name]
    q, grid = stored(spec, -2)
    kernel = np.asarray(dequantize(q, grid, -2), np.float64)
    w = hold(q, *grid, axis=-2, packed=packed)
    assert w.q.nbytes == kernel.size // (2 if packed and spec.bits <= 4 else 1)
    np.testing.assert_array_equal(held_values(w), kernel.T)

    ids = jnp.asarray([3, 0, 3, 39, 20, 19])
    np.testing.assert_array_equal(held_rows(w, ids), kernel.T[np.asarray(ids)])
    for rows in (1, 2, 5):
        x = 1e3 * jax.random.normal(jax.random.key(rows), (rows, 96)) ** 3
        want = np.asarray(x, np.float64) @ kernel
        got = jax.jit(held_product)(x, w)
        size = np.abs(np.asarray(x)).max(1, keepdims=True) * np.abs(kernel).sum(0)
        np.testing.assert_array_less(np.abs(got - want), 2e-7 * size)


def test_an_odd_number_of_outputs_is_not_packed():
    q, grid = stored(QuantSpec(ranges="absmax"), -2, (96, 7))
    w = hold(q, *grid, axis=-2, packed=True)
    assert w.q.dtype == jnp.int8
    np.testing.assert_array_equal(held_values(w), np.asarray(dequantize(q, grid, -2)).T)


def test_a_row_of_zeros_gives_zeros_and_one_of_tiny_numbers_its_product():
    q, grid = stored(QuantSpec(ranges="absmax"), -2)
    w, kernel = hold(q, *grid, axis=-2, packed=False), dequantize(q, grid, -2)
    x = jnp.stack([jnp.zeros(96), 1e-30 * jnp.arange(96.0)])
    got = held_product(x, w)
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_allclose(got[1], x[1] @ kernel, rtol=1e-4, atol=1e-34)


def test_other_devices_multiply_by_floats():
    """On GPUs and TPUs XLA unpacks integers inside a product; lowered for one, none is split."""
    q, grid = stored(QuantSpec(ranges="absmax"), -2)
    w, x = hold(q, *grid, axis=-2, packed=False), jnp.ones((1, 96))
    lowered = {
        platform: jax.jit(held_product).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert "tensor<3x96xi8>" in lowered["cpu"]
    for platform in ("cuda", "tpu"):
        assert "tensor<3x96xi8>" not in lowered[platform]
        assert "tensor<1x96xf32>, tensor<40x96xf32>" in lowered[platform]


def test_a_table_is_held_as_it_is():
    spec = QuantSpec(bits=8, group_size=32, ranges="absmax")
    q, grid = stored(spec, -1, (10, 64))
    w = hold(q, *grid, axis=-1, packed=True)
    np.testing.assert_array_equal(held_values(w), dequantize(q, grid, -1))


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("group", [None, 32])
def test_no_float_copy_of_the_weight_is_made(rows, packed, group):
    """By integers nothing is, but packed ones a byte each; by floats a block at a time."""
    spec = QuantSpec(ranges="absmax", group_size=group)
    q, grid = stored(spec, -2, (512, 8192))
    w = hold(q, *grid, axis=-2, packed=packed)
    compiled = jax.jit(held_product).lower(jnp.ones((rows, 512)), w).compile()
    block = 0 if rows == 1 and group is None else 4 * 2**19
    unpacked = 512 * 8192 * packed * (block == 0)
    outputs = 8 * 4 * rows * 8192 + 4096
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert 0 < temporaries < 2 * block + unpacked + outputs < 4 * 512 * 8192 / 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("outputs", [4096, 2 * 2053])
def test_many_outputs_go_in_blocks_that_need_not_divide_them(outputs, asymmetric, packed):
    spec = QuantSpec(ranges="absmax", group_size=32, symmetric=not asymmetric)
    q, grid = stored(spec, -2, (512, outputs))
    w = hold(q, *grid, axis=-2, packed=packed)
    x = jax.random.normal(jax.random.key(1), (5, 512))
    assert "stablehlo.while" in jax.jit(held_product).lower(x, w).as_text()
    np.testing.assert_allclose(held_product(x, w), x @ held_values(w).T, rtol=1e-4, atol=1e-3)


def test_a_row_that_is_not_finite_spoils_itself_alone():
    q, grid = stored(QuantSpec(ranges="absmax"), -2, (64, 32))
    w = hold(q, *grid, axis=-2, packed=True)
    x = jnp.ones((5, 64)).at[0, 0].set(jnp.inf)
    np.testing.assert_allclose(held_product(x, w)[1:], (x @ held_values(w).T)[1:], rtol=1e-5)
