"""Bytes, clipped shares and flips, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.measure import clipped_share, flip_rate, weight_bytes
from jaxdistill.quant.policy import (
    Policy,
    add_scales,
    default_policy,
    fake_quant_params,
    quantize_params,
)
from tests import tiny

C = tiny.config()


def test_clipped_share_counts_integers_that_clipping_changes():
    policy = default_policy(QuantSpec(group_size=32), tied=True)
    scaled = add_scales(tiny.params(C), policy)
    found = clipped_share(scaled, policy)
    node = scaled["layers"]["mlp"]["up_proj"]
    v = np.asarray(node["kernel"]) / np.repeat(np.asarray(node["kernel_scale"], np.float32), 32, 1)
    want = ((np.rint(v) < -8) | (np.rint(v) > 7)).mean(axis=(1, 2))
    np.testing.assert_allclose(found["layers/mlp/up_proj/kernel"], want, atol=1e-7)
    assert want.min() > 0 and found["embed_tokens/embedding"].shape == ()


def test_a_weight_that_rounds_to_the_end_of_its_range_is_not_clipped():
    """7.4 and -8.4 steps are stored as 7 and -8; neither gets a gradient."""
    policy = Policy(rules=((r"kernel", QuantSpec()),))
    kernel = jnp.asarray([7.4, -8.4, 7.6, -8.6, 3.0, 7.0, -8.0, 0.2])[:, None]
    node = {"kernel": kernel, "kernel_scale": jnp.ones((1, 1), jnp.float16)}
    np.testing.assert_allclose(clipped_share({"up_proj": node}, policy)["up_proj/kernel"], 2 / 8)

    def total(kernel):
        return jnp.sum(
            fake_quant_params(policy)({"up_proj": node | {"kernel": kernel}})["up_proj"]["kernel"]
        )

    assert jax.grad(total)(kernel)[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]

    whole = QuantSpec(symmetric=False)
    policy = Policy(rules=((r"kernel", whole),))
    node["kernel_zero"] = jnp.full((1, 1), 8, jnp.float16)  # the range is -8 to 7 again
    np.testing.assert_allclose(clipped_share({"up_proj": node}, policy)["up_proj/kernel"], 2 / 8)


def test_flip_rate_counts_moved_integers():
    policy = Policy(rules=((r"up_proj/kernel", QuantSpec()), (r"down_proj", QuantSpec(bits=8))))
    scaled = add_scales(tiny.params(C), policy)
    before = quantize_params(scaled, policy)
    up = scaled["layers"]["mlp"]["up_proj"]
    step = up["kernel_scale"].astype(jnp.float32)[1, 0, 3]
    moved = up["kernel"].at[1, :5, 3].set(-up["kernel"][1, :5, 3] + 2 * step)
    up["kernel"] = moved
    found = flip_rate(before, quantize_params(scaled, policy))
    assert set(found) == {"layers/mlp/up_proj/kernel", "layers/mlp/down_proj/kernel"}
    a, b = (
        np.asarray(t["layers"]["mlp"]["up_proj"]["kernel_q"]).astype(int)
        for t in (before, quantize_params(scaled, policy))
    )
    assert 1 <= (a != b).sum() <= 5
    np.testing.assert_allclose(found["layers/mlp/up_proj/kernel"], [0, (a != b)[1].mean()])
    np.testing.assert_array_equal(found["layers/mlp/down_proj/kernel"], 0)


def test_bytes_of_an_asymmetric_three_bit_weight():
    policy = Policy(rules=((r"up_proj/kernel", QuantSpec(bits=3, symmetric=False, group_size=32)),))
    stored = quantize_params(add_scales(tiny.params(C), policy), policy)
    size, groups = 2 * 64 * 96, 2 * 2 * 96
    packed = size * 3 / 8 + groups * 2 + groups * 3 / 8
    everything = weight_bytes(tiny.params(C)) - 2 * size + packed
    assert weight_bytes(stored, policy) == int(everything)
