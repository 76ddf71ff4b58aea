"""A teacher by its k likeliest tokens and a tail bucket: by hand, bounds, what the tail is for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.losses.loss import parse_loss
from jaxdistill.losses.registry import REGISTRY
from jaxdistill.losses.top_k import TopK, top_k_of, with_tail

P = np.array([[0.05, 0.4, 0.1, 0.3, 0.15], [0.2, 0.2, 0.5, 0.06, 0.04]])
Q = np.array([[0.2, 0.1, 0.3, 0.15, 0.25], [0.1, 0.6, 0.1, 0.1, 0.1]])
Y = jnp.zeros(2, jnp.int32)
TWO_SIDED = sorted(
    name
    for name, entry in REGISTRY.items()
    if entry.kind == "divergence" and entry.inputs == ("student_logits", "teacher_logits")
)
KNOBS = {"taid.t": jnp.float32(0.3), "cakld.confidence": jnp.float32(0.7)}


def logits(probabilities):
    return jnp.asarray(np.log(probabilities) + 3.0, jnp.float32)  # any constant may be added


@functools.partial(jax.jit, static_argnames=("text", "several"))
def _rows(text, z, teacher, several):
    return [parse_loss(text).rows(z, teacher, Y, KNOBS, top_k=k) for k in several]


def rows(text, q, p, *several):
    """The values seen through each k, 0 for the whole teacher."""
    found = _rows(text, logits(q), p if isinstance(p, TopK) else logits(p), several or (0,))
    return found if len(found) > 1 else found[0]


def test_two_kept_tokens_by_hand():
    kept = top_k_of(logits(P), 2)
    assert kept.indices.tolist() in ([[1, 3], [2, 0]], [[1, 3], [2, 1]])
    np.testing.assert_allclose(np.exp(kept.log_probs), [[0.4, 0.3], [0.5, 0.2]], rtol=1e-5)
    np.testing.assert_allclose(np.exp(kept.log_tail), [0.3, 0.3], rtol=1e-5)
    p, q = np.array([0.4, 0.3, 0.3]), np.array([0.1, 0.15, 0.75])  # the first row, three-way
    want = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    np.testing.assert_allclose(rows("forward_kl", Q, P, 2)[0], want, rtol=1e-5)
    want = sum(b * np.log(b / a) for a, b in zip(p, q, strict=True))
    np.testing.assert_allclose(rows("reverse_kl", Q, P, 2)[0], want, rtol=1e-5)


def test_the_temperature_comes_before_the_buckets():
    soft_p, soft_q = (np.sqrt(x) / np.sqrt(x).sum(-1, keepdims=True) for x in (P, Q))
    order = np.argsort(-P[0])
    p, q = ([*x[0][order[:2]], x[0][order[2:]].sum()] for x in (soft_p, soft_q))
    want = 4 * sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    got = rows("forward_kl:temperature=2", Q, P, 2)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", TWO_SIDED)
def test_all_tokens_kept_is_the_whole_divergence(name):
    loss = parse_loss(f"{name}:temperature=2")

    @jax.jit
    def values_and_gradients(z, z_t):
        several = [lambda z, k=k: loss.rows(z, z_t, Y, KNOBS, top_k=k) for k in (0, 5, 9)]
        return [(f(z), jax.grad(lambda z, f=f: jnp.sum(f(z)))(z)) for f in several]

    whole, *all_kept = values_and_gradients(logits(Q), logits(P))
    for values, gradient in all_kept:
        np.testing.assert_allclose(values, whole[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, whole[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted({*TWO_SIDED} - {"adaptive_kl", "taid"}))
def test_a_lower_bound_that_grows_with_k(name):
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.full(12, 0.5), size=(2, 2))
    found = np.array(rows(name, q, p, 1, 3, 7, 12))
    assert (np.diff(found, axis=0) > -1e-6).all()
    assert (found[0] < 0.9 * found[-1]).all()


def test_without_the_tail_a_student_empties_the_top_k_and_with_it_cannot():
    """Gradient descent on the reverse KL of the kept tokens alone, and on ours with its tail."""
    p, k = jnp.asarray(P[:1], jnp.float32), 2
    kept = top_k_of(jnp.log(p), k)

    def truncated(z):
        log_q = jnp.take_along_axis(jax.nn.log_softmax(z), kept.indices, axis=-1)
        return jnp.sum(jnp.exp(log_q) * (log_q - kept.log_probs))

    def bucketed(z):
        return jnp.sum(parse_loss("reverse_kl").rows(z, kept, Y[:1], {}))

    def mass_after_training(loss):
        z = jnp.log(p)  # the student starts as the teacher itself
        z = jax.lax.fori_loop(0, 300, lambda _, z: z - 0.5 * jax.grad(loss)(z), z)
        return jnp.sum(jnp.exp(jnp.take_along_axis(jax.nn.log_softmax(z), kept.indices, axis=-1)))

    masses = [
        float(jax.jit(mass_after_training, static_argnums=0)(f)) for f in (truncated, bucketed)
    ]
    assert masses[0] < 0.5 * 0.7  # p / e each: less than none, by that measure
    assert masses[1] == pytest.approx(0.7, abs=1e-3)
    emptied = jnp.log(jnp.asarray([[0.3, 1e-6, 0.4, 1e-6, 0.3 - 2e-6]]))
    assert abs(float(truncated(emptied))) < 1e-4 and float(bucketed(emptied)) > 1


def test_a_tail_stored_in_16_bits_may_be_empty():
    kept = top_k_of(logits(P), 5)
    stored = TopK(
        kept.log_probs.astype(jnp.float16), kept.indices, kept.log_tail.astype(jnp.float16)
    )
    assert np.isneginf(stored.log_tail).all()
    got = rows("reverse_kl+forward_kl", Q, stored)
    np.testing.assert_allclose(got, rows("jeffreys", Q, P), rtol=1e-2)
    student, guide = with_tail(logits(Q), stored)
    assert np.isneginf(student[:, -1]).all() and np.isneginf(guide[:, -1]).all()


def test_a_sampled_tokens_probability_is_not_in_a_cache():
    with pytest.raises(UserError, match="policy_gradient needs the teacher's probability"):
        rows("policy_gradient", Q, top_k_of(logits(P), 2))
    whole = rows("policy_gradient", Q, P)
    np.testing.assert_allclose(rows("policy_gradient", Q, P, 2), whole)
