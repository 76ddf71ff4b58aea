"""Held-out text of few rows, and rows that have nothing to learn from."""

import datasets
import numpy as np
import pytest
from rich.console import Console

from jaxdistill.evals.perplexity import make_evaluator
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows, split_rows
from jaxdistill.train.encode import encode_rows
from tests import tiny
from tests.errors import error_of


def texts(*rows: str) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"text": text} for text in rows])


@pytest.mark.parametrize(
    "rows",
    [
        ["one two three four five six seven eight nine ten " * 20],
        ["a longer text of some words. " * 30, "x"],
        ["鳥" * 400],
        ["words of a first text " * 9, "", "words of a second text " * 3],
    ],
)
def test_few_texts_are_split_by_their_length(rows):
    console = Console(record=True, width=200)
    train, held = split_rows(texts(*rows), "story.txt", console)
    total = sum(map(len, rows))
    assert "".join(train["text"]) + "".join(held["text"]) == "".join(rows)
    assert 0 < len("".join(held["text"])) <= total / 20 + 1
    assert len(train) and "story.txt" in console.export_text()


def test_twenty_rows_hold_out_the_twentieth():
    train, held = split_rows(texts(*map(str, range(40))), "x")
    assert held["text"] == ["19", "39"] and len(train) == 38


def test_few_chats_hold_out_the_last():
    chats = [{"instruction": str(i), "output": "yes"} for i in range(3)]
    train, held = split_rows(datasets.Dataset.from_list(chats), "x")
    assert held["instruction"] == ["2"] and len(train) == 2
    assert "1 row" in error_of(split_rows, datasets.Dataset.from_list(chats[:1]), "x")


def test_answers_beyond_every_row_are_refused(tmp_path):
    model = load_model(tiny.save_model(tmp_path / "m"))
    rows = [{"instruction": "blah " * 40, "output": "yes"}] * 5
    message = error_of(pack_rows, rows, model, 32, "completion", name="training data")
    assert "training data" in message and "--seq-len 32" in message and "5 texts" in message
    console = Console(record=True, width=300)
    rows = [*rows, {"instruction": "hm", "output": "y" * 20}]
    packed = pack_rows(rows, model, 64, "completion", name="training data", console=console)
    beyond = 5 * len(encode_rows(rows[:1], model.text_tokenizer())[0].tokens)
    assert len(packed) == 1 and packed.counts.dropped == beyond
    assert "dropped" in console.export_text()


def test_held_out_means_are_over_targets_only(tmp_path):
    """Padding, in whatever packing, changes neither the mean nor the count."""
    model = load_model(tiny.save_model(tmp_path / "m"))
    rows = [{"text": "a" * n} for n in (3, 20, 9, 30, 12)]
    evaluate = make_evaluator(kd_objective(model.apply_fn(), None, "ce"))
    results = []
    for packing, batch_size in (("best-fit", 2), ("none", 4)):
        packed = pack_rows(rows, model, 32, packing=packing)
        results.append(evaluate(model.params, None, eval_batches_of(packed, batch_size)))
    assert results[0]["tokens"] == results[1]["tokens"] == sum(len(r["text"]) for r in rows)
    np.testing.assert_allclose(results[0]["nll"], results[1]["nll"], rtol=1e-5)
