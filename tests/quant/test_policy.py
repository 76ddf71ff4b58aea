"""The policy over a tree: what it selects, what it writes, and what the transforms agree on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.models.decoder import make_apply
from jaxdistill.paths import OV_PATTERN, walk
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.measure import weight_bytes
from jaxdistill.quant.policy import (
    Policy,
    add_scales,
    default_policy,
    dequantize_params,
    fake_quant_params,
    quantize_params,
    snap,
)
from tests import tiny

SPEC = QuantSpec(group_size=32)


@pytest.mark.parametrize("tied", [True, False])
def test_default_policy_quantizes_kernels_and_head_but_no_norm(tied):
    c = tiny.config(tie_embeddings=tied)
    scaled = add_scales(tiny.params(c), default_policy(SPEC, tied=tied))
    scales = {path for path, _ in walk(scaled) if path.endswith("_scale")}
    kernels = {f"layers/self_attn/{x}_proj/kernel_scale" for x in "qkvo"} | {
        f"layers/mlp/{x}_proj/kernel_scale" for x in ("gate", "up", "down")
    }
    head = "embed_tokens/embedding_scale" if tied else "lm_head/kernel_scale"
    assert scales == kernels | {head}
    stored = dict(walk(quantize_params(scaled, default_policy(SPEC, tied=tied))))
    assert stored["layers/mlp/up_proj/kernel_q"].dtype == jnp.int4
    assert stored[head.replace("_scale", "_q")].dtype == jnp.int8
    assert stored["norm/weight"].dtype == jnp.float32


def test_three_forwards_are_one(tied_model):
    """Whole-tree fake quantization, the same in the scan, and the stored integers: bit-equal."""
    c, scaled, policy = tied_model
    tokens = tiny.batch(c)["tokens"]
    whole = jax.jit(make_apply(c))(jax.jit(fake_quant_params(policy))(scaled), tokens)
    inside = jax.jit(make_apply(c, transform=fake_quant_params(policy)))(scaled, tokens)
    stored = jax.jit(make_apply(c, transform=dequantize_params))(
        quantize_params(scaled, policy), tokens
    )
    np.testing.assert_array_equal(whole.hidden, inside.hidden)
    np.testing.assert_array_equal(inside.hidden, stored.hidden)
    np.testing.assert_array_equal(inside.head, stored.head)
    plain = jax.jit(make_apply(c))(scaled, tokens)
    assert float(jnp.abs(plain.hidden - inside.hidden).max()) > 1e-3


@pytest.fixture
def tied_model():
    c = tiny.config()
    policy = default_policy(SPEC, tied=True)
    return c, add_scales(tiny.params(c), policy), policy


def test_snap_moves_the_matched_and_only_them(tied_model):
    _, scaled, policy = tied_model
    snapped = snap(scaled, policy, OV_PATTERN)
    before, after = dict(walk(scaled)), dict(walk(snapped))
    lattice = dict(walk(fake_quant_params(policy)(scaled)))
    assert before.keys() == after.keys()
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {f"layers/self_attn/{x}_proj/kernel" for x in "vo"}
    for path in moved:
        np.testing.assert_array_equal(after[path], lattice[path])


def test_first_rule_that_matches_decides(tied_model):
    c, *_ = tied_model
    eight = QuantSpec(bits=8)
    policy = Policy(rules=(("down_proj", eight), ("layers/0", None), (r"mlp/.*kernel", SPEC)))
    stored = dict(walk(quantize_params(add_scales(tiny.params(c), policy), policy)))
    assert stored["layers/mlp/down_proj/kernel_q"].dtype == jnp.int8
    assert stored["layers/mlp/up_proj/kernel_q"].dtype == jnp.int4
    assert "layers/self_attn/q_proj/kernel" in stored and "embed_tokens/embedding" in stored


def test_bytes_are_counted_by_hand(tied_model):
    c, scaled, policy = tied_model
    d, f, kv = 64, 96, 32
    kernels = 2 * (2 * d * d + 2 * d * kv + 3 * d * f)
    scales = 2 * (2 * 2 * d + 2 * 2 * kv + 2 * 2 * f + 3 * d) * 2
    table = c.vocab_size * d + c.vocab_size * 2 * 2
    norms = (2 * 2 * d + d) * 2
    want = kernels // 2 + scales + table + norms
    assert weight_bytes(quantize_params(scaled, policy)) == want
    assert weight_bytes(tiny.params(c)) == 2 * (kernels + c.vocab_size * d) + norms


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            np.nan,
            "layers/mlp/up_proj/kernel holds NaN or infinite weights; give a sound checkpoint",
        ),
        (
            1e7,
            "layers/mlp/up_proj/kernel needs a scale beyond float16; leave it in float by the "
            "policy",
        ),
    ],
)
def test_unsound_weights_are_named(value, message):
    c = tiny.config()
    bad = tiny.params(c)
    node = bad["layers"]["mlp"]["up_proj"]
    node["kernel"] = node["kernel"].at[1, 2, 3].set(value)
    with pytest.raises(UserError) as e:
        add_scales(bad, default_policy(SPEC, tied=True))
    assert str(e.value) == message


def test_bad_regex_is_named():
    with pytest.raises(UserError, match=r"^'\(' is not a regular expression: "):
        Policy(rules=(("(", SPEC),))
