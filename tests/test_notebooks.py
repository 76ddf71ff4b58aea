"""Every notebook runs, is paired with its script, and shows what it says."""

import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_pair_holds_the_same_code(notebook):
    script = notebook.with_suffix(".py").read_text()
    parts = [part.split("\n", 1) for part in script.split("\n# %%")[1:]]
    cells = [body.strip() for head, body in parts if "[markdown]" not in head]
    assert cells == [cell.strip() for cell in code_of(notebook)]


def test_four_bits_by_hand():
    (notebook,) = [n for n in NOTEBOOKS if n.stem == "four_bits_by_hand"]
    scope: dict = {}
    with jax.numpy_dtype_promotion("standard"):
        for cell in code_of(notebook):
            exec(cell, scope)
    plt.close("all")
    errors, curves, sizes = scope["errors"], scope["curves"], scope["sizes"]
    assert errors["mse", "channel"] < errors["absmax", "channel"]
    assert errors["mse", 32] < errors["mse", 128] < errors["mse", "channel"]
    assert all(curve[-1] < 0.7 * curve[0] for curve in curves.values()), curves
    assert sizes["KD-QAT + ov-freeze"] < sizes["KD-QAT"]
