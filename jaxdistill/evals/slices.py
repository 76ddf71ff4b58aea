"""Every metric on every named slice, with bootstrap intervals, and the slice that lost most."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxdistill.errors import UserError
from jaxdistill.train.slices import WHOLE

# By metric, of each item: (sum, count); the metric is the sums' total over the counts'.
ItemSums = Mapping[str, tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]]
_AT_ONCE = 2**22  # numbers of a block of resamples
LEAST_ITEMS = 10  # of a slice that is named as the one that lost most
_DOWN = ("acc", "acc_norm", "agreement")  # metrics that are better when greater


class Interval(NamedTuple):
    """Hold a value and the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceReport:
    """Hold what models do on one slice.

    Attributes:
        items: how many are in it.
        metrics: by model and metric.
        derived: by metric, what compares models: ``retention`` (student over teacher, of
            accuracies), ``gap_recovered`` ((PTQ - student) / (PTQ - teacher), of losses),
            ``lost`` (how much worse the student is than the teacher) and ``excess`` (how much more
            was lost than on all other items; its interval is widened for the number of slices).
    """

    items: int
    metrics: Mapping[str, Mapping[str, Interval]]
    derived: Mapping[str, Interval]

    def plain(self) -> dict[str, Any]:
        """Return it as JSON holds it; an interval is a list of value, low and high.

        A number that is not there (a share of nothing, a mean over nothing) is None.
        """

        def known(found: Mapping[str, Interval]) -> dict[str, list[float | None]]:
            return {k: [x if math.isfinite(x) else None for x in v] for k, v in found.items()}

        return {
            "items": self.items,
            "metrics": {model: known(of) for model, of in self.metrics.items()},
            "derived": known(self.derived),
        }

    @classmethod
    def from_plain(cls, found: Mapping[str, Any]) -> SliceReport:
        """Return the report that ``plain`` wrote."""

        def read(values: Mapping[str, Any]) -> dict[str, Interval]:
            return {
                k: Interval(*(math.nan if x is None else x for x in v)) for k, v in values.items()
            }

        metrics = {model: read(of) for model, of in found["metrics"].items()}
        return cls(items=found["items"], metrics=metrics, derived=read(found["derived"]))


def report_slices(
    results: Mapping[str, ItemSums],
    masks: Mapping[str, Bool[np.ndarray, "N"]],
    *,
    by: str,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, SliceReport]:
    """Return what models do on each slice, and on all items.

    Intervals are percentiles of the bootstrap (Efron 1979) over a slice's items: all models and
    metrics are computed on the same resampled items, so that what compares them has the interval of
    paired differences. A slice without items is left out.

    Args:
        results: by model, of the same items in the same order. The names ``teacher``, ``student``
            and ``ptq`` (or ``start``) are compared where they are there.
        masks: of each slice.
        by: the metric that models are compared by: an accuracy, or a loss such as ``nll`` or
            ``kl``.
        confidence: of the intervals.
        resamples: of each slice.
        seed: of the resampling.

    Raises:
        UserError: there is no item, or the number of resamples or the confidence is impossible.
    """
    if resamples < 2 or not 0 < confidence < 1:
        raise UserError(
            f"{resamples} resamples and confidence {confidence} given; accepted: 2 or more, and "
            "between 0 and 1"
        )
    items = len(next(iter(next(iter(results.values())).values()))[0])
    if not items:
        raise UserError("no item given to evaluate; accepted: one or more")
    kept = {name: mask for name, mask in masks.items() if mask.any()}
    found, lost = {}, {}
    for name, mask in {WHOLE: np.ones(items, bool), **kept}.items():
        drawn = _Resampled(np.flatnonzero(mask), resamples, np.random.default_rng(seed))
        found[name], lost[name] = _report(results, drawn, by, confidence)
        if name != WHOLE and lost[name] is not None and not mask.all():
            rest = _Resampled(np.flatnonzero(~mask), resamples, np.random.default_rng([seed, 1]))
            excess = lost[name] - _report(results, rest, by, confidence)[1]
            wide = 1 - (1 - confidence) / len(kept)  # Bonferroni
            derived = {**found[name].derived, "excess": _interval(excess, wide)}
            found[name] = dataclasses.replace(found[name], derived=derived)
    return found


class _Resampled:
    """Give a slice's totals: first of its own items, then of each resample of them."""

    def __init__(self, index: np.ndarray, resamples: int, rng: np.random.Generator) -> None:
        self.index, self.resamples = index, resamples
        n = index.size
        step = max(1, _AT_ONCE // n)
        self.blocks = [
            rng.multinomial(n, np.full(n, 1 / n), min(step, resamples - at)).astype(np.float32)
            for at in range(0, resamples, step)
        ]

    def means(self, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return total sums over total counts, ``[1 + resamples]``; NaN where nothing counts."""
        both = np.stack([sums, counts], axis=1)[self.index].astype(np.float64)
        drawn = np.concatenate([both.sum(0)[None], *(block @ both for block in self.blocks)])
        with np.errstate(invalid="ignore", divide="ignore"):
            return drawn[:, 0] / drawn[:, 1]


def _interval(values: np.ndarray, confidence: float) -> Interval:
    """Return the first value, and the percentiles of the others that are finite."""
    known = values[1:][np.isfinite(values[1:])]
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    low, high = np.quantile(known, tails) if known.size else (np.nan, np.nan)
    return Interval(float(values[0]), float(low), float(high))


def _report(
    results: Mapping[str, ItemSums], drawn: _Resampled, by: str, confidence: float
) -> tuple[SliceReport, Any]:
    """Return a slice's report, and what was lost on it and on its resamples."""
    means = {
        model: {metric: drawn.means(*pair) for metric, pair in of.items()}
        for model, of in results.items()
    }
    derived = {}
    own, best, start, ptq = (
        means.get(m, {}).get(by) for m in ("student", "teacher", "start", "ptq")
    )
    start = start if ptq is None else ptq
    with np.errstate(invalid="ignore", divide="ignore"):
        if own is not None and best is not None:
            derived["lost"] = best - own if by in _DOWN else own - best
            if by in _DOWN:
                derived["retention"] = own / best
            if start is not None:
                derived["gap_recovered"] = (start - own) / (start - best)
    report = SliceReport(
        items=drawn.index.size,
        metrics={
            m: {k: _interval(v, confidence) for k, v in of.items()} for m, of in means.items()
        },
        derived={name: _interval(values, confidence) for name, values in derived.items()},
    )
    return report, derived.get("lost")


def worst_slice(reports: Mapping[str, SliceReport]) -> str | None:
    """Return the slice that lost most; None where none surely lost more than the other items.

    That is: the low end of its ``excess`` is above 0, and so is what it lost. Slices of fewer than
    ``LEAST_ITEMS`` are not named, since the bootstrap of so few is too narrow.
    """
    sure = {
        name: report.derived["lost"].value
        for name, report in reports.items()
        if name != WHOLE and report.items >= LEAST_ITEMS and "excess" in report.derived
        if report.derived["excess"].low > 0 and report.derived["lost"].low > 0
    }
    return max(sure, key=lambda name: sure[name]) if sure else None


def slice_warning(reports: Mapping[str, SliceReport], by: str) -> str | None:
    """Say which slice lost most, and what to do; None where none stands out."""
    name = worst_slice(reports)
    if name is None:
        return None
    unit = "" if by in _DOWN else " nats a token"
    lost, excess = (reports[name].derived[k] for k in ("lost", "excess"))
    return (
        f"the slice {name!r} ({reports[name].items} items) lost most: {by} is {lost.value:.3f}"
        f"{unit} worse than the teacher's, {excess.value:.3f} ({excess.low:.3f} to "
        f"{excess.high:.3f}) more than on the other items; give more of it, as with --mix FILE:0.1"
    )
