"""The picture of a cascade: accuracy against coverage, and against cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from jaxdistill.report.plots import save_figure


def plot_cascade(path: Path, report: Mapping[str, Any]) -> Path:
    """Draw what ``recipes.cascade`` returns, of its test part; return the path."""
    curve, alone, target = report["curve"], report["alone"], report["target_accuracy"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    left.plot(curve["coverage"], curve["accuracy"], label="student and teacher")
    left.plot(curve["coverage"], curve["answered"], label="student, where it answers")
    left.set(xlabel="share that the student answers", ylabel="accuracy", xlim=(0, 1))
    unit = "" if report["unit"] == "given" else f" ({report['unit']})"
    right.plot(curve["cost"], curve["accuracy"], label="student and teacher")
    for name, tier in alone.items():
        right.plot(tier["cost"], tier["accuracy"], "o", label=f"{name} alone")
    right.set(xlabel=f"cost of a question{unit}")
    if report["test"] is not None:
        there = report["test"]
        low, high = there["interval"]
        error = [[there["accuracy"] - low], [high - there["accuracy"]]]
        style = {"fmt": "*", "color": "black", "markersize": 11, "label": "chosen"}
        left.errorbar(there["shares"][0], there["accuracy"], yerr=error, **style)
        right.errorbar(there["cost"], there["accuracy"], yerr=error, **style)
    for axes in (left, right):
        axes.axhline(target, color="grey", ls="--", lw=1, label="target")
        axes.legend(fontsize=7)
    return save_figure(figure, path)
