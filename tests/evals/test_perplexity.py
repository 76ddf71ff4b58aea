"""Evaluation against plain numpy on whole logits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.evals.perplexity import make_evaluator, make_row_evaluator, recovered
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.decoder import make_apply
from tests import tiny


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def by_row_in_numpy(apply, student, teacher, b) -> dict[str, np.ndarray]:
    """Returns each row's sums over its targets, ``[B]``."""
    inputs = (b["tokens"], b["positions"], b["segment_ids"])
    logits = [np.asarray(apply(p, *inputs).logits(), np.float64) for p in (student, teacher)]
    q, p = (log_softmax(z)[:, :-1] for z in logits)
    mask, target = np.asarray(b["loss_mask"])[:, 1:], np.asarray(b["tokens"])[:, 1:]
    of_token = {
        "nll": -np.take_along_axis(q, target[..., None], -1)[..., 0],
        "kl": (np.exp(p) * (p - q)).sum(-1),
        "agreement": q.argmax(-1) == p.argmax(-1),
        "count": np.ones(mask.shape),
    }
    return {name: (x * mask).sum(1) for name, x in of_token.items()}


@pytest.fixture(scope="module")
def models():
    c = tiny.config()
    batches = [tiny.batch(c, seed=i) for i in range(3)]
    batches[2]["loss_mask"] = batches[2]["loss_mask"].at[1:].set(False)
    apply, student, teacher = make_apply(c), tiny.params(c, 0), tiny.params(c, 1)
    rows = [by_row_in_numpy(apply, student, teacher, b) for b in batches]
    return (
        apply,
        student,
        teacher,
        batches,
        {k: np.concatenate([r[k] for r in rows]) for k in rows[0]},
    )


def test_equals_numpy_over_all_targets(models):
    apply, student, teacher, batches, rows = models
    want = {name: x.sum() for name, x in rows.items()}
    got = make_evaluator(kd_objective(apply, apply, chunk=10))(student, teacher, batches)
    count = want["count"]
    assert got["tokens"] == count
    assert got["nll"] == pytest.approx(want["nll"] / count, rel=1e-5)
    assert got["perplexity"] == pytest.approx(np.exp(want["nll"] / count), rel=1e-4)
    assert got["kl"] == pytest.approx(want["kl"] / count, rel=1e-4)
    assert got["agreement"] == pytest.approx(want["agreement"] / count)


def test_each_row_equals_numpy(models):
    apply, student, teacher, batches, rows = models
    objective = kd_objective(apply, apply, chunk=10, by_row=True)  # chunks cross rows of 16
    got = make_row_evaluator(objective)(student, teacher, batches)
    assert set(got) == {"nll", "kl", "agreement"}
    for name, (sums, counts) in got.items():
        np.testing.assert_allclose(counts, rows["count"], err_msg=name)
        np.testing.assert_allclose(sums, rows[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_nothing_to_evaluate_is_an_error():
    c = tiny.config()
    batch = tiny.batch(c) | {"loss_mask": jnp.zeros((4, 16), bool)}
    with pytest.raises(UserError, match="hold no target token; give longer texts"):
        make_evaluator(kd_objective(make_apply(c), None))(tiny.params(c), None, [batch])


def test_recovered_share_of_the_gap():
    assert recovered(1.2, 0.3) == pytest.approx(0.75)
    assert recovered(3.0, 2.0, 2.5) == pytest.approx(2.0)
    assert np.isnan(recovered(1.0, 0.5, 1.0))
