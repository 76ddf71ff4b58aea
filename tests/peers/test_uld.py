"""Universal logit distillation against TRL's, value and gradient."""

import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.kd.cross_tokenizer import cross_tokenizer_objective
from jaxdistill.models.decoder import Output

torch = pytest.importorskip("torch")

SEQ, OTHER_SEQ, D, V, W = 12, 9, 8, 31, 47


def head(params, tokens, positions=None, segment_ids=None):
    return Output(params["h"], params["e"])


def test_by_index_it_is_the_loss_of_trl(monkeypatch):
    """One row whose answers begin at different places; TRL's shift to the predicting place."""
    monkeypatch.setitem(os.environ, "TRL_EXPERIMENTAL_SILENCE", "1")  # else it warns on import
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    rng = np.random.default_rng(0)
    own, other = (
        {
            "h": rng.normal(size=(1, t, D)).astype(np.float32),
            "e": rng.normal(size=(v, D)).astype(np.float32),
        }
        for t, v in ((SEQ, V), (OTHER_SEQ, W))
    )
    tokens, others = rng.integers(0, V, (1, SEQ)), rng.integers(0, W, (1, OTHER_SEQ))
    mask, other_mask = np.arange(SEQ)[None] >= 3, np.arange(OTHER_SEQ)[None] >= 2
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=2.0,
        uld_teacher_temperature=2.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="bayesian",
    )
    z = (torch.tensor(own["h"]) @ torch.tensor(own["e"]).T).requires_grad_()
    z_other = torch.tensor(other["h"]) @ torch.tensor(other["e"]).T
    labels = [torch.tensor(np.where(m, x, -100)) for x, m in ((tokens, mask), (others, other_mask))]
    want = gold.ULDLoss(config)(z, z_other, *labels, torch.tensor(tokens), torch.tensor(others))
    want.backward()

    batch = {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "loss_mask": jnp.asarray(mask),
        "teacher_tokens": jnp.asarray(others, jnp.int32),
        "teacher_loss_mask": jnp.asarray(other_mask),
    }
    objective = cross_tokenizer_objective(head, head, "uld:align=index,temperature=2", chunk=4)

    def mean(params):
        total, count, _ = objective(params, jax.tree.map(jnp.asarray, other), batch)
        return total / count

    value, gradient = jax.value_and_grad(mean)(jax.tree.map(jnp.asarray, own))
    assert float(value) == pytest.approx(float(want.detach()), rel=1e-5)
    through_head = np.asarray(z.grad) @ own["e"]
    np.testing.assert_allclose(gradient["h"], through_head, rtol=1e-4, atol=1e-6)
