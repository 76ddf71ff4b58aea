"""The chunked head against the dense form: values, gradients, masks, ragged chunks, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.decoder import Output, make_apply
from tests import tiny

N_ROWS, SEQ, D, V = 3, 11, 24, 57


def dense_loss(params, teacher, batch, temperature, ce_weight):
    """The mean loss by hand, with whole logits, in plain jnp."""
    z_s = jnp.einsum("btd,vd->btv", params["h"], params["e"])[:, :-1]
    z_t = jnp.einsum("btd,vd->btv", teacher["h"], teacher["e"])[:, :-1]
    targets, mask = batch["tokens"][:, 1:], batch["loss_mask"][:, 1:]
    log_q = jax.nn.log_softmax(z_s / temperature)
    log_p = jax.nn.log_softmax(z_t / temperature)
    kl = temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(z_s), targets[..., None], -1)[..., 0]
    loss = (1 - ce_weight) * kl + ce_weight * nll
    return jnp.sum(jnp.where(mask, loss, jnp.zeros_like(loss)))


@pytest.fixture
def problem():
    keys = jax.random.split(jax.random.key(0), 4)
    student = {
        "h": jax.random.normal(keys[0], (N_ROWS, SEQ, D)),
        "e": jax.random.normal(keys[1], (V, D)),
    }
    teacher = {
        "h": jax.random.normal(keys[2], (N_ROWS, SEQ, D)),
        "e": jax.random.normal(keys[3], (V, D)),
    }
    rng = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, V, (N_ROWS, SEQ)), jnp.int32),
        "loss_mask": jnp.asarray(rng.random((N_ROWS, SEQ)) < 0.6),
    }
    return student, teacher, batch


def head(params, tokens, positions=None, segment_ids=None):
    """An ApplyFn whose hidden states are its parameters."""
    return Output(params["h"], params["e"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("chunk", [4, 11, 33, 1000])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.0, 0.3), (1.0, 1.0)])
def test_equals_dense_in_value_and_gradient(problem, fused, chunk, temperature, ce_weight):
    student, teacher, batch = problem
    terms = {f"forward_kl:temperature={temperature}": 1 - ce_weight, "ce": ce_weight}
    loss = "+".join(f"{weight}*{term}" for term, weight in terms.items() if weight)
    objective = kd_objective(head, head, loss, chunk=chunk, fused=fused)
    got, gradient = jax.jit(jax.value_and_grad(lambda p: objective(p, teacher, batch)[0]))(student)
    want, wanted = jax.value_and_grad(dense_loss)(student, teacher, batch, temperature, ce_weight)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for name in student:
        scale = float(jnp.abs(wanted[name]).max())
        np.testing.assert_allclose(gradient[name], wanted[name], rtol=1e-5, atol=1e-5 * scale)


def test_metrics_and_count_are_over_the_mask(problem):
    student, teacher, batch = problem
    _, count, metrics = kd_objective(head, head, chunk=5)(student, teacher, batch)
    mask = np.asarray(batch["loss_mask"])[:, 1:]
    assert float(count) == mask.sum()
    z_s = np.einsum("btd,vd->btv", student["h"], student["e"])[:, :-1]
    z_t = np.einsum("btd,vd->btv", teacher["h"], teacher["e"])[:, :-1]
    same = (z_s.argmax(-1) == z_t.argmax(-1))[mask].sum()
    assert float(metrics["agreement"][0]) == same
    # What is masked may hold anything.
    spoiled = dict(batch, tokens=jnp.where(batch["loss_mask"], batch["tokens"], 0))
    again = kd_objective(head, head, chunk=5)(student, teacher, spoiled)[2]
    np.testing.assert_allclose(metrics["nll"][0], again["nll"][0], rtol=1e-6)


def test_equal_models_have_no_divergence_and_no_gradient(problem):
    student, _, batch = problem
    objective = kd_objective(head, head, chunk=7)
    value, gradient = jax.value_and_grad(lambda p: objective(p, student, batch)[0])(student)
    assert abs(float(value)) < 1e-4
    assert max(float(jnp.abs(g).max()) for g in gradient.values()) < 1e-4


def test_unfused_form_differentiates_twice(problem):
    student, teacher, batch = problem
    objective = kd_objective(head, head, chunk=7, fused=False)

    def second(loss):
        return jax.jvp(jax.grad(loss), (student,), (student,))[1]

    got = second(lambda p: objective(p, teacher, batch)[0])
    want = second(lambda p: dense_loss(p, teacher, batch, 1.0, 0.0))
    for name in got:
        scale = float(jnp.abs(want[name]).max())
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5 * scale)


def test_bfloat16_hidden_states_are_close(problem):
    student, teacher, batch = problem
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (student, teacher))
    objective = kd_objective(head, head, chunk=8)
    value, gradient = jax.value_and_grad(lambda p: objective(p, low[1], batch)[0])(low[0])
    want = dense_loss(student, teacher, batch, 1.0, 0.0)
    np.testing.assert_allclose(float(value), float(want), rtol=0.02)
    assert gradient["e"].dtype == jnp.bfloat16


def test_no_array_of_all_logits_is_ever_made():
    """At a vocabulary of 8,192 the compiled gradient needs a fraction of one [B*T, V] block."""
    vocab, rows, seq, width = 8192, 4, 256, 32
    shapes = {
        "h": jax.ShapeDtypeStruct((rows, seq, width), jnp.float32),
        "e": jax.ShapeDtypeStruct((vocab, width), jnp.float32),
    }
    batch = {
        "tokens": jax.ShapeDtypeStruct((rows, seq), jnp.int32),
        "loss_mask": jax.ShapeDtypeStruct((rows, seq), jnp.bool_),
    }

    def compiled(chunk):
        objective = kd_objective(head, head, chunk=chunk)
        f = jax.jit(jax.grad(lambda p, t, b: objective(p, t, b)[0]))
        return f.lower(shapes, shapes, batch).compile()

    block = rows * seq * vocab * 4
    chunked, dense = compiled(64), compiled(rows * seq)
    assert f"f32[{rows * seq},{vocab}]" not in chunked.as_text()
    assert f"f32[{rows * seq},{vocab}]" in dense.as_text()
    assert chunked.memory_analysis().temp_size_in_bytes < block / 2
    assert dense.memory_analysis().temp_size_in_bytes > block


def test_objective_runs_on_a_model():
    c = tiny.config()
    apply, params = make_apply(c), tiny.params(c)
    loss, count, metrics = kd_objective(apply, apply)(params, params, tiny.batch(c))
    assert float(count) == int(tiny.batch(c)["loss_mask"].sum())
    assert abs(float(loss)) < 1e-3 and float(metrics["agreement"][0]) == float(count)
