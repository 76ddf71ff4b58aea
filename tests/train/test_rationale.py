"""Answers and rationales as two tasks, and the weights that carry them through packing."""

import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.train.encode import encode_rows
from jaxdistill.train.packing import pack
from jaxdistill.train.rationale import ANSWER, RATIONALE, rationale_rows
from tests import tiny

ROWS = [
    {"instruction": "2+2?", "output": "4", "rationale": "two and two"},
    {"instruction": "capital of France?", "output": "Paris"},
]


def test_each_rationale_is_a_row_of_its_own_at_its_weight():
    rows = rationale_rows(ROWS, 0.5)
    assert [r["instruction"] for r in rows] == [
        ANSWER + "2+2?",
        RATIONALE + "2+2?",
        ANSWER + "capital of France?",
    ]
    assert [r["output"] for r in rows] == ["4", "two and two", "Paris"]
    assert [r["weight"] for r in rows] == [1.0, 0.5, 1.0]


@pytest.mark.parametrize("packing", ["best-fit", "wrap", "none"])
def test_weights_reach_their_own_tokens(packing):
    tokenizer = tiny.byte_tokenizer()
    examples = encode_rows(rationale_rows(ROWS, 0.5), tokenizer, loss_on="completion")
    rows = pack(examples, 64, packing=packing)
    weights, mask = rows[:]["weights"], rows[:]["loss_mask"]
    said = {
        w: tokenizer.decode(rows.tokens[mask & (weights == w)]).replace("<|im_end|>", " ").split()
        for w in (0.5, 1.0)
    }
    assert said == {0.5: ["two", "and", "two"], 1.0: ["4", "Paris"]}


def test_weights_stay_with_answers_that_are_prompts_and_answers():
    from jaxdistill.train.prompts import prompt_rows

    examples = encode_rows(rationale_rows(ROWS, 0.5), tiny.byte_tokenizer(), loss_on="completion")
    rows = prompt_rows(examples, seq_len=96, prompt_length=64)
    assert [w[m].mean() for w, m in zip(rows.weights, rows.loss_mask, strict=True)] == [1, 0.5, 1]


def test_rows_without_weights_have_no_field_of_them():
    examples = encode_rows([{"text": "abc"}], tiny.byte_tokenizer())
    assert "weights" not in pack(examples, 4)[:]


@pytest.mark.parametrize(
    ("rows", "weight", "message"),
    [
        (ROWS[1:], 0.5, "no row has a 'rationale'"),
        ([{"text": "a"}], 0.5, "rationales need rows of"),
        ([ROWS[0] | {"rationale": ["two", "steps"]}], 0.5, "rationale: list given"),
        (ROWS, -1.0, "rationale weight -1.0 given; accepted: 0 or more"),
    ],
)
def test_what_gives_no_rationales(rows, weight, message):
    with pytest.raises(UserError, match=message):
        rationale_rows(rows, weight)


@pytest.mark.parametrize("weight", [-1, True, "x", float("nan"), 1e30])
def test_a_weight_is_a_number(weight):
    row = {"text": "abc", "weight": weight}
    with pytest.raises(UserError, match="row 1 has the weight .*; accepted: a number from 0 to 1e"):
        encode_rows([row], tiny.byte_tokenizer())


def test_a_weighted_loss_is_the_weighted_mean():
    import jax.numpy as jnp

    from jaxdistill.kd.objective import kd_objective
    from jaxdistill.models.decoder import make_apply

    c = tiny.config(vocab_size=260)
    apply, params = make_apply(c), tiny.params(c)
    examples = encode_rows(rationale_rows(ROWS, 0.25), tiny.byte_tokenizer(), loss_on="completion")
    rows = pack(examples, 64, packing="none")
    objective = kd_objective(apply, None, chunk=16)
    each = [objective(params, None, jnp_batch(rows[i : i + 1], ("weights",))) for i in range(3)]
    total, count, metrics = objective(params, None, jnp_batch(rows[:]))
    want = each[0][0] + 0.25 * each[1][0] + each[2][0]
    np.testing.assert_allclose(total, want, rtol=1e-5)
    np.testing.assert_allclose(count, each[0][1] + 0.25 * each[1][1] + each[2][1])
    # The metrics are plain means.
    np.testing.assert_allclose(metrics["nll"][0], sum(e[0] for e in each), rtol=1e-5)
    assert float(metrics["nll"][1]) == sum(float(e[1]) for e in each)
    assert jnp.isfinite(total)


def jnp_batch(batch, without=()):
    import jax.numpy as jnp

    return {name: jnp.asarray(x) for name, x in batch.items() if name not in without}
