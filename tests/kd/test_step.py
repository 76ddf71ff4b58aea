"""The step: it learns, donates, sums micro-batches to one update, and its schedule holds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.kd.freeze import freeze, ov_freeze
from jaxdistill.kd.objective import kd_objective, next_token_targets
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.models.decoder import make_apply
from jaxdistill.paths import walk
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params
from tests import tiny
from tests.errors import error_of

C = tiny.config()
POLICY = default_policy(QuantSpec(), tied=True)


@pytest.fixture(scope="module")
def setting():
    teacher = tiny.params(C)
    objective = kd_objective(make_apply(C, transform=fake_quant_params(POLICY)), make_apply(C))
    return teacher, add_scales(teacher, POLICY), objective


def test_distillation_brings_the_student_closer(setting):
    teacher, student, objective = setting
    tx = ov_freeze(adamw(3e-3, 60))
    step, state = make_step(objective, tx), init_state(student, tx)
    divergences = []
    for _ in range(60):
        state, metrics = step(state, teacher, tiny.batch(C, rows=8))
        divergences.append(float(metrics["kl"][0] / metrics["kl"][1]))
    assert int(state.step) == 60
    assert np.mean(divergences[-4:]) < 0.5 * np.mean(divergences[:4])


def test_accumulation_is_the_same_mean_over_tokens(setting):
    """Micro-batches with unequal numbers of targets, or none, update as the whole batch does."""
    teacher, student, objective = setting
    batch = tiny.batch(C, rows=4)
    batch["loss_mask"] = batch["loss_mask"].at[:2, 5:].set(False).at[0].set(False)
    states, metrics = zip(
        *(
            make_step(objective, tx, accumulate=n)(init_state(student, tx), teacher, batch)
            for n in (1, 2, 4)
            for tx in [ov_freeze(optax.sgd(0.1))]
        ),
        strict=True,
    )
    for other, m in zip(states[1:], metrics[1:], strict=True):
        assert float(m["loss"][1]) == float(metrics[0]["loss"][1])
        np.testing.assert_allclose(m["loss"][0], metrics[0]["loss"][0], rtol=1e-5)
        before = dict(walk(student))
        for (path, a), (_, b) in zip(walk(states[0].params), walk(other.params), strict=True):
            if a.dtype == before[path].dtype == np.float32:
                # Sums in another order: equal to a ten-thousandth of the leaf's largest update.
                moved = float(np.abs(a - before[path]).max())
                np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-4 * moved, err_msg=path)


def test_micro_batches_must_divide_the_batch(setting):
    teacher, student, objective = setting
    tx = optax.sgd(0.1)
    step = make_step(objective, tx, accumulate=3)
    message = error_of(step, init_state(student, tx), teacher, tiny.batch(C, rows=8))
    assert "accumulate=3" in message and "8 rows" in message
    assert "accumulate is 0" in error_of(make_step, objective, tx, accumulate=0)


def test_targets_do_not_cross_segments_and_need_no_loss_mask():
    batch = {
        "tokens": jnp.arange(8).reshape(1, 8),
        "segment_ids": jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]]),
    }
    targets, mask = next_token_targets(batch)
    predicted = {(i, int(targets[i])) for i in range(8) if mask[i]}
    assert predicted == {(0, 1), (1, 2), (3, 4)}
    # A mask can only take targets away.
    masked = next_token_targets(batch | {"loss_mask": jnp.ones((1, 8), bool).at[0, 1].set(False)})
    assert np.flatnonzero(masked[1]).tolist() == [1, 3]
    only = next_token_targets({"tokens": batch["tokens"].reshape(2, 4)})[1]
    assert only.reshape(2, 4).tolist() == [[True, True, True, False]] * 2


def test_an_objective_without_a_loss_mask_counts_within_segments(setting):
    teacher, student, objective = setting
    batch = tiny.batch(C, rows=2, seq_len=16)  # segments of 8 and 6 tokens, 2 of padding
    marked = objective(student, teacher, batch)
    del batch["loss_mask"]
    found = objective(student, teacher, batch)
    assert float(found[1]) == float(marked[1]) == 2 * (7 + 5)
    np.testing.assert_allclose(found[0], marked[0], rtol=1e-6)


def test_state_is_donated_and_the_teacher_is_not(setting):
    teacher, student, objective = setting
    tx = ov_freeze(optax.sgd(0.1))
    state = init_state(student, tx)
    make_step(objective, tx)(state, teacher, tiny.batch(C))
    assert state.params["norm"]["weight"].is_deleted()
    assert not teacher["norm"]["weight"].is_deleted()
    assert not student["norm"]["weight"].is_deleted()


def test_remat_and_unroll_do_not_change_the_update(setting):
    teacher, student, _ = setting
    tx = ov_freeze(optax.sgd(0.1))
    found = []
    for options in ({}, {"remat": "full"}, {"remat": "minimal"}, {"unroll": 2}):
        apply = make_apply(C, transform=fake_quant_params(POLICY), **options)
        step = make_step(kd_objective(apply, make_apply(C)), tx)
        found.append(step(init_state(student, tx), teacher, tiny.batch(C))[0].params)
    for other in found[1:]:
        for (path, a), (_, b) in zip(walk(found[0]), walk(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=path)


def test_adamw_warms_up_decays_clips_and_spares_vectors():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "n": {"weight": jnp.ones(2)}}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = adamw(1e-2, 100, warmup=0.1, final=0.1, weight_decay=0.5)
    with jax.numpy_dtype_promotion("standard"):
        state, rates = tx.init(params), []
        for _ in range(100):
            updates, state = tx.update(zero, state, params)
            # Without a gradient the update is the decay alone: -rate * 0.5 * 1.
            rates.append(-2 * float(updates["a"]["kernel"][0, 0]))
            assert float(jnp.abs(updates["n"]["weight"]).max()) == 0
    assert rates[0] == pytest.approx(1e-3, rel=1e-4)
    assert max(rates) == pytest.approx(1e-2, rel=1e-4) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(1e-3, rel=0.05)
    assert all(a <= b for a, b in zip(rates[:10], rates[1:11], strict=True))


def test_a_weighted_mean_does_not_depend_on_the_size_of_the_weights():
    """Weights may add up to less than one."""
    apply, params, batch = make_apply(C), tiny.params(C), tiny.batch(C)
    tx = freeze(optax.sgd(1.0))
    step = make_step(kd_objective(apply, None), tx)
    norms = [
        float(step(init_state(params, tx), None, batch | {"weights": w})[1]["grad_norm"][0])
        for w in (jnp.full((4, 16), 1e-4), jnp.ones((4, 16)))
    ]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)
