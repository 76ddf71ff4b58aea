"""The picture of named slices: each model's metric with its interval, slice by slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from jaxdistill.report.theme import Pictures, Theme, png, style

_MOST = 30  # slices drawn


def draw_slices(
    reports: Mapping[str, Mapping[str, Any]], by: str, theme: Theme = "light"
) -> Pictures:
    """Draw ``SliceReport.plain`` by slice: one mark a model, its 95 % interval a line.

    Of more than 30 slices those are drawn that lost most.
    """
    models = list(dict.fromkeys(m for r in reports.values() for m in r["metrics"]))
    names = list(reports)
    if len(names) > _MOST:
        lost = {n: reports[n]["derived"].get("lost", [None])[0] for n in names}
        known = [n for n in names if lost[n] is not None]
        worst = sorted(known, key=lambda n: float(lost[n]), reverse=True)[:_MOST]
        names = [n for n in names if n in set(worst)]
    with plt.rc_context(style(theme)):
        figure, axes = plt.subplots(figsize=(6, 1.6 + 0.24 * len(names) * (1 + len(models))))
        for number, model in enumerate(models):
            offset = 0.22 * (number - (len(models) - 1) / 2)
            found = [(i, reports[n]["metrics"].get(model, {}).get(by)) for i, n in enumerate(names)]
            known = [(i, *v) for i, v in found if v is not None and v[0] is not None]
            if not known:
                continue
            places, value, low, high = np.array(known, float).T
            # One item has no interval; a percentile interval may be to one side of the value.
            ends = np.nan_to_num(np.abs([value - low, high - value]))
            axes.errorbar(value, places + offset, xerr=ends, fmt="o", ms=5, label=model)
        said = [f"{n[:40]} ({reports[n]['items']})".replace("$", r"\$") for n in names]
        axes.set_yticks(range(len(names)), said)
        axes.set(xlabel=by, title="by slice (items), with 95 % intervals")
        axes.grid(axis="x")
        axes.invert_yaxis()
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        return {"slices": png(figure)}
