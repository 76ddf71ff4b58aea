"""Activation fake quantization: values by plain NumPy, the model's use of it, its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.models.decoder import make_apply
from jaxdistill.quant.activations import ActivationSpec, fake_quant_activation
from jaxdistill.quant.policy import Policy, fake_quant_activations
from tests import tiny


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("scale_per", ["token", "tensor"])
def test_values_agree_with_plain_numpy(bits, scale_per):
    x = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    x[2] = 0
    largest = np.abs(x).max(axis=-1, keepdims=True) if scale_per == "token" else np.abs(x).max()
    scale = np.where(largest > 0, largest, 1) / np.float32(2 ** (bits - 1) - 1)
    got = fake_quant_activation(jnp.asarray(x), ActivationSpec(bits=bits, scale_per=scale_per))
    np.testing.assert_allclose(got, np.rint(x / scale) * scale, rtol=1e-6, atol=0)
    assert (
        len(np.unique(np.rint(np.asarray(got[0]) / scale[0 if scale_per == "token" else ()]))) > 9
    )


def test_gradient_is_straight_through_and_the_type_is_kept():
    x = jax.random.normal(jax.random.key(0), (4, 8), jnp.bfloat16)
    got = jax.grad(lambda x: jnp.sum(fake_quant_activation(x, ActivationSpec()) * 3))(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), 3)


def test_the_policy_chooses_which_layers_see_quantized_rows():
    c = tiny.config()
    params, tokens = tiny.params(c), tiny.batch(c)["tokens"]
    rules = ((r"mlp/down_proj", None), (r"mlp", ActivationSpec(bits=8)))
    seen = []

    def record(path, rows):
        changed = fake_quant_activations(rules)(path, rows)
        seen.append((path, changed is rows))
        return changed

    out = make_apply(c, activation=record)(params, tokens)
    assert dict(seen) == {
        **{f"layers/self_attn/{x}_proj": True for x in "qkvo"},
        "layers/mlp/gate_proj": False,
        "layers/mlp/up_proj": False,
        "layers/mlp/down_proj": True,
    }
    plain = make_apply(c)(params, tokens)
    coarse = float(jnp.abs(out.hidden - plain.hidden).max())
    fine = make_apply(c, activation=fake_quant_activations(((r"mlp", ActivationSpec(bits=16)),)))(
        params, tokens
    )
    assert 0 < float(jnp.abs(fine.hidden - plain.hidden).max()) < 0.1 * coarse


def test_bad_specs_and_patterns_say_what_is_accepted():
    with pytest.raises(UserError, match="accepted: 8 or 16 bits, per token or per tensor"):
        ActivationSpec(bits=4)
    with pytest.raises(UserError, match="is not a regular expression"):
        Policy(rules=(), activations=(("(", ActivationSpec()),))
