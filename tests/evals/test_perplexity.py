"""Evaluation against plain numpy on whole logits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.evals.perplexity import make_evaluator, recovered
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.decoder import make_apply
from tests import tiny


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_equals_numpy_over_all_targets():
    c = tiny.config()
    apply, student, teacher = make_apply(c), tiny.params(c, 0), tiny.params(c, 1)
    batches = [tiny.batch(c, seed=i) for i in range(3)]
    batches[2]["loss_mask"] = batches[2]["loss_mask"].at[1:].set(False)
    got = make_evaluator(kd_objective(apply, apply, chunk=10))(student, teacher, batches)
    nll = kl = same = count = 0.0
    for b in batches:
        inputs = (b["tokens"], b["positions"], b["segment_ids"])
        logits = [np.asarray(apply(p, *inputs).logits(), np.float64) for p in (student, teacher)]
        q, p = (log_softmax(z)[:, :-1] for z in logits)
        mask, target = np.asarray(b["loss_mask"])[:, 1:], np.asarray(b["tokens"])[:, 1:]
        nll -= np.take_along_axis(q, target[..., None], -1)[..., 0][mask].sum()
        kl += (np.exp(p) * (p - q)).sum(-1)[mask].sum()
        same += (q.argmax(-1) == p.argmax(-1))[mask].sum()
        count += mask.sum()
    assert got["tokens"] == count
    assert got["nll"] == pytest.approx(nll / count, rel=1e-5)
    assert got["perplexity"] == pytest.approx(np.exp(nll / count), rel=1e-4)
    assert got["kl"] == pytest.approx(kl / count, rel=1e-4)
    assert got["agreement"] == pytest.approx(same / count)


def test_nothing_to_evaluate_is_an_error():
    c = tiny.config()
    batch = tiny.batch(c) | {"loss_mask": jnp.zeros((4, 16), bool)}
    with pytest.raises(UserError, match="hold no target token; give longer texts"):
        make_evaluator(kd_objective(make_apply(c), None))(tiny.params(c), None, [batch])


def test_recovered_share_of_the_gap():
    assert recovered(1.2, 0.3) == pytest.approx(0.75)
    assert recovered(3.0, 2.0, 2.5) == pytest.approx(2.0)
    assert np.isnan(recovered(1.0, 0.5, 1.0))
