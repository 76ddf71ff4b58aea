"""Rows in the order that a curriculum asks for, and what a run says of its data."""

import json

import numpy as np
import pytest
from rich.console import Console

from jaxdistill.losses.loss import parse_loss
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.options import Distill
from jaxdistill.recipes.transfer_set import serve, transfer_set, write_counts
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny.save_model(tmp_path_factory.mktemp("model") / "m"))


def served(model, folder, **changes):
    """Serves texts of 2 to 30 tokens in random order."""
    lengths = np.random.default_rng(0).integers(1, 30, 300).tolist()
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in lengths))
    given = {"student": "m", "objective": "ce", "data": str(text), "eval_data": str(text)}
    given |= {"out": folder / "run", "seq_len": 32, "batch_size": 4, "steps": 40}
    o = Distill(**(given | changes))
    console = Console(record=True, width=300)
    found = transfer_set(o, model, [], parse_loss("ce"), console)
    return found, serve(o, found, [], [], 260), console.export_text()


@pytest.mark.parametrize("packing", ["best-fit", "wrap", "none"])
def test_short_texts_come_first_whatever_the_packing(model, tmp_path, packing):
    found, data, _ = served(model, tmp_path, packing=packing, curriculum="length")

    def longest(steps):
        return [int(data[i]["positions"].max()) + 1 for i in steps]

    # The first step may draw from the shortest fifth of the rows, steps after half the run from
    # all. Rows of packed short texts hold more of them, so a fifth of the rows is more texts.
    assert max(longest(range(2))) <= 21
    assert max(longest(range(20, 30))) >= 28
    _, plain, _ = served(model, tmp_path, packing=packing)
    assert max(int(plain[i]["positions"].max()) + 1 for i in range(2)) >= 26


def test_a_run_says_what_became_of_its_tokens(model, tmp_path):
    found, _, text = served(model, tmp_path)
    write_counts(tmp_path, found)
    counts = json.loads((tmp_path / "data.json").read_text())
    assert counts["train"]["rows"] == len(found.rows)
    assert counts["train"]["targets"] == int(found.rows[:]["loss_mask"].sum())
    assert counts["held_out"]["examples"] == 300
    for name in ("training data: ", "held-out data: "):
        assert f"{name}300 texts in " in text
