"""The pictures of a run: loss, divergence from the teacher, and the gap recovered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from jaxdistill._disk import write_whole
from jaxdistill.evals.perplexity import recovered
from jaxdistill.report.theme import Pictures, Theme, png, style

Rows = Sequence[Mapping[str, float | int]]
Evaluations = Mapping[str, Mapping[str, Any]]


def _curve(axes: Any, rows: Rows, name: str, label: str, **look: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **look)


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure, close it, and return its path."""
    write_whole(path, png(figure))
    return path


def draw_training(
    runs: Mapping[str, Rows], results: Evaluations, theme: Theme = "light"
) -> Pictures:
    """Draw ``loss``, ``kl`` and ``recovered``; without a teacher in the results only the loss.

    Args:
        runs: label to the rows of its ``metrics.jsonl``.
        results: label to its evaluation; ``"teacher"`` and ``"ptq"`` (of a float student
            ``"start"``) are the references, every other label is a trained student.
        theme: colours of surface and text.
    """
    made = {}
    start = "ptq" if "ptq" in results else "start"
    called = {"ptq": "PTQ", "start": "start"}[start]
    pictures = [("loss", "training loss", "loss (nats a token)")]
    if "teacher" in results and "kl" in results.get(start, {}):
        pictures.append(("kl", "divergence from the teacher", "KL (nats a token)"))
    with plt.rc_context(style(theme)):
        for name, title, unit in pictures:
            figure, axes = plt.subplots(figsize=(6, 3.6))
            for label, rows in runs.items():
                _curve(axes, rows, name, f"{label}, training batches", alpha=0.8)
                if name == "kl":
                    _curve(axes, rows, "eval/kl", f"{label}, held-out probe", marker="o")
            if name == "kl":
                axes.axhline(
                    results[start]["kl"], color="grey", ls="--", label=f"{called}, held out"
                )
            axes.set(xlabel="step", ylabel=unit, title=title, ylim=(0, None))
            axes.legend(fontsize=8)
            made[name] = png(figure)
        if len(pictures) > 1:
            made["recovered"] = _recovered(results, start, called)
    return made


def _recovered(results: Evaluations, start: str, called: str) -> bytes:
    """Draw the share of the gap to the teacher that each student closed, by KL and by NLL."""
    students = [x for x in results if x != start and not x.startswith("teacher")]
    teacher, ptq = results["teacher"], results[start]
    figure, axes = plt.subplots(figsize=(6, 1.6 + 0.8 * len(students)))
    low, high = 0.0, 0.0
    for offset, (name, goal) in ((-0.2, ("kl", 0.0)), (0.2, ("nll", teacher["nll"]))):
        shares = [
            100 * recovered(ptq[name], results[s][name], goal)
            if results[s].get("gap_recovered", {}).get(name, 0) is not None
            else 0.0  # teacher and start cannot be told apart: no bar
            for s in students
        ]
        low, high = min(low, *shares), max(high, *shares)
        places = [i + offset for i in range(len(students))]
        bars = axes.barh(places, shares, height=0.36, label=f"by {name.upper()}")
        axes.bar_label(bars, fmt="%.1f %%", fontsize=8, padding=2)
    axes.axvline(100, color="grey", ls="--", lw=1)
    axes.set_yticks(range(len(students)), students)
    axes.set(
        xlabel=f"gap from {called} to teacher recovered (%)",
        xlim=(min(0, 1.2 * low), max(125, 1.2 * high)),
    )
    axes.invert_yaxis()
    axes.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return png(figure)
