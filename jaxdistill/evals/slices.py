"""Every metric on every named slice, with intervals, and the slice that lost most."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxdistill.errors import UserError
from jaxdistill.evals.intervals import (
    Interval,
    detectable,
    mean_interval,
    minus,
    paired_difference,
    paired_quotient,
    pooled_share_interval,
    quotient_interval,
)
from jaxdistill.train.slices import WHOLE

# By metric, of each item: (sum, count); the metric is the sums' total over the counts'.
ItemSums = Mapping[str, tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]]
_DOWN = ("acc", "acc_norm", "agreement")  # metrics that are better when greater


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceReport:
    """What models do on one slice.

    Attributes:
        items: number of items in it.
        metrics: by model and metric.
        derived: by name, what compares models: ``retention`` (student over teacher, of
            accuracies), ``gap_recovered`` ((PTQ - student) / (PTQ - teacher)), ``lost`` (how much
            worse the student is than the teacher) and ``excess`` (how much more was lost than on
            all other items; its interval is widened for the number of slices).
        detectable: the excess that a slice of this size shows in 4 of 5 draws; None where none.
    """

    items: int
    metrics: Mapping[str, Mapping[str, Interval]]
    derived: Mapping[str, Interval]
    detectable: float | None = None

    def plain(self) -> dict[str, Any]:
        """Return it as JSON holds it; an interval is a list of value, low and high.

        A number that is not there (a share of nothing, a mean over nothing) is None.
        """
        return {
            "items": self.items,
            "metrics": {
                model: {k: v.plain() for k, v in of.items()} for model, of in self.metrics.items()
            },
            "derived": {k: v.plain() for k, v in self.derived.items()},
            "detectable": self.detectable,
        }

    @classmethod
    def from_plain(cls, found: Mapping[str, Any]) -> SliceReport:
        """Return the report that ``plain`` wrote."""

        def read(values: Mapping[str, Any]) -> dict[str, Interval]:
            return {
                k: Interval(*(math.nan if x is None else x for x in v)) for k, v in values.items()
            }

        metrics = {model: read(of) for model, of in found["metrics"].items()}
        return cls(
            items=found["items"],
            metrics=metrics,
            derived=read(found["derived"]),
            detectable=found["detectable"],
        )


def report_slices(
    results: Mapping[str, ItemSums],
    masks: Mapping[str, Bool[np.ndarray, "N"]],
    *,
    by: str,
    confidence: float = 0.95,
) -> dict[str, SliceReport]:
    """Return what models do on each slice, and on all items, with the intervals of `intervals`.

    What compares models is paired: computed of their differences on the same items. A slice without
    items is left out.

    Args:
        results: by model, of the same items in the same order. The names ``teacher``, ``student``
            and ``ptq`` (or ``start``) are compared where they are there.
        masks: of each slice.
        by: the metric that models are compared by: an accuracy, or a loss such as ``nll`` or
            ``kl``.
        confidence: of the intervals.

    Raises:
        UserError: there is no item, or the confidence is impossible.
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence must be between 0 and 1, got {confidence}")
    items = len(next(iter(next(iter(results.values())).values()))[0])
    if not items:
        raise UserError("no item given to evaluate; accepted: one or more")
    slices = {name: mask for name, mask in masks.items() if mask.any()}
    wide = 1 - (1 - confidence) / max(1, len(slices))  # Bonferroni
    reports = {}
    for name, mask in {WHOLE: np.ones(items, bool), **slices}.items():
        here = {model: _items(sums, mask) for model, sums in results.items()}
        derived = dict(compared(here, by, confidence))
        least = None
        if name != WHOLE and "lost" in derived and not mask.all():
            rest = {model: _items(sums, ~mask) for model, sums in results.items()}
            excess = minus(lost(here, by, wide), lost(rest, by, wide))
            derived["excess"] = excess
            least = detectable(excess, int(np.sum(mask)), wide)
            least = least if math.isfinite(least) else None
        reports[name] = SliceReport(
            items=int(np.sum(mask)),
            metrics={
                model: {m: metric_interval(m, s, c, confidence) for m, (s, c) in sums.items()}
                for model, sums in here.items()
            },
            derived=derived,
            detectable=least,
        )
    return reports


def metric_interval(
    name: str,
    sums: Float[np.ndarray, "N"],
    counts: Float[np.ndarray, "N"],
    confidence: float = 0.95,
) -> Interval:
    """Return a metric and its interval from each item's (sum, count)."""
    if name in _DOWN:
        return pooled_share_interval(sums, counts, confidence)
    return mean_interval(sums, counts, confidence)


def difference(name: str, first: ItemSums, second: ItemSums, confidence: float = 0.95) -> Interval:
    """Return how much greater a metric of the first is than of the second on the same items."""
    (a, counts), (b, _) = first[name], second[name]
    if name in _DOWN and np.all(counts == 1):
        return paired_difference(a > 0, b > 0, confidence)
    return mean_interval(a - b, counts, confidence)


def lost(results: Mapping[str, ItemSums], by: str, confidence: float = 0.95) -> Interval:
    """Return how much worse the student is than the teacher."""
    student, teacher = results["student"], results["teacher"]
    if by in _DOWN:
        return difference(by, teacher, student, confidence)
    return difference(by, student, teacher, confidence)


def gap_recovered(
    start: ItemSums,
    student: ItemSums,
    by: str,
    teacher: ItemSums | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Return the share of the gap from teacher to start that training closed.

    ``(start - student) / (start - teacher)``; NaN where start and teacher cannot be told apart.

    Args:
        start: the student before training.
        student: after training.
        by: the metric.
        teacher: None where its metric is 0, as the KL to itself.
        confidence: of the interval.
    """
    goal = 0.0 if teacher is None else teacher[by][0]
    return quotient_interval(start[by][0] - student[by][0], start[by][0] - goal, confidence)


def compared(
    results: Mapping[str, ItemSums], by: str, confidence: float = 0.95
) -> dict[str, Interval]:
    """Return what compares models, see ``SliceReport.derived``; without ``excess``."""
    derived = {}
    if not all(by in results.get(name, {}) for name in ("student", "teacher")):
        return derived
    student, teacher = results["student"], results["teacher"]
    derived["lost"] = lost(results, by, confidence)
    if by in _DOWN:
        derived["retention"] = paired_quotient(student[by][0] > 0, teacher[by][0] > 0, confidence)
    start = results.get("ptq", results.get("start"))
    if start is not None:
        derived["gap_recovered"] = gap_recovered(start, student, by, teacher, confidence)
    return derived


def _items(sums: ItemSums, mask: np.ndarray) -> dict[str, Any]:
    return {name: (s[mask], c[mask]) for name, (s, c) in sums.items()}


def worst_slice(reports: Mapping[str, SliceReport]) -> str | None:
    """Return the slice that lost most; None where none surely lost more than the other items.

    That is: the low end of its ``excess`` is above 0, and so is that of ``lost``.
    """
    sure = {
        name: report.derived["lost"].value
        for name, report in reports.items()
        if "excess" in report.derived
        if report.derived["excess"].low > 0 and report.derived["lost"].low > 0
    }
    return max(sure, key=lambda name: sure[name]) if sure else None


def slice_warning(reports: Mapping[str, SliceReport], by: str) -> str | None:
    """Say which slice lost most, and what to do; None where none stands out."""
    name = worst_slice(reports)
    if name is None:
        return None
    worst, excess = (reports[name].derived[k] for k in ("lost", "excess"))
    return (
        f"the slice {name!r} ({reports[name].items} items) lost most: {by} is {worst.value:.3f}"
        f"{_unit(by)} worse than the teacher's, {excess.value:.3f} ({excess.low:.3f} to "
        f"{excess.high:.3f}) more than on the other items; give more of it, as with --mix FILE:0.1"
    )


def slice_power(reports: Mapping[str, SliceReport], by: str) -> str | None:
    """Say which slices are too small to show twice the other items' loss, and what they can show.

    None where all can, or nothing was lost.
    """
    small = []
    for name, report in reports.items():
        if "excess" not in report.derived:
            continue
        excess, least = report.derived["excess"], report.detectable
        others = report.derived["lost"].value - excess.value
        if excess.low > 0 or others <= 0 or (least is not None and least <= others):
            continue
        if least is None:
            small.append(f"{name!r} ({report.items} items: none)")
            continue
        needed = math.ceil(report.items * (least / others) ** 2)
        small.append(
            f"{name!r} ({report.items} items: {least:.3f} more than the others' "
            f"{others:.3f}{_unit(by)}; about {needed:,} items would do)"
        )
    if not small:
        return None
    return (
        "too small to show a loss twice the others'; in 4 of 5 draws of the items a slice shows "
        f"only: {', '.join(small)}; give more held-out text"
    )


def _unit(by: str) -> str:
    return "" if by in _DOWN else " nats a token"
