"""Several teachers as one, labels that put them right, weights of tokens: by hand in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.evals.confidence import teacher_confidence
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.teachers import (
    agreement,
    confidence,
    label_mix,
    mean,
    probability_shift,
)
from jaxdistill.kd.token_weights import certainty, consensus, uncertainty
from jaxdistill.models.decoder import Output

M, N, V = 3, 4, 6
ROWS, SEQ, D = 2, 7, 5


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


@pytest.fixture
def drawn():
    """Logits of three teachers, their probabilities in float64, and targets."""
    rng = np.random.default_rng(0)
    z = (2 * rng.normal(size=(M, N, V))).astype(np.float32)
    y = rng.integers(0, V, N).astype(np.int32)
    return tuple(map(jnp.asarray, z)), softmax(z.astype(float)), y


def probabilities(log_p):
    p = np.exp(np.asarray(log_p, float))
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)  # what is mixed is normalised
    return p


def test_the_mean_is_of_probabilities(drawn):
    z, p, y = drawn
    np.testing.assert_allclose(probabilities(mean(z, jnp.asarray(y))), p.mean(0), rtol=1e-5)
    got = probabilities(mean(z, jnp.asarray(y), first=0.7))
    np.testing.assert_allclose(got, 0.7 * p[0] + 0.15 * p[1] + 0.15 * p[2], rtol=1e-5)
    np.testing.assert_allclose(probabilities(mean(z, jnp.asarray(y), first=1.0)), p[0], rtol=1e-5)


def test_confidence_asks_who_knows_the_label(drawn):
    z, p, y = drawn
    got = probabilities(confidence(z, jnp.asarray(y)))
    for i in range(N):
        cost = np.exp([-np.log(p[m, i, y[i]]) for m in range(M)])  # exp of the cross-entropy
        weights = (1 - cost / cost.sum()) / (M - 1)
        assert weights.sum() == pytest.approx(1) and weights.argmax() == p[:, i, y[i]].argmax()
        np.testing.assert_allclose(got[i], weights @ p[:, i], rtol=1e-4)


def test_agreement_leaves_the_odd_one_out(drawn):
    z, p, y = drawn
    got = probabilities(agreement(z, jnp.asarray(y), scale=0.2))
    weights = softmax(-np.stack([kl(p[m], p.mean(0)) for m in range(M)]).T / 0.2)
    np.testing.assert_allclose(got, np.einsum("nm,mnv->nv", weights, p), rtol=1e-4)
    two_and_another = probabilities(agreement((z[0], z[0], z[1]), jnp.asarray(y), scale=0.05))
    assert (kl(two_and_another, p[0]) < 0.1 * kl((2 * p[0] + p[1]) / 3, p[0]) + 1e-4).all()


@pytest.mark.parametrize("mixture", [mean, confidence, agreement])
def test_one_teacher_is_its_own_mixture(drawn, mixture):
    z, p, y = drawn
    np.testing.assert_allclose(probabilities(mixture(z[:1], jnp.asarray(y))), p[0], rtol=1e-5)


def test_probability_shift_exchanges_label_and_largest():
    z = jnp.asarray([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    got = probability_shift(z, jnp.asarray([0, 1], jnp.int32))
    np.testing.assert_array_equal(got, [[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])


def test_label_mix_gives_the_label_its_share(drawn):
    z, p, y = drawn
    for share in (0.0, 0.3):
        want = (1 - share) * p[0] + share * np.eye(V)[y]
        got = probabilities(label_mix(z[0], jnp.asarray(y), share=share))
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_weights_by_entropy_and_disagreement(drawn):
    z, p, _ = drawn
    share = -(p * np.log(p)).sum(-1).mean(0) / np.log(V)
    np.testing.assert_allclose(certainty(z, power=2.0), (1 - share) ** 2, rtol=1e-4)
    np.testing.assert_allclose(uncertainty(z, power=0.5), share**0.5, rtol=1e-4)
    apart = np.mean([kl(p[m], p.mean(0)) for m in range(M)], axis=0)
    np.testing.assert_allclose(consensus(z, scale=3.0), np.exp(-3 * apart), rtol=1e-4)
    flat = (jnp.zeros((2, V)),)
    np.testing.assert_allclose(certainty(flat), 0, atol=1e-6)
    np.testing.assert_allclose(uncertainty(flat), 1, rtol=1e-6)
    with pytest.raises(UserError, match="consensus compares teachers; give two or more"):
        consensus(z[:1])


# --- through the objective ----------------------------------------------------------------------


def apply(params, tokens, positions=None, segment_ids=None):
    """An ApplyFn whose logits are its params times a fixed matrix."""
    return Output(params["h"], jnp.eye(V, D))


@pytest.fixture
def problem():
    rng = np.random.default_rng(1)
    student, *teachers = (
        {"h": jnp.asarray(2 * rng.normal(size=(ROWS, SEQ, D)), jnp.float32)} for _ in range(3)
    )
    batch = {
        "tokens": jnp.asarray(rng.integers(0, V, (ROWS, SEQ)), jnp.int32),
        "loss_mask": jnp.asarray(rng.random((ROWS, SEQ)) < 0.7),
        "weights": jnp.asarray(rng.random((ROWS, SEQ)), jnp.float32),
    }
    return student, tuple(teachers), batch


def dense(params, batch):
    """Probabilities [K, V] at the places that count, in float64."""
    z = np.asarray(params["h"], float) @ np.eye(V, D).T
    return softmax(z[:, :-1][np.asarray(batch["loss_mask"])[:, 1:]])


def targets(batch, key="tokens"):
    return np.asarray(batch[key])[:, 1:][np.asarray(batch["loss_mask"])[:, 1:]]


def test_two_teachers_as_a_tuple_of_params(problem):
    student, teachers, batch = problem
    batch.pop("weights")
    objective = kd_objective(apply, (apply, apply), "forward_kl", mixture="mean:first=0.7", chunk=4)
    value, count, metrics = objective(student, teachers, batch)
    p = 0.7 * dense(teachers[0], batch) + 0.3 * dense(teachers[1], batch)
    want = kl(p, dense(student, batch)).sum()
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"][0], want, rtol=1e-5)
    assert float(count) == float(metrics["kl"][1]) == len(p)
    same = (p.argmax(-1) == dense(student, batch).argmax(-1)).sum()
    assert float(metrics["agreement"][0]) == same


def test_weights_make_a_weighted_mean_and_leave_the_metrics_alone(problem):
    student, teachers, batch = problem
    objective = kd_objective(
        apply, (apply, apply), "forward_kl+0.5*ce", token_weight="consensus:scale=2", chunk=4
    )
    value, count, metrics = jax.jit(objective)(student, teachers, batch)
    pair, q = [dense(t, batch) for t in teachers], dense(student, batch)
    middle = (pair[0] + pair[1]) / 2
    weights = np.exp(-2 * (kl(pair[0], middle) + kl(pair[1], middle)) / 2)
    weights = weights * targets(batch, "weights")
    nll = -np.log(q[np.arange(len(q)), targets(batch)])
    np.testing.assert_allclose(value, weights @ (kl(middle, q) + 0.5 * nll), rtol=1e-5)
    np.testing.assert_allclose(count, weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (value, count))
    np.testing.assert_allclose(metrics["nll"], (nll.sum(), len(q)), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], (kl(middle, q).sum(), len(q)), rtol=1e-5)


def test_weights_weigh_the_gradient_and_get_none_from_the_teacher(problem):
    student, teachers, batch = problem
    objective = kd_objective(apply, apply, token_weight="certainty", chunk=4, fused=False)
    by = jax.grad(lambda s, t, w: objective(s, t, batch | {"weights": w})[0], argnums=(0, 1, 2))
    gradient, by_teacher, by_weight = by(student, teachers[0], batch["weights"])
    p, q = dense(teachers[0], batch), dense(student, batch)
    certain = 1 + (p * np.log(p)).sum(-1) / np.log(V)
    weights = certain * targets(batch, "weights")
    want = ((weights[:, None] * (q - p)) @ np.eye(V, D)).sum(0)  # dKL/dz = q - p
    np.testing.assert_allclose(gradient["h"].sum((0, 1)), want, rtol=1e-4, atol=1e-5)
    assert not np.asarray(by_teacher["h"]).any()
    mask = np.asarray(batch["loss_mask"])[:, 1:]  # learned weights may have a gradient, our own
    np.testing.assert_allclose(by_weight[:, 1:][mask], certain * kl(p, q), rtol=1e-4, atol=1e-6)


def test_a_correction_changes_the_loss_and_not_the_metrics(problem):
    student, teachers, batch = problem
    batch.pop("weights")
    objective = kd_objective(apply, apply, correction="label_mix:share=0.3", chunk=4)
    value, _, metrics = objective(student, teachers[0], batch)
    p, q = dense(teachers[0], batch), dense(student, batch)
    goal = 0.7 * p + 0.3 * np.eye(V)[targets(batch)]
    np.testing.assert_allclose(value, kl(goal, q).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"][0], kl(p, q).sum(), rtol=1e-5)


def test_confidence_of_a_teacher_over_batches(problem):
    _, teachers, batch = problem
    short = {name: x[:1] for name, x in batch.items()}
    first = {"h": teachers[0]["h"][:1]}

    def one(params, tokens, positions=None, segment_ids=None):
        return apply(params if len(tokens) == ROWS else first, tokens)

    tops = [dense(teachers[0], batch).max(-1), dense(first, short).max(-1)]
    want = np.concatenate(tops).mean()  # over tokens, not over batches
    assert teacher_confidence(one, teachers[0], [batch, short]) == pytest.approx(want, rel=1e-5)
    none = batch | {"loss_mask": jnp.zeros((ROWS, SEQ), bool)}
    with pytest.raises(UserError, match="hold no target token"):
        teacher_confidence(apply, teachers[0], [none])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token_weight": "certainty", "loss": "ce"}, "certainty weighs by a teacher; give one"),
        ({"correction": "label_mix"}, "a correction by labels needs a live teacher"),
        ({"loss": "jsd"}, "the loss compares with a teacher, and neither a teacher nor"),
    ],
)
def test_what_needs_a_teacher_says_so(problem, options, said):
    student, _, batch = problem
    with pytest.raises(UserError, match=said) as e:
        kd_objective(apply, None, **options)(student, None, batch)
    assert "\n" not in str(e.value)


def test_vocabularies_that_differ_are_named(problem):
    student, teachers, batch = problem

    def wider(params, tokens, positions=None, segment_ids=None):
        return Output(params["h"], jnp.eye(V + 2, D))

    with pytest.raises(UserError, match=r"student's head has 6 rows, its teachers' \[8\]"):
        kd_objective(apply, wider)(student, teachers[0], batch)
    with pytest.raises(UserError, match="vocab_size=9 given, and the heads have 8 rows"):
        kd_objective(wider, wider, vocab_size=9)(student, teachers[0], batch)
    assert np.isfinite(kd_objective(apply, wider, vocab_size=V)(student, teachers[0], batch)[0])
