"""Adapters: unchanged at first, alone in moving, and composed with quantization either way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.errors import UserError
from jaxdistill.kd.freeze import freeze, freeze_mask
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import init_state, make_step
from jaxdistill.models.decoder import make_apply
from jaxdistill.models.lora import LORA_FREEZE, add_lora, merge_lora
from jaxdistill.paths import walk
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import (
    add_scales,
    default_policy,
    dequantize_params,
    fake_quant_params,
    quantize_params,
)
from tests import tiny

C = tiny.config()
POLICY = default_policy(QuantSpec(ranges="absmax"), tied=True)
TEACHER = tiny.params(C)
KEY = jax.random.key(3)


def trained_b(params, seed=5):
    """Returns adapters whose B is not zero, as after training."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: (
            0.1 * jax.random.normal(jax.random.key(seed), x.shape)
            if keys[-1].key == "kernel_lora_b"
            else x
        ),
        params,
    )


def logits(params, transform=None):
    apply = make_apply(C, transform=transform)
    return np.asarray(jax.jit(apply)(params, tiny.batch(C)["tokens"]).logits())


def test_fresh_adapters_leave_the_model_unchanged():
    student = add_lora(TEACHER, 4, alpha=8, rng=KEY)
    jax.tree.map(np.testing.assert_array_equal, merge_lora(student), TEACHER)
    np.testing.assert_array_equal(logits(student, merge_lora), logits(TEACHER))


def test_merged_kernels_are_those_of_the_paper_and_alike_inside_the_scan():
    student = trained_b(add_lora(TEACHER, 4, alpha=8, pattern=r"/(q|down)_proj/kernel$", rng=KEY))
    merged = merge_lora(student)
    assert sorted(dict(walk(merged))) == sorted(dict(walk(TEACHER)))
    for (path, got), (_, base) in zip(walk(merged), walk(TEACHER), strict=True):
        want = np.array(base)
        if "q_proj" in path or "down_proj" in path:
            leaves = {k: np.asarray(v) for k, v in walk(student) if k.startswith(path)}
            for layer in range(C.num_layers):
                a, b = (leaves[f"{path}_lora_{x}"][layer] for x in "ab")
                want[layer] += 8 / 4 * a @ b
            assert np.abs(want - base).max() > 1e-2
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=0, err_msg=path)
    np.testing.assert_allclose(logits(student, merge_lora), logits(merged), atol=1e-5, rtol=0)


def test_training_moves_the_adapters_alone_and_lowers_the_loss():
    student = add_lora(TEACHER, 4, rng=KEY)
    other = tiny.params(C, seed=1)  # some other teacher, so that there is something to learn
    student["projections"] = {"hidden": {"kernel": jnp.eye(4)}}
    tx = freeze(optax.adam(1e-2), [LORA_FREEZE])
    free = {path for path, frozen in walk(freeze_mask(student, LORA_FREEZE)) if not frozen}
    adapters = {p for p, _ in walk(student) if p.endswith(("_lora_a", "_lora_b"))}
    assert free == adapters | {"projections/hidden/kernel"} and len(adapters) == 14
    del student["projections"]
    step = make_step(kd_objective(make_apply(C, transform=merge_lora), make_apply(C)), tx)
    state, losses = init_state(student, tx), []
    for _ in range(8):
        state, metrics = step(state, other, tiny.batch(C))
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < 0.9 * losses[0]
    for (path, before), (_, after) in zip(walk(student), walk(state.params), strict=True):
        assert np.array_equal(before, after) == (path not in adapters), path


def test_qlora_merges_float_adapters_into_the_lattice_values_of_the_base():
    student = trained_b(add_lora(add_scales(TEACHER, POLICY), 4, alpha=8, rng=KEY))
    fake = fake_quant_params(POLICY)

    def qlora(params):
        return merge_lora(fake(params))

    base = dict(walk(fake(add_scales(TEACHER, POLICY))))
    own = dict(walk(merge_lora(trained_b(add_lora(TEACHER, 4, alpha=8, rng=KEY)))))
    for path, got in walk(qlora(student)):
        want = base[path] + (own[path] - dict(walk(TEACHER))[path])
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=0, err_msg=path)
    # The frozen base may as well be stored: integers, grids, and adapters beside them.
    stored = quantize_params(student, POLICY)
    assert "kernel_q" in stored["layers"]["mlp"]["up_proj"]
    got = logits(stored, lambda params: merge_lora(dequantize_params(params)))
    np.testing.assert_allclose(got, logits(student, qlora), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="dequantize, then merge them"):
        merge_lora(stored)


def test_the_merged_kernel_is_fake_quantized_and_stored_like_any_other():
    student = trained_b(add_scales(add_lora(TEACHER, 4, rng=KEY), POLICY))
    merged = merge_lora(student)
    assert "kernel_scale" in merged["layers"]["mlp"]["up_proj"]
    fake = fake_quant_params(POLICY)
    stored = quantize_params(merged, POLICY)
    assert not any("lora" in path for path, _ in walk(stored))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7, rtol=0),
        dequantize_params(stored),
        fake(merged),
    )
    got = logits(student, lambda params: fake(merge_lora(params)))
    np.testing.assert_allclose(got, logits(fake(merged)), atol=1e-5, rtol=0)


def test_bad_adapters_are_named():
    for options in ({"rank": 0}, {"rank": 4, "alpha": -1}, {"rank": 4, "alpha": 1e9}):
        with pytest.raises(UserError, match=r"^LoRA of rank .* given; accepted: a rank of 1"):
            add_lora(TEACHER, rng=KEY, **options)
    with pytest.raises(UserError, match=r"accepted: at most 32 for layers/self_attn/k_proj"):
        add_lora(TEACHER, 33, rng=KEY)
    with pytest.raises(UserError, match="matches no float kernel"):
        add_lora(TEACHER, 4, pattern="nothing", rng=KEY)
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(add_lora(TEACHER, 4, rng=KEY), 4, rng=KEY)
    stored = quantize_params(add_scales(TEACHER, POLICY), POLICY)
    with pytest.raises(UserError, match="dequantize stored weights first"):
        add_lora(stored, 4, rng=KEY)
    assert freeze_mask(TEACHER, [LORA_FREEZE])["norm"]["weight"]
