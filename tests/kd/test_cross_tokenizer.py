"""Two vocabularies: ULD and span likelihood by hand, their gradients, and training by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.kd.cross_tokenizer import cross_tokenizer_objective, span_sums
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.losses.chunked import Head
from jaxdistill.losses.cross_tokenizer import log1mexp, span_likelihood, uld
from jaxdistill.losses.token_log_probs import chunked_log_probs
from jaxdistill.models.decoder import Output
from jaxdistill.models.hub import Model, check_same_vocabulary
from jaxdistill.train.packing import batches, eval_batches
from jaxdistill.train.pairing import pair_rows
from tests import tiny
from tests.train.test_pairing import merged_tokenizer

TEXTS = [
    "the cat sat on the mat. the cat is fat.",
    "café: 10 € the rat sat. that was the end",
    "the hat. the hat. the bat and the 😀 cat",
    "at the gate the cat met that fat rat",
]
STUDENT, TEACHER = tiny.byte_tokenizer(bos=True), merged_tokenizer()


def bigram(params, tokens, positions=None, segment_ids=None):
    """A bigram model."""
    return Output(jnp.take(params["h"], tokens, axis=0), params["e"])


def bigram_params(size, seed, width=12):
    h, e = jax.random.normal(jax.random.key(seed), (2, size, width))
    return {"h": h * 0.6, "e": e}


@pytest.fixture(scope="module")
def problem():
    """Paired rows on the device, a student and a teacher."""
    paired = pair_rows([{"text": t} for t in TEXTS], STUDENT, TEACHER, 40)
    batch = jax.tree.map(jnp.asarray, paired[:])
    return batch, bigram_params(len(STUDENT), 0), bigram_params(len(TEACHER), 1)


def log_softmax(params, tokens):
    z = np.asarray(bigram(params, tokens).logits(), np.float64)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def by_hand(problem):
    """Return uld by spans and by index, the span likelihood and the nll, one at a time, float64."""
    batch, student, teacher = problem
    b = {name: np.asarray(a) for name, a in batch.items()}
    q, p = log_softmax(student, batch["tokens"]), log_softmax(teacher, batch["teacher_tokens"])

    def distance(n, i, j):
        a, c = np.sort(np.exp(q[n, i]))[::-1], np.sort(np.exp(p[n, j]))[::-1]
        size = max(len(a), len(c))
        return np.abs(np.pad(a, (0, size - len(a))) - np.pad(c, (0, size - len(c)))).sum()

    spans, index, likelihood, nll = [], [], [], []
    for n in range(len(b["tokens"])):
        own = [i for i in range(b["tokens"].shape[1] - 1) if b["loss_mask"][n, i + 1]]
        other = [
            j for j in range(b["teacher_tokens"].shape[1] - 1) if b["teacher_loss_mask"][n, j + 1]
        ]
        index += [distance(n, i, j) for i, j in zip(own, other, strict=False)]
        nll += [-q[n, i, b["tokens"][n, i + 1]] for i in own]
        mask = b["pair_mask"][n]
        pairs = list(zip(b["pair_student"][n][mask], b["pair_teacher"][n][mask], strict=True))
        spans += [distance(n, i, j) for i, j in pairs if i in own and j in other]
        for (i, j), (i2, j2) in zip(pairs, pairs[1:], strict=False):
            if all(t in own for t in range(i, i2)) and all(t in other for t in range(j, j2)):
                lq = sum(q[n, t, b["tokens"][n, t + 1]] for t in range(i, i2))
                lp = sum(p[n, t, b["teacher_tokens"][n, t + 1]] for t in range(j, j2))
                likelihood.append((lq, lp))
    return spans, index, likelihood, nll


def kl_of(pairs, temperature=1.0):
    out = []
    for lq, lp in pairs:
        q, p = np.exp(lq / temperature), np.exp(lp / temperature)
        out.append(p * np.log(p / q) + (1 - p) * (np.log1p(-p) - np.log1p(-q)))
    return out


def test_each_term_is_what_it_is_by_hand(problem):
    batch, student, teacher = problem
    spans, index, likelihood, nll = by_hand(problem)
    assert min(len(spans), len(likelihood)) > 50 and len(spans) != len(nll)
    cases = {
        "uld": ("uld", spans),
        "uld:align=index": ("uld", index),
        "span_likelihood": ("span_likelihood", kl_of(likelihood)),
        "span_likelihood:temperature=4": ("span_likelihood", kl_of(likelihood, 4.0)),
        "ce": ("nll", nll),
    }
    for loss, (name, want) in cases.items():
        objective = cross_tokenizer_objective(bigram, bigram, loss, chunk=16)
        total, count, metrics = jax.jit(objective)(student, teacher, batch)
        value, number = metrics[name]
        assert float(number) == len(want), loss
        assert float(value) == pytest.approx(sum(want), rel=2e-5), loss
        assert float(total / count) == pytest.approx(np.mean(want), rel=2e-5), loss
        assert float(count) == len(nll)
    objective = cross_tokenizer_objective(bigram, bigram, "0.5*uld+2*span_likelihood+0.25*ce")
    total, count, metrics = jax.jit(objective)(student, teacher, batch)
    want = 0.5 * np.mean(spans) + 2 * np.mean(kl_of(likelihood)) + 0.25 * np.mean(nll)
    assert float(total / count) == pytest.approx(want, rel=2e-5)
    assert metrics.keys() == {"loss", "nll", "uld", "span_likelihood"}


def test_span_likelihood_by_hand():
    """A span of two tokens against one of one: P = 0.5 * 0.4 = 0.2 beside 0.5."""
    student = jnp.log(jnp.array([0.2], jnp.float32))
    teacher = jnp.log(jnp.array([0.5], jnp.float32))
    want = 0.5 * np.log(0.5 / 0.2) + 0.5 * np.log(0.5 / 0.8)
    assert float(span_likelihood(student, teacher)[0]) == pytest.approx(want, rel=1e-5)
    values = jnp.log(jnp.array([[0.9, 0.5, 0.4, 0.3, 0.7]], jnp.float32))
    there = jnp.array([[True, True, True, False]])
    counted = jnp.array([[True, True, True, True, False]])
    sums, whole = span_sums(values, counted, jnp.array([[1, 3, 4, 0]]), there)
    np.testing.assert_allclose(np.exp(sums[0, :2]), [0.2, 0.3], rtol=1e-6)
    assert whole.tolist() == [[True, True, False, False]]  # the third has no end


def test_uld_by_hand():
    """Sorted .5 .3 .2 beside .6 .4 0: .1 + .1 + .2."""
    student = jnp.log(jnp.array([[0.3, 0.2, 0.5]], jnp.float32))
    teacher = jnp.log(jnp.array([[0.4, 0.6]], jnp.float32))
    np.testing.assert_allclose(uld(student, teacher), [0.4], rtol=1e-5)
    np.testing.assert_allclose(uld(teacher, student), [0.4], rtol=1e-5)
    with pytest.raises(UserError, match="align is 'words'; accepted: spans, index"):
        uld(student, teacher, align="words")


def test_certain_and_hopeless_spans_stay_finite():
    x = jnp.array([0.0, -1e-9, -1e-3, -0.7, -30.0, -300.0], jnp.float32)
    want = np.log1p(-np.exp(np.float64(x[2:])))
    np.testing.assert_allclose(log1mexp(x[2:]), want, rtol=1e-5, atol=1e-30)
    for other in (x, x[::-1]):
        values, gradient = jax.vmap(
            jax.value_and_grad(lambda a, b: span_likelihood(a[None], b[None])[0])
        )(x, other)
        assert bool(jnp.isfinite(values).all()) and bool(jnp.isfinite(gradient).all())
        assert float(values.min()) > -1e-6


def test_equal_tokenizers_and_models_have_no_loss():
    paired = pair_rows([{"text": t} for t in TEXTS], STUDENT, STUDENT, 40)
    batch = jax.tree.map(jnp.asarray, paired[:])
    np.testing.assert_array_equal(batch["pair_student"], batch["pair_teacher"])
    params = bigram_params(len(STUDENT), 0)
    for loss in ("uld", "span_likelihood"):
        objective = jax.jit(cross_tokenizer_objective(bigram, bigram, loss))
        total, count, metrics = objective(params, params, batch)
        # Every place is a pair, but those inside a character of several bytes.
        assert 0.8 < float(metrics[loss][1] / count) <= 1
        assert abs(float(total)) < 1e-4


@pytest.mark.parametrize(
    ("loss", "fused"),
    [("uld", True), ("0.3*uld+0.7*ce", False), ("span_likelihood:temperature=2", True)],
)
def test_gradients_are_those_of_finite_differences(problem, loss, fused):
    batch, student, teacher = problem
    objective = cross_tokenizer_objective(bigram, bigram, loss, chunk=32, fused=fused)

    @jax.jit
    def mean(params):
        total, count, _ = objective(params, teacher, batch)
        return total / count

    way = bigram_params(len(STUDENT), 7)
    slope = jax.tree.map(lambda g, w: jnp.vdot(g, w), jax.jit(jax.grad(mean))(student), way)
    h = 2e-3
    ahead, behind = (
        float(mean(jax.tree.map(lambda p, w, s=s: p + s * h * w, student, way))) for s in (1, -1)
    )
    assert float(sum(jax.tree.leaves(slope))) == pytest.approx((ahead - behind) / (2 * h), rel=0.02)


def test_chunked_log_probs_are_the_dense_ones():
    hidden, kernel = jax.random.normal(jax.random.key(0), (2, 23, 8))
    targets = jnp.arange(23) % 23
    head = Head(hidden, kernel, 5.0)

    def dense(head):
        return jax.nn.log_softmax(head.logits())[jnp.arange(23), targets]

    got = chunked_log_probs(head, targets, chunk=7)
    np.testing.assert_allclose(got, dense(head), rtol=1e-5, atol=1e-6)
    grads = [
        jax.grad(lambda h, k, f=f: jnp.sum(jnp.sin(f(Head(h, k, 5.0)))), argnums=(0, 1))(
            hidden, kernel
        )
        for f in (lambda head: chunked_log_probs(head, targets, chunk=7), dense)
    ]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_row_weights_weigh_each_mean(problem):
    """Rows of weight 0 are as rows that are not there."""
    batch, student, teacher = problem
    weights = jnp.ones(batch["tokens"].shape).at[2:].set(0.0)
    objective = jax.jit(cross_tokenizer_objective(bigram, bigram, "3*uld+span_likelihood+0.1*ce"))
    got = objective(student, teacher, batch | {"weights": weights})
    want = objective(student, teacher, jax.tree.map(lambda x: x[:2], batch))
    assert float(got[0] / got[1]) == pytest.approx(float(want[0] / want[1]), rel=1e-5)


def test_what_compares_ids_is_refused(problem):
    with pytest.raises(UserError, match="forward_kl compares models of one vocabulary.*uld"):
        cross_tokenizer_objective(bigram, bigram, "uld+forward_kl")
    with pytest.raises(UserError, match="named 'uld'"):
        kd_objective(bigram, bigram, "uld")
    c = tiny.config()
    models = [
        Model(config=c, params={}, tokenizer=t, source=name)
        for t, name in ((TEACHER, "large"), (STUDENT, "small"))
    ]
    with pytest.raises(UserError, match="large.*small.*cross-tokenizer objective"):
        check_same_vocabulary(*models)


@pytest.mark.parametrize("loss", ["0.5*uld+0.5*ce", "span_likelihood"])
def test_a_student_of_another_tokenizer_learns(loss):
    """Held-out loss and NLL both fall, the latter without a label where the spans say it all."""
    words = ["the", "cat", "sat", "on", "at", "that", "mat", "a", "hat"]
    rng = np.random.default_rng(0)
    texts = [
        {"text": " ".join(words[(i * 2 + s) % 9] for i, s in enumerate(rng.integers(0, 2, 8)))}
        for _ in range(48)
    ]
    train, held = texts[:40], texts[40:]
    paired, held_out = (pair_rows(rows, STUDENT, TEACHER, 40) for rows in (train, held))
    # A teacher that knows the text: trained on it by itself.
    tx = adamw(5e-2, 60)
    state = init_state(bigram_params(len(TEACHER), 1), tx)
    teach = make_step(kd_objective(bigram, None, "ce"), tx)
    for i in range(60):
        state, _ = teach(state, None, batches(paired.teacher, batch_size=8, seed=0)[i])
    teacher = state.params
    objective = cross_tokenizer_objective(bigram, bigram, loss)
    step = make_step(objective, tx)
    state = init_state(bigram_params(len(STUDENT), 0), tx)
    (batch,) = eval_batches(held_out, 8)
    judge = jax.jit(objective)

    def held_out_values(params):
        _, count, metrics = judge(params, teacher, batch)
        return {name: float(a / b) for name, (a, b) in metrics.items()}

    before = held_out_values(state.params)
    for i in range(60):
        state, _ = step(state, teacher, batches(paired, batch_size=8, seed=0)[i])
    after = held_out_values(state.params)
    assert after["loss"] < 0.7 * before["loss"]
    assert after["nll"] < before["nll"] - 0.5
