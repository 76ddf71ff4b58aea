"""Asymmetric lattices and percentile ranges against plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.quant.fake_quant import fake_quant
from jaxdistill.quant.lattice import QuantSpec, dequantize, quantize
from jaxdistill.quant.ranges import choose_grid

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16])
def test_asymmetric_values_agree_with_plain_numpy(bits, group):
    w = (RNG.normal(size=(64, 5)) + 0.7).astype(np.float32)
    spec = QuantSpec(bits=bits, group_size=group, ranges="absmax", symmetric=False)
    scale, zero = grid = choose_grid(jnp.asarray(w), spec)
    q = quantize(jnp.asarray(w), grid, spec)
    assert q.dtype == (jnp.uint4 if bits <= 4 else jnp.uint8)
    blocks = w.reshape(-1, group or 64, 5).astype(np.float64)
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    s = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(np.asarray(scale, np.float64), s, rtol=1e-3)
    s = np.asarray(scale, np.float64)
    z = np.clip(np.rint(-low / s), 0, 2**bits - 1)
    np.testing.assert_array_equal(np.asarray(zero, np.float64), z)
    s, z = s[:, None], z[:, None]
    want = (np.clip(np.rint(blocks / s) + z, 0, 2**bits - 1) - z) * s
    np.testing.assert_array_equal(np.asarray(dequantize(q, grid), np.float64), want.reshape(64, 5))
    np.testing.assert_array_equal(fake_quant(jnp.asarray(w), grid, spec), dequantize(q, grid))


@pytest.mark.parametrize("ranges", ["absmax", "mse", "percentile"])
def test_a_zero_point_pays_where_weights_are_not_centred(ranges):
    w = jnp.asarray(RNG.normal(size=(128, 16)) + 1.5, jnp.float32)

    def error(symmetric):
        spec = QuantSpec(ranges=ranges, symmetric=symmetric, group_size=32)
        grid = choose_grid(w, spec)
        return float(jnp.mean((dequantize(quantize(w, grid, spec), grid) - w) ** 2))

    assert error(False) < 0.7 * error(True)


def test_percentile_is_numpys_quantile():
    w = RNG.standard_t(3, size=(512, 4)).astype(np.float32)
    (scale,) = choose_grid(jnp.asarray(w), QuantSpec(ranges="percentile", percentile=99))
    want = np.quantile(np.abs(w), 0.99, axis=0) / 7
    np.testing.assert_allclose(np.asarray(scale, np.float32)[0], want, rtol=1e-3)
    spec = QuantSpec(ranges="percentile", percentile=99, symmetric=False)
    scale, zero = choose_grid(jnp.asarray(w), spec)
    low, high = np.quantile(w, [0.005, 0.995], axis=0)
    np.testing.assert_allclose(np.asarray(scale, np.float32)[0], (high - low) / 15, rtol=1e-3)
    share = np.mean(np.abs(w) > np.quantile(np.abs(w), 0.99, axis=0))
    assert 0.005 < share < 0.015


def test_asymmetric_search_is_never_worse_than_the_whole_range():
    w = jnp.asarray(RNG.standard_t(5, size=(3, 64, 8)), jnp.float32)
    errors = []
    for ranges in ("absmax", "mse"):
        spec = QuantSpec(group_size=32, ranges=ranges, symmetric=False, norm=2.0)
        grid = choose_grid(w, spec)
        off = (dequantize(quantize(w, grid, spec), grid) - w).reshape(3, 2, 32, 8)
        errors.append(np.asarray(jnp.sum(off**2, axis=2)))
    assert (errors[1] <= errors[0]).all() and (errors[1] < errors[0]).mean() > 0.5


@pytest.mark.parametrize("option", [{"norm": 0}, {"percentile": 50}, {"percentile": 100.5}])
def test_bad_ranges_say_what_is_accepted(option):
    with pytest.raises(UserError, match="accepted: 0 < norm <= 10, 50 < percentile <= 100"):
        QuantSpec(**option)
