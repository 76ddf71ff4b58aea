"""ov-freeze: what is frozen, what the optimizer keeps, and what the step does not compute."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.errors import UserError
from jaxdistill.kd.freeze import (
    freeze,
    freeze_mask,
    freeze_phases,
    migrate,
    ov_freeze,
)
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.models.decoder import make_apply
from jaxdistill.paths import OV_PATTERN, WEIGHTS_PATTERN, walk
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params, snap
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
    with pytest.raises(UserError, match=r"'\(' is not a regular expression"):
        freeze(TX, "(")


def test_a_window_is_cut_into_phases():
    ov = [OV_PATTERN]
    assert freeze_phases(ov, 10) == [(0, 10, ov)]
    assert freeze_phases([], 10) == [(0, 10, [])]
    assert freeze_phases(ov, 10, 0, 4) == [(0, 4, ov), (4, 10, [])]
    assert freeze_phases(ov, 10, 3, 7) == [(0, 3, []), (3, 7, ov), (7, 10, [])]
    for start, stop in ((5, 3), (0, 11), (10, 0), (-1, 4)):
        with pytest.raises(UserError, match="accepted: 0 <= start < stop <= steps"):
            freeze_phases(ov, 10, start, stop)


def test_release_keeps_the_moments_and_counts_of_what_trained(setting):
    frozen, free = ov_freeze(TX), freeze(TX)
    state, _ = run(setting, frozen)
    before = dict(jax.tree_util.tree_leaves_with_path(state.opt_state))
    migrated = migrate(state.opt_state, free, state.params)
    fresh = jax.tree.structure(init_state(state.params, free).opt_state)
    assert jax.tree.structure(migrated) == fresh
    new = 0
    for place, leaf in jax.tree_util.tree_leaves_with_path(migrated):
        if place in before:
            np.testing.assert_array_equal(leaf, before[place])
        else:
            new += 1
            assert "v_proj" in str(place) or "o_proj" in str(place)
            np.testing.assert_array_equal(leaf, 0)
    assert new == 4  # two moments of two kernels
    # And back: what is frozen again loses its moments, the rest is untouched.
    back = migrate(migrated, frozen, state.params)
    assert jax.tree.structure(back) == jax.tree.structure(state.opt_state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state.opt_state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_released_kernels_train_on(setting):
    teacher, _, objective = setting
    state, _ = run(setting, ov_freeze(TX))
    before = np.asarray(state.params["layers"]["self_attn"]["v_proj"]["kernel"])
    tx = freeze(TX)
    state = state.replace(opt_state=migrate(state.opt_state, tx, state.params))
    state, _ = make_step(objective, tx)(state, teacher, tiny.batch(C, seed=9))
    assert (
        np.asarray(state.params["layers"]["self_attn"]["v_proj"]["kernel"]) != before
    ).mean() > 0.5
    assert int(state.step) == 5


@pytest.mark.parametrize("symmetric", [True, False])
def test_scale_only_training_moves_learned_ranges_alone(symmetric):
    policy = default_policy(QuantSpec(group_size=32, symmetric=symmetric, learned=True), tied=True)
    teacher = tiny.params(C)
    student = add_scales(teacher, policy)
    snapped = snap(student, policy, WEIGHTS_PATTERN)["layers"]  # no weight here has one value yet
    for (path, a), (_, b) in zip(walk(student["layers"]), walk(snapped), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    objective = kd_objective(make_apply(C, transform=fake_quant_params(policy)), make_apply(C))
    tx = freeze(adamw(3e-3, 30), [WEIGHTS_PATTERN])
    step, state = make_step(objective, tx), init_state(student, tx)
    losses = []
    for _ in range(30):
        state, metrics = step(state, teacher, tiny.batch(C))
        losses.append(float(metrics["kl"][0] / metrics["kl"][1]))
    before, after = dict(walk(student)), dict(walk(state.params))
    moved = {p for p in before if not np.array_equal(before[p], after[p])}
    parts = ("step",) if symmetric else ("min", "max")
    layers = [p for p in before if p.startswith("layers/") and p.endswith("/kernel")]
    assert moved == {f"{path}_{part}" for path in layers for part in parts}
    assert losses[-1] < 0.8 * losses[0]


def test_ov_freeze_holds_learned_ranges_of_frozen_kernels_too():
    policy = default_policy(QuantSpec(group_size=32, learned=True), tied=True)
    student = add_scales(tiny.params(C), policy)
    mask = dict(walk(freeze_mask(student, [OV_PATTERN])))
    assert {p for p, f in mask.items() if f} == {
        "embed_tokens/embedding_scale",  # the head's range is fixed
        *(f"layers/self_attn/{x}_proj/kernel{part}" for x in "vo" for part in ("", "_step")),
    }
    snapped = snap(student, policy, OV_PATTERN)
    value = fake_quant_params(policy)(student)["layers"]["self_attn"]["v_proj"]["kernel"]
    np.testing.assert_array_equal(snapped["layers"]["self_attn"]["v_proj"]["kernel"], value)
