"""Every notebook runs, is paired with its script, and shows what it says."""

import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def executed(name: str, monkeypatch) -> dict:
    """Returns what a notebook's cells leave."""
    monkeypatch.syspath_prepend(str(NOTEBOOKS[0].parent))
    scope: dict = {}
    (notebook,) = [n for n in NOTEBOOKS if n.stem == name]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for cell in code_of(notebook):
            exec(cell, scope)
    plt.close("all")
    return scope


def test_every_notebook_is_run_here():
    here = Path(__file__).read_text()
    assert len(NOTEBOOKS) == 5
    assert all(f'executed("{n.stem}", monkeypatch)' in here for n in NOTEBOOKS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_pair_holds_the_same_code(notebook):
    script = notebook.with_suffix(".py").read_text()
    parts = [part.split("\n", 1) for part in script.split("\n# %%")[1:]]
    cells = [body.strip() for head, body in parts if "[markdown]" not in head]
    assert cells == [cell.strip() for cell in code_of(notebook)]


def test_four_bits_by_hand(monkeypatch):
    scope = executed("four_bits_by_hand", monkeypatch)
    errors, curves, sizes = scope["errors"], scope["curves"], scope["sizes"]
    assert errors["mse", "channel"] < errors["absmax", "channel"]
    assert errors["mse", 32] < errors["mse", 128] < errors["mse", "channel"]
    assert all(curve[-1] < 0.7 * curve[0] for curve in curves.values()), curves
    assert sizes["KD-QAT + ov-freeze"] < sizes["KD-QAT"]


def test_ov_freeze(monkeypatch):
    scope = executed("ov_freeze", monkeypatch)
    assert all(np.mean(c[-10:]) < 0.7 * c[0] for c in scope["curves"].values())
    drift = scope["drift"]
    assert min(drift["rounded"]) > 0
    assert all(drift[name][-1] < drift["rounded"][-1] for name in scope["runs"])
    start, end = scope["runs"]["ov-freeze"][1], scope["finished"]["ov-freeze"]
    for name, moved in (("v_proj", False), ("o_proj", False), ("q_proj", True)):
        before, after = (p["layers"]["self_attn"][name]["kernel"] for p in (start, end))
        assert np.array_equal(before, after) != moved


def test_objectives(monkeypatch):
    table = executed("objectives", monkeypatch)["table"]
    nll, kl, reverse, agreement = zip(*table.values(), strict=True)
    names = list(table)
    assert names[int(np.argmin(nll))] == names[int(np.argmax(kl))] == "ce"
    assert names[int(np.argmax(reverse))] == names[int(np.argmin(agreement))] == "ce"


def test_dataset_distillation(monkeypatch):
    scope = executed("dataset_distillation", monkeypatch)
    scores = scope["scores"]
    assert scope["curve"][-1] < 0.5 * scope["curve"][0]
    assert scores["learned"] > max(scores[name] for name in ("random", "herding", "k-center"))
    assert scores["full data"] > 0.97


def test_cascade_and_cost(monkeypatch):
    scope = executed("cascade_and_cost", monkeypatch)
    student, teacher = scope["tiers"]
    assert student.correct.mean() < teacher.correct.mean()
    assert np.mean(scope["kept"]) >= 0.9 and len(scope["kept"]) == 200  # the confidence stated
    assert 0.3 < np.mean(scope["shares"]) < 1
    uses = scope["uses"]
    assert uses["student"].seconds < uses["cascade"].seconds < uses["teacher"].seconds
