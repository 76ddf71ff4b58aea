"""The pictures of a cascade: accuracy against coverage, and against cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt

from jaxdistill.report.theme import Pictures, Theme, png, style


def draw_cascade(report: Mapping[str, Any], theme: Theme = "light") -> Pictures:
    """Draw what ``recipes.cascade`` returns, of its test part: ``coverage`` and ``cost``."""
    curve, alone, chosen = report["curve"], report["alone"], report["test"]
    wanted, drop = report["target_accuracy"], report["max_drop"]
    if drop is not None:
        wanted = list(alone.values())[-1]["accuracy"] - drop
    unit = "" if report["unit"] == "given" else f" ({report['unit']})"
    with plt.rc_context(style(theme)):
        coverage, left = plt.subplots(figsize=(6, 3.6))
        left.plot(curve["coverage"], curve["accuracy"], label="student and teacher")
        left.plot(curve["coverage"], curve["answered"], label="student, where it answers")
        left.set(xlabel="share that the student answers", xlim=(0, 1.02))
        cost, right = plt.subplots(figsize=(6, 3.6))
        right.plot(curve["cost"], curve["accuracy"], label="student and teacher")
        for name, tier in alone.items():
            right.plot(tier["cost"], tier["accuracy"], "o", label=f"{name} alone")
        right.set(xlabel=f"cost of a question{unit}")
        if chosen is not None:
            low, high = chosen["interval"]
            error = [[chosen["accuracy"] - low], [high - chosen["accuracy"]]]
            look = {"fmt": "*", "color": plt.rcParams["text.color"], "markersize": 11}
            left.errorbar(chosen["shares"][0], chosen["accuracy"], error, label="chosen", **look)
            right.errorbar(chosen["cost"], chosen["accuracy"], error, label="chosen", **look)
        for axes in (left, right):
            axes.axhline(wanted, color="grey", ls="--", lw=1, label="to be kept")
            axes.set_ylabel("accuracy")
            axes.legend(fontsize=8)
        return {"coverage": png(coverage), "cost": png(cost)}
