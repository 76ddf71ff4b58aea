"""Logits of -inf, on one side and on both: values and slopes of every divergence, in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.kd.objective import kd_objective
from jaxdistill.losses.chunked import Head, chunked_sums
from jaxdistill.losses.cross_tokenizer import span_likelihood, uld
from jaxdistill.losses.loss import parse_loss
from jaxdistill.losses.registry import REGISTRY
from jaxdistill.losses.top_k import top_k_of
from jaxdistill.models.decoder import Output
from tests.divergence_formulas import (
    CASES,
    FORMULAS,
    NAMES,
    N,
    V,
    ours,
    slope,
    values_and_gradient,
    wanted,
)

TEACHERS = sorted(n for n in NAMES if REGISTRY[n].inputs == ("student_logits", "teacher_logits"))


def draw(seed, rows=N):
    """Logits of which some are -inf: in both models, in the teacher, or in the student."""
    rng = np.random.default_rng(seed)
    z, z_t = (2 * rng.normal(size=(2, rows, V))).astype(np.float32)
    state = rng.choice(4, size=(rows, V), p=[0.5, 0.3, 0.1, 0.1])
    state[:, rng.integers(V)] = 0  # one token that both can say
    if seed % 2 == 0:
        state[state > 1] = 1
    z[(state == 1) | (state == 2)] = -np.inf
    z_t[(state == 1) | (state == 3)] = -np.inf
    return z, z_t, rng.integers(0, V, rows).astype("i4")


@pytest.mark.parametrize(("name", "case", "temperature"), CASES)
def test_values_and_slopes_are_those_of_float64(name, case, temperature):
    f = values_and_gradient(name, case, temperature)
    finite_rows = 0
    for seed in range(6):
        z, z_t, y = draw(seed)
        values, gradient = f(*map(jnp.asarray, (z, z_t, y)))
        with np.errstate(all="ignore"):
            double = z.astype(float), z_t.astype(float), y
            want = wanted(name, case, temperature, *double)
            expected = slope(name, case, temperature, *double)
        assert not np.isnan(want).any()
        np.testing.assert_allclose(values, want, rtol=3e-5, atol=1e-6)
        finite = np.isfinite(want)
        finite_rows += finite.sum()
        expected = np.where(np.isneginf(z), 0, expected)
        np.testing.assert_allclose(gradient[finite], expected[finite], rtol=2e-4, atol=2e-5)
    assert finite_rows > 12


@pytest.mark.parametrize("name", NAMES)
def test_low_types_and_second_derivatives_have_no_nan(name):
    z, z_t, _ = draw(0)
    y = jnp.argmax(jnp.asarray(z), axis=-1).astype(jnp.int32)
    for dtype in (jnp.bfloat16, jnp.float16):
        low = jnp.asarray(z, dtype), jnp.asarray(z_t, dtype)
        values, gradient = values_and_gradient(name, 0, 1.0)(*low, y)
        assert gradient.dtype == dtype
        assert np.isfinite(values).all() and np.isfinite(gradient.astype(jnp.float32)).all()
    total = jax.grad(lambda x: jnp.sum(ours(name, 0, 1.0)(x, jnp.asarray(z_t), y)))
    tangent = jnp.ones(z.shape).at[:, 0].set(3.0)
    _, second = jax.jit(lambda x: jax.jvp(total, (x,), (tangent,)))(jnp.asarray(z))
    assert np.isfinite(second).all()


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("k", [2, 5, V + 2])
def test_top_k_and_tail_of_a_teacher_that_cannot_say_all(name, k):
    """Buckets by hand in float64, then the formula; k over the support leaves an empty tail."""
    z, z_t, y = draw(0)
    text = ",".join(f"{a}={v}" for a, v in FORMULAS[name][0][0].items())
    loss = parse_loss(f"{name}:{text}" if text else name)

    @jax.jit
    def both(z):
        def total(z):
            values = loss.rows(z, jnp.asarray(z_t), jnp.asarray(y), {}, top_k=k)
            return jnp.sum(values), values

        return jax.grad(total, has_aux=True)(z)

    gradient, values = both(jnp.asarray(z))
    order = np.asarray(top_k_of(jnp.asarray(z_t), k).indices)

    def buckets(logits):
        p = np.exp(logits.astype(float) - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        kept = np.take_along_axis(p, order, axis=-1)
        np.put_along_axis(p, order, 0, axis=-1)
        with np.errstate(divide="ignore"):
            return np.log(np.concatenate([kept, p.sum(-1, keepdims=True)], axis=-1))

    with np.errstate(all="ignore"):
        want = wanted(name, 0, 1.0, buckets(z), buckets(z_t), y)
    np.testing.assert_allclose(values, want, rtol=3e-5, atol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_chunked_equals_dense(name):
    """Tokens that are impossible row by row, as a mask over the logits of every chunk."""
    rng = np.random.default_rng(0)
    rows, width = 11, 6
    h, h_t = (jnp.asarray(rng.normal(size=(rows, width)), jnp.float32) for _ in range(2))
    e, e_t = (jnp.asarray(rng.normal(size=(V, width)), jnp.float32) for _ in range(2))
    z, z_t, y = draw(0, rows)
    y = np.argmax(z, -1).astype("i4")
    data = {
        "impossible": jnp.asarray(np.isneginf(z)),
        "targets": jnp.asarray(y),
        "mask": jnp.ones(rows, bool),
    }
    f = ours(name, 0, 1.0)

    def rows_fn(z, guides, row, shared):
        z, guide = (jnp.where(row["impossible"], -jnp.inf, x) for x in (z, *guides))
        values = f(z, guide, row["targets"])
        return {"loss": jnp.sum(jnp.where(row["mask"], values, 0.0))}

    def dense(h, e):
        return rows_fn(Head(h, e, 2.0).logits(), (Head(h_t, e_t, 2.0).logits(),), data, None)[
            "loss"
        ]

    def chunked(h, e, fused):
        heads = Head(h, e, 2.0), (Head(h_t, e_t, 2.0),)
        return chunked_sums(rows_fn, *heads, data, chunk=4, fused=fused)["loss"]

    forms = [dense, *(lambda h, e, fused=fused: chunked(h, e, fused) for fused in (True, False))]
    both = jax.jit(lambda h, e: [jax.value_and_grad(g, (0, 1))(h, e) for g in forms])
    (want, expected), *others = both(h, e)
    assert np.isfinite(want)
    for value, gradients in others:
        np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
        for got, right in zip(gradients, expected, strict=True):
            assert np.isfinite(right).all()
            np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)


def test_a_cached_row_that_does_not_count_may_hold_anything():
    rng = np.random.default_rng(0)
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32)
        for k, s in (("h", (1, 5, 4)), ("e", (V, 4)))
    }
    logits = rng.normal(size=(1, 5, V)).astype(np.float32)
    logits[0, 0, 3] = logits[0, 1, 2] = -np.inf
    batch = {
        "tokens": jnp.asarray([[1, 2, 3, 4, 5]], jnp.int32),
        "loss_mask": jnp.asarray([[1, 1, 1, 0, 1]], bool),
    }

    def apply(params, tokens, positions=None, segment_ids=None):
        return Output(params["h"], params["e"])

    def slopes(logits):
        batch["teacher_logits"] = jnp.asarray(logits)
        objective = kd_objective(apply, None, "forward_kl", chunk=2)
        return jax.value_and_grad(lambda p: objective(p, (), batch)[0])(params)

    want = slopes(logits)
    logits[0, 2] = -np.inf  # the place before a token that is no target
    logits[0, 4] = np.nan
    got = slopes(logits)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.isfinite(want[1]["e"]).all()


def test_divergences_across_vocabularies_know_impossible_tokens():
    z, z_t, _ = draw(1)
    p, q = (
        np.sort(np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(-1, keepdims=True))
        for x in (z_t, z)
    )
    np.testing.assert_allclose(
        uld(jnp.asarray(z), jnp.asarray(z_t)), abs(p - q).sum(-1), rtol=1e-5, atol=1e-6
    )
    log_q, log_p = jnp.asarray([-np.inf, -1.0, -np.inf]), jnp.asarray([-np.inf, -np.inf, -1.0])
    values, gradient = jax.vmap(
        jax.value_and_grad(lambda a, b: span_likelihood(a[None], b[None])[0])
    )(log_q, log_p)
    np.testing.assert_allclose(values, [0, -np.log(1 - np.exp(-1)), np.inf], rtol=1e-6)
    assert np.isfinite(gradient[:2]).all()
