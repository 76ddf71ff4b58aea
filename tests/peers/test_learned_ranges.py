"""Range gradients and activation quantization against torch, written with its own autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxdistill.quant.activations import ActivationSpec, fake_quant_activation
from jaxdistill.quant.fake_quant import fake_quant
from jaxdistill.quant.lattice import QuantSpec

GROUP = 16


def round_through(x):
    return (x.round() - x).detach() + x


def scale_gradient(x, factor):
    return (x - x * factor).detach() + x * factor


def weights(seed):
    return np.random.default_rng(seed).normal(size=(32, 6)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_equals_the_published_pseudocode_in_torch(bits):
    """LSQ's appendix: scale the step's gradient, divide, clamp, round straight through, multiply.

    ParetoQ trains 3 and 4 bits by the same formula, its sum over ``indicate_small`` (below),
    ``indicate_big`` (above) and ``indicate_middle``.
    """
    spec = QuantSpec(bits=bits, group_size=GROUP, learned=True)
    w, weight = weights(bits), weights(bits + 10)
    s = np.asarray([[0.5, 0.75, 1, 1.25, 1.5, 2]] * 2, np.float32) * 2.0 ** (2 - bits)

    tw = torch.tensor(w, requires_grad=True)
    ts = torch.tensor(s, requires_grad=True)
    step = scale_gradient(ts, 1 / (GROUP * spec.qmax) ** 0.5).repeat_interleave(GROUP, dim=0)
    value = round_through((tw / step).clamp(spec.qmin, spec.qmax)) * step
    (value * torch.tensor(weight)).sum().backward()

    def loss(w, s):
        return jnp.sum(fake_quant(w, (s,), spec) * weight)

    gw, gs = jax.grad(loss, argnums=(0, 1))(jnp.asarray(w), jnp.asarray(s))
    np.testing.assert_array_equal(
        fake_quant(jnp.asarray(w), (jnp.asarray(s),), spec), value.detach().numpy()
    )
    np.testing.assert_allclose(gw, tw.grad.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gs, ts.grad.numpy(), rtol=1e-4, atol=1e-5)

    # ParetoQ's published form of the same sum.
    v = np.repeat(s, GROUP, axis=0)
    v = w / v
    small, big = v < spec.qmin, v > spec.qmax
    terms = small * spec.qmin + big * spec.qmax + (~small & ~big) * (np.rint(v) - v)
    pareto = (terms * weight).reshape(2, GROUP, 6).sum(axis=1) / np.sqrt(GROUP * spec.qmax)
    np.testing.assert_allclose(gs, pareto, rtol=1e-4, atol=1e-5)


def test_learned_ends_equal_torch_where_the_zero_point_is_whole():
    """With minimum and maximum on the lattice, straight-through autograd gives the same sums."""
    spec = QuantSpec(bits=4, group_size=GROUP, symmetric=False, learned=True)
    w, weight = weights(0), weights(1)
    # torch clamps the rounded place, we the place: they differ where these do.
    place = w / 0.125 + 7
    w = np.where((place > 15) & (place < 15.5) | (place < 0) & (place > -0.5), 0, w)
    low = np.full((2, 6), -0.875, np.float32)
    high = np.full((2, 6), 1.0, np.float32)

    tw = torch.tensor(w, requires_grad=True)
    tl, th = (torch.tensor(x, requires_grad=True) for x in (low, high))
    wide_l, wide_h = (x.repeat_interleave(GROUP, dim=0) for x in (tl, th))
    scale = (wide_h - wide_l) / 15
    zero = round_through(-wide_l / scale)
    value = ((round_through(tw / scale) + zero).clamp(0, 15) - zero) * scale
    (value * torch.tensor(weight)).sum().backward()

    def loss(w, low, high):
        return jnp.sum(fake_quant(w, (low, high), spec) * weight)

    args = (jnp.asarray(w), jnp.asarray(low), jnp.asarray(high))
    found = jax.grad(loss, argnums=(0, 1, 2))(*args)
    np.testing.assert_allclose(found[0], tw.grad.numpy(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found[1:], (tl, th), strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 16])
def test_activations_equal_torchs_fake_quantization(bits):
    """At 16 bits the two products x * (1 / s) and x / s may round to neighbouring integers."""
    x, qmax = weights(3), 2 ** (bits - 1) - 1
    steps = 1.01 if bits == 16 else 0
    ours = fake_quant_activation(jnp.asarray(x), ActivationSpec(bits=bits, scale_per="tensor"))
    scale = float(np.abs(x).max()) / qmax
    theirs = torch.fake_quantize_per_tensor_affine(torch.tensor(x), scale, 0, -qmax, qmax)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=steps * scale + 1e-6)
    scales = np.abs(x).max(axis=1) / qmax
    zeros = torch.zeros(32, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(
        torch.tensor(x), torch.tensor(scales), zeros, 0, -qmax, qmax
    )
    ours = fake_quant_activation(jnp.asarray(x), ActivationSpec(bits=bits))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=steps * scales.max() + 1e-6)
