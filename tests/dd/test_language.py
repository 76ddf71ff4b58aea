"""Data set distillation through a decoder: embeddings, soft labels, quantized students, scores."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill.dd.condense import init_condense, make_condense_step
from jaxdistill.dd.inner import inner_adam, inner_sgd
from jaxdistill.dd.language import (
    embedded_rows,
    objective_loss,
    row_scores,
    with_teacher_labels,
)
from jaxdistill.dd.meta_gradient import meta_gradient
from jaxdistill.dd.unroll import Unroll, make_unroll
from jaxdistill.kd.freeze import ov_freeze
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.decoder import make_apply
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params
from tests import tiny

CONFIG = tiny.config(vocab_size=24, hidden_size=32, num_layers=1, head_dim=8, intermediate_size=32)
APPLY = make_apply(CONFIG)
PARAMS = tiny.params(CONFIG, 1, spread=4.0)
TEACHER = tiny.params(CONFIG, 2, spread=6.0)
ROWS = tiny.batch(CONFIG, rows=3, seq_len=8)
REAL = tiny.batch(CONFIG, rows=4, seq_len=8, seed=1)
TABLE = PARAMS["embed_tokens"]["embedding"]


def test_embeddings_of_tokens_are_read_as_the_tokens():
    whole = APPLY(PARAMS, ROWS["tokens"], ROWS["positions"], ROWS["segment_ids"])
    read = APPLY(PARAMS, TABLE[ROWS["tokens"]], ROWS["positions"], ROWS["segment_ids"])
    np.testing.assert_array_equal(whole.hidden, read.hidden)
    ce = kd_objective(APPLY, None)
    total, count, _ = ce(PARAMS, None, ROWS)
    total_read, count_read, _ = ce(PARAMS, None, ROWS | {"embeddings": TABLE[ROWS["tokens"]]})
    assert float(total) == float(total_read) and float(count) == float(count_read)


def test_learned_soft_labels_are_a_teacher():
    live = kd_objective(APPLY, APPLY, "forward_kl", fused=False)
    given = kd_objective(APPLY, None, "forward_kl", fused=False)
    labelled = with_teacher_labels(embedded_rows(ROWS, TABLE), APPLY, TEACHER).batch()
    at_embeddings = ROWS | {"embeddings": TABLE[ROWS["tokens"]]}
    expected, count, _ = live(PARAMS, TEACHER, at_embeddings)
    found, found_count, metrics = given(PARAMS, None, labelled)
    assert float(found_count) == float(count)
    np.testing.assert_allclose(float(found), float(expected), rtol=1e-5)
    np.testing.assert_allclose(float(metrics["kl"][0]), float(expected), rtol=1e-5)


def quantized():
    policy = default_policy(QuantSpec(bits=4, group_size=16), tied=True, head_group_size=16)
    return make_apply(CONFIG, transform=fake_quant_params(policy)), add_scales(PARAMS, policy)


@pytest.mark.parametrize("student", ["float", "4 bits, Adam, ov-freeze"])
def test_the_meta_gradient_through_kd_and_quantization_is_the_slope(student):
    apply, params = (APPLY, PARAMS) if student == "float" else quantized()
    inner = objective_loss(kd_objective(apply, None, "0.5*forward_kl+0.5*ce", fused=False))
    outer = objective_loss(kd_objective(apply, APPLY, "jsd:beta=0.5", fused=False))
    tx, rate = inner_sgd(0.5), 0.05
    if "Adam" in student:  # whose epsilon a fixed scale, of float16, would round to 0
        tx, rate = ov_freeze(inner_adam()), 0.003
    train = make_unroll(inner, tx, Unroll(steps=3))
    start = embedded_rows(ROWS, TABLE, rate=rate)
    start = embedded_rows(
        ROWS,
        TABLE,
        teacher_logits=with_teacher_labels(start, APPLY, TEACHER).fixed["teacher_logits"],
        rate=rate,
        steps=3,
    )

    def value(learned):
        synthetic = start.replace(learned=learned)
        rates = jnp.exp(learned["log_rates"])
        trained = train(params, synthetic.batch(), rates, jax.random.key(0))
        return outer(trained, REAL | {"teacher": TEACHER})

    gradient = jax.jit(jax.grad(value))(start.learned)
    plain = make_unroll(inner, tx, Unroll(steps=3, mixed_mode=False, levels=0))

    def by_reverse(learned):
        batch = start.replace(learned=learned).batch()
        trained = plain(params, batch, jnp.exp(learned["log_rates"]), jax.random.key(0))
        return outer(trained, REAL | {"teacher": TEACHER})

    expected = jax.jit(jax.grad(by_reverse))(start.learned)
    for name in gradient:
        scale = np.abs(expected[name]).max()
        assert scale > 0
        np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-3, atol=1e-3 * scale)
    if student == "float":  # the lattice has steps, where differences see jumps
        run = jax.jit(value)
        for name, slope in gradient.items():
            way = slope / jnp.linalg.norm(slope)
            up, down = (
                float(run(start.learned | {name: start.learned[name] + e * way}))
                for e in (0.005, -0.005)
            )
            assert (up - down) / 0.01 == pytest.approx(float(jnp.linalg.norm(slope)), rel=0.05)


def test_condensed_rows_train_a_student_better_than_the_rows_they_began_as():
    inner = objective_loss(kd_objective(APPLY, None, "ce", fused=False))
    outer = objective_loss(kd_objective(APPLY, APPLY, "forward_kl", fused=False))
    method = meta_gradient(inner, outer, lambda key: PARAMS, tx=inner_sgd(), unroll=Unroll(steps=3))
    tx = optax.sgd(1.0)
    step = make_condense_step(method, tx)
    state = init_condense(embedded_rows(ROWS, TABLE, rate=0.1), tx)
    real, losses = REAL | {"teacher": TEACHER}, []
    for _ in range(12):
        state, metrics = step(state, real)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.97 * losses[0]
    assert "rate" in metrics and int(state.step) == 12


def test_the_score_of_a_row_is_what_more_of_it_would_save():
    inner = objective_loss(kd_objective(APPLY, None, "ce", fused=False))
    unroll = Unroll(steps=2)
    found = row_scores(inner, inner, tx=inner_sgd(), unroll=unroll, rate=0.1)(
        PARAMS, ROWS, REAL, jax.random.key(0)
    )
    # By hand: two steps of the weighted mean of tokens, each row weighed in turn.
    alone = kd_objective(APPLY, None, "ce", fused=False)

    @jax.jit
    def after(weights):
        params = PARAMS
        for _ in range(2):

            def mean(params):
                sums = [
                    alone(params, None, {k: x[i : i + 1] for k, x in ROWS.items()})[:2]
                    for i in range(3)
                ]
                total = sum(w * s[0] for w, s in zip(weights, sums, strict=True))
                return total / sum(w * s[1] for w, s in zip(weights, sums, strict=True))

            moves = jax.grad(mean)(params)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, moves)
        total, count, _ = alone(params, None, REAL)
        return total / count

    moved = [
        [1.0 + (0.02 * s if j == i else 0.0) for j in range(3)] for i in range(3) for s in (1, -1)
    ]
    values = [float(after([jnp.asarray(w) for w in weights])) for weights in moved]
    slopes = [-(values[2 * i] - values[2 * i + 1]) / 0.04 for i in range(3)]
    np.testing.assert_allclose(found, slopes, rtol=0.05, atol=2e-4)
