"""ov-freeze: what is frozen, what the optimizer keeps, and what the step does not compute."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.errors import UserError
from jaxdistill.kd.freeze import OV_PATTERN, freeze, freeze_mask, ov_freeze
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.models.decoder import make_apply
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params, snap, walk
from tests import tiny

C = tiny.config()
POLICY = default_policy(QuantSpec(group_size=32), tied=True)
TX = adamw(1e-2, 20, weight_decay=0.1)


@pytest.fixture(scope="module")
def setting():
    teacher = tiny.params(C)
    student = snap(add_scales(teacher, POLICY), POLICY, OV_PATTERN)
    objective = kd_objective(make_apply(C, transform=fake_quant_params(POLICY)), make_apply(C))
    return teacher, student, objective


def run(setting, tx, steps=4):
    teacher, student, objective = setting
    step, state = make_step(objective, tx), init_state(student, tx)
    for i in range(steps):
        state, metrics = step(state, teacher, tiny.batch(C, seed=i))
    return state, metrics


def test_frozen_kernels_and_all_scales_are_bit_equal_after_training(setting):
    before = dict(walk(setting[1]))
    after = dict(walk(run(setting, ov_freeze(TX))[0].params))
    still = {p for p in before if np.asarray(before[p]).tobytes() == np.asarray(after[p]).tobytes()}
    frozen = {f"layers/self_attn/{x}_proj/kernel" for x in "vo"}
    assert still == frozen | {p for p in before if p.endswith("_scale")}


def test_without_freeze_the_same_kernels_move(setting):
    before = dict(walk(setting[1]))
    after = dict(walk(run(setting, freeze(TX))[0].params))
    for x in "vo":
        path = f"layers/self_attn/{x}_proj/kernel"
        assert not np.array_equal(before[path], after[path])
    assert all(np.array_equal(before[p], after[p]) for p in before if p.endswith("_scale"))


def test_optimizer_state_is_smaller_by_exactly_the_frozen_share(setting):
    def floats(tx):
        state = tx.init(setting[1])
        return sum(x.size for x in jax.tree.leaves(state) if x.dtype == jnp.float32)

    leaves = dict(walk(setting[1]))
    frozen = sum(leaves[f"layers/self_attn/{x}_proj/kernel"].size for x in "vo")
    assert floats(freeze(TX)) - floats(ov_freeze(TX)) == 2 * frozen
    trained = sum(x.size for p, x in leaves.items() if not p.endswith("_scale"))
    assert floats(freeze(TX)) == 2 * trained


def test_frozen_weight_gradients_are_not_computed(setting):
    """FLOPs of the compiled steps differ by two [in, out] products a layer and token (dW)."""
    teacher, student, objective = setting
    batch = tiny.batch(C)

    def flops(tx):
        # Straight-line layers, for XLA counts a scan's body once.
        step = make_step(
            kd_objective(
                make_apply(C, transform=fake_quant_params(POLICY), unroll=C.num_layers),
                make_apply(C, unroll=C.num_layers),
            ),
            tx,
        )
        return (
            step.lower(init_state(student, tx), teacher, batch).compile().cost_analysis()["flops"]
        )

    saved = flops(freeze(optax.sgd(1e-2))) - flops(ov_freeze(optax.sgd(1e-2)))
    tokens = batch["tokens"].size
    products = C.num_layers * tokens * 2 * (64 * 32 + 64 * 64)
    assert products <= saved < 1.25 * products


def test_same_result_as_zeroed_gradients(setting):
    """The partitioned step equals the textbook one: whole gradient, frozen updates set to zero."""
    teacher, student, objective = setting
    batch, tx = tiny.batch(C), ov_freeze(optax.sgd(1e-2))
    state, _ = make_step(objective, tx)(init_state(student, tx), teacher, batch)

    def mean_loss(p):
        total, count, _ = objective(p, teacher, batch)
        return total / count

    gradient = jax.grad(mean_loss)(student)
    mask = freeze_mask(student, [OV_PATTERN])
    want = jax.tree.map(lambda p, g, m: p if m else p - 1e-2 * g, student, gradient, mask)
    for (path, a), (_, b) in zip(walk(want), walk(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7, err_msg=path)


def test_any_regex_freezes(setting):
    before = dict(walk(setting[1]))
    after = dict(walk(run(setting, freeze(TX, ["mlp", "embed"]))[0].params))
    for path, value in before.items():
        held = "mlp" in path or "embed" in path or path.endswith("_scale")
        assert np.array_equal(value, after[path]) == held, path


def test_pattern_that_matches_nothing_is_named(setting):
    with pytest.raises(UserError) as e:
        freeze_mask(setting[1], ["vproj"])
    assert str(e.value).startswith("freeze pattern 'vproj' matches no parameter; paths look like ")
    with pytest.raises(UserError, match="is not a list of regular expressions"):
        freeze_mask(setting[1], ["("])
