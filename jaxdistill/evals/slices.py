"""Every metric on every named slice, with bootstrap intervals, and the slice that lost most."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxdistill.errors import UserError

# By metric, of each item: (sum, count); the metric is the sums' total over the counts'.
ItemSums = Mapping[str, tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]]
WHOLE = "all"  # the slice that every item is in
_AT_ONCE = 2**22  # numbers of a block of resamples
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
            accuracies), ``gap_recovered`` ((PTQ - student) / (PTQ - teacher), of losses) and
            ``lost`` (how much worse the student is than the teacher).
    """

    items: int
    metrics: Mapping[str, Mapping[str, Interval]]
    derived: Mapping[str, Interval]

    def plain(self) -> dict[str, Any]:
        """Return it as JSON holds it; an interval is a list of value, low and high."""
        return {
            "items": self.items,
            "metrics": {m: {k: list(v) for k, v in of.items()} for m, of in self.metrics.items()},
            "derived": {k: list(v) for k, v in self.derived.items()},
        }


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
    found = {}
    for name, mask in {WHOLE: np.ones(items, bool), **masks}.items():
        if mask.any():
            drawn = _Resampled(np.flatnonzero(mask), resamples, np.random.default_rng(seed))
            found[name] = _report(results, drawn, by, confidence)
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


def _report(
    results: Mapping[str, ItemSums], drawn: _Resampled, by: str, confidence: float
) -> SliceReport:
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)

    def interval(values: np.ndarray) -> Interval:
        known = values[1:][np.isfinite(values[1:])]
        low, high = np.quantile(known, tails) if known.size else (np.nan, np.nan)
        return Interval(float(values[0]), float(low), float(high))

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
    return SliceReport(
        items=drawn.index.size,
        metrics={m: {k: interval(v) for k, v in of.items()} for m, of in means.items()},
        derived={name: interval(values) for name, values in derived.items()},
    )


def worst_slice(reports: Mapping[str, SliceReport]) -> str | None:
    """Return the slice that lost most; None where none surely lost more than all items together.

    That is: the low end of what it lost is above what all lost.
    """
    if WHOLE not in reports or "lost" not in reports[WHOLE].derived:
        return None
    whole = reports[WHOLE].derived["lost"].value
    lost = {name: report.derived["lost"] for name, report in reports.items() if name != WHOLE}
    sure = {name: found.value for name, found in lost.items() if found.low > max(whole, 0.0)}
    return max(sure, key=lambda name: sure[name]) if sure else None


def slice_warning(reports: Mapping[str, SliceReport], by: str) -> str | None:
    """Say which slice lost most, and what to do; None where none stands out."""
    name = worst_slice(reports)
    if name is None:
        return None
    unit = "" if by in _DOWN else " nats a token"
    here, whole = (reports[n].derived["lost"] for n in (name, WHOLE))
    return (
        f"the slice {name!r} ({reports[name].items} items) lost most: {by} is {here.value:.3f}"
        f"{unit} worse than the teacher's ({here.low:.3f} to {here.high:.3f}), {whole.value:.3f} "
        "over all; give more of it, as with --mix FILE:0.1"
    )
