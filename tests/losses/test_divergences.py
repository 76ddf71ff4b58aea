"""Every registered divergence: by float64 formulas, chunked, capped, in low types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.kd.objective import kd_objective
from jaxdistill.losses.loss import parse_loss
from jaxdistill.losses.registry import REGISTRY
from jaxdistill.models.decoder import Output
from tests.divergence_formulas import (
    CASES,
    FORMULAS,
    NAMES,
    N,
    V,
    kl,
    log_softmax,
    ours,
    slope,
    values_and_gradient,
    wanted,
)


def logits(seed=0, scale=2.0, rows=N, words=V):
    rng = np.random.default_rng(seed)
    z, z_t = scale * rng.normal(size=(2, rows, words))
    return z.astype(np.float32), z_t.astype(np.float32), rng.integers(0, words, rows).astype("i4")


@pytest.mark.parametrize(("name", "case", "temperature"), CASES)
def test_value_and_gradient_are_the_formulas(name, case, temperature):
    z, z_t, y = logits()
    double = z.astype(float), z_t.astype(float), y
    f = values_and_gradient(name, case, temperature)
    got, gradient = f(*map(jnp.asarray, (z, z_t, y)))
    np.testing.assert_allclose(got, wanted(name, case, temperature, *double), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(
        gradient, slope(name, case, temperature, *double), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_that_vanish_in_float32_do_no_harm(name):
    z, z_t, y = logits(seed=3, scale=60.0)
    got, gradient = values_and_gradient(name, 0, 1.0)(*map(jnp.asarray, (z, z_t, y)))
    want = wanted(name, 0, 1.0, z.astype(float), z_t.astype(float), y)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_jit_vmap_and_bfloat16_give_the_same(name):
    problems = [logits(seed) for seed in (1, 2)]
    low = [jnp.stack([jnp.asarray(p[i], jnp.bfloat16) for p in problems]) for i in (0, 1)]
    y = jnp.stack([jnp.asarray(p[2]) for p in problems])

    values, gradient = jax.vmap(values_and_gradient(name, 0, 1.0))(*low, y)
    assert values.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    for i in range(2):  # the logits are rounded, the sums are not
        double = *(np.asarray(x[i].astype(jnp.float32), float) for x in low), np.asarray(y[i])
        want = wanted(name, 0, 1.0, *double)
        np.testing.assert_allclose(values[i], want, rtol=2e-5, atol=1e-6)
        want = slope(name, 0, 1.0, *double)
        np.testing.assert_allclose(
            gradient[i].astype(jnp.float32), want, rtol=0.01, atol=0.01 * abs(want).max()
        )


@pytest.mark.parametrize("name", NAMES)
def test_no_divergence_and_no_gradient_between_equals(name):
    if name in ("ce", "policy_gradient"):
        pytest.skip("no divergence of two distributions")
    z = jnp.asarray(logits()[0])
    f = values_and_gradient(name, 0, 1.0)
    values, gradient = f(z, z, jnp.zeros(N, jnp.int32))
    assert float(jnp.abs(values).max()) < 1e-5
    if name != "total_variation":  # which has a kink there
        assert float(jnp.abs(gradient).max()) < 1e-5


def test_generalized_jsd_leads_to_both_kl():
    """Over its smaller weight it tends to them; at the end itself the divergence is that KL."""
    z, z_t, _ = map(jnp.asarray, logits())
    jsd, forward, reverse = (REGISTRY[n].function for n in ("jsd", "forward_kl", "reverse_kl"))
    for beta, other in ((0.0, forward), (1.0, reverse)):
        small = 1e-3
        near = jsd(z, z_t, beta=abs(beta - small)) / small
        np.testing.assert_allclose(near, other(z, z_t), rtol=0.05)
        traced = jax.jit(lambda b: jsd(z, z_t, beta=b))(jnp.float32(beta))
        np.testing.assert_allclose(traced, other(z, z_t), rtol=1e-5)


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_the_head_of_adaptive_kl_is_that_of_a_sort(scale):
    """Of a vocabulary whose head has hundreds of tokens, or a few."""
    z, z_t, _ = logits(seed=2, scale=scale, rows=4, words=2000)
    p, q = (np.exp(log_softmax(x.astype(float))) for x in (z_t, z))
    order = np.argsort(-p, axis=-1)
    p, q = (np.take_along_axis(x, order, axis=-1) for x in (p, q))
    in_head = np.cumsum(p, axis=-1) <= 0.5
    in_head[:, 0] = True
    assert in_head.sum() > 1000 if scale == 0.5 else in_head.sum() < 100
    share = (abs(p - q) * in_head).sum(-1) / abs(p - q).sum(-1)
    want = share * kl(np.log(p), np.log(q)) + (1 - share) * kl(np.log(q), np.log(p))
    got = REGISTRY["adaptive_kl"].function(jnp.asarray(z), jnp.asarray(z_t))
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_policy_gradient_is_that_of_reverse_kl_on_average():
    z, z_t, _ = map(jnp.asarray, logits(seed=5))
    q = np.exp(log_softmax(np.asarray(z, float)))
    mean = np.zeros((N, V))
    gradient_of = values_and_gradient("policy_gradient", 0, 1.0)
    for word in range(V):
        gradient = gradient_of(z, z_t, jnp.full(N, word, jnp.int32))[1]
        mean += q[:, word, None] * np.asarray(gradient)
    want = values_and_gradient("reverse_kl", 0, 1.0)(z, z_t, jnp.zeros(N, jnp.int32))[1]
    np.testing.assert_allclose(mean, want, rtol=1e-4, atol=1e-6)


# --- through the chunked head -------------------------------------------------------------------

ROWS, SEQ, D = 2, 7, 6


def problem(padding=0):
    """Hidden states and heads as params; masked places hold what no loss can be taken of."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params, teacher = ({"h": draw(ROWS, SEQ, D), "e": draw(V + padding, D)} for _ in range(2))
    mask = rng.random((ROWS, SEQ)) < 0.6
    counts = np.roll(mask, -1, axis=1)
    counts[:, -1] = False
    params["h"][~counts] = np.nan
    teacher["h"][~counts] = np.inf
    for tree in (params, teacher):
        tree["e"][V:] = 50.0  # rows that no token has
    batch = {
        "tokens": jnp.asarray(rng.integers(0, V, (ROWS, SEQ)), jnp.int32),
        "loss_mask": jnp.asarray(mask),
    }
    to_jax = functools.partial(jax.tree.map, jnp.asarray)
    return to_jax(params), to_jax(teacher), batch, np.nonzero(counts.reshape(-1))[0]


def check_chunked(name, fused, softcap=None, padding=0):
    params, teacher, batch, places = problem(padding)
    argument = ",".join(f"{k}={v}" for k, v in FORMULAS[name][0][0].items())
    text = f"{name}:{argument}" if argument else name
    vocab_size = V if padding else None

    def apply(params, tokens, positions=None, segment_ids=None):
        return Output(params["h"], params["e"], softcap)

    def capped(params):
        z = params["h"].reshape(-1, D)[places] @ params["e"][:V].T
        return z if softcap is None else softcap * jnp.tanh(z / softcap)

    def dense(params):
        targets = jnp.roll(batch["tokens"], -1, axis=1).reshape(-1)[places]
        return jnp.sum(ours(name, 0, 1.0)(capped(params), capped(teacher), targets))

    objective = kd_objective(apply, apply, text, chunk=4, fused=fused, vocab_size=vocab_size)

    @jax.jit
    def both(params):
        chunked = jax.value_and_grad(lambda p: objective(p, teacher, batch)[0])(params)
        return chunked, jax.value_and_grad(dense)(params)

    (got, gradient), (want, expected) = both(params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for key in params:
        np.testing.assert_allclose(
            gradient[key], expected[key], rtol=1e-4, atol=1e-5 * float(abs(expected[key]).max())
        )
    assert not np.asarray(gradient["e"])[V:].any()


@pytest.mark.parametrize("name", NAMES)
def test_chunked_equals_dense_whatever_masked_places_hold(name):
    check_chunked(name, False)


@pytest.mark.parametrize("name", NAMES)
def test_fused_with_softcap_and_padded_vocabulary_equals_dense(name):
    check_chunked(name, True, softcap=3.0, padding=3)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"padding": 3}])
def test_fused_with_softcap_or_padded_vocabulary_or_neither(options):
    check_chunked("forward_kl", True, **options)


def test_a_sum_is_the_sum_of_its_terms():
    z, z_t, y = map(jnp.asarray, logits())
    loss = parse_loss("0.5*jsd:beta=0.1+2*ce+forward_kl:temperature=4..1")
    knobs = {"forward_kl.temperature": jnp.float32(2.5)}
    double = np.asarray(z, float), np.asarray(z_t, float), np.asarray(y)
    want = 0.5 * wanted("jsd", 0, 1.0, *double) + 2 * wanted("ce", 0, 1.0, *double)
    want += wanted("forward_kl", 0, 2.5, *double)
    np.testing.assert_allclose(loss.rows(z, z_t, y, knobs), want, rtol=1e-5)
