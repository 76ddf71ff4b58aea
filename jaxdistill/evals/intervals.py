"""Confidence intervals that cover as often as they say, on few items too.

`python -m benchmarks.intervals` measures the coverage.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

_RESAMPLES = 2000
_MOST = 500  # items that are resampled; with more, Student's t is as good


class Interval(NamedTuple):
    """A value and the ends of its confidence interval; NaN where there is none."""

    value: float
    low: float
    high: float

    def plain(self) -> list[float | None]:
        """Return it as JSON holds it; a number that is not there is None."""
        return [x if math.isfinite(x) else None for x in self]


NOTHING = Interval(math.nan, math.nan, math.nan)


def share_interval(right: float | int, count: float | int, confidence: float = 0.95) -> Interval:
    """Return the exact interval of a share (Clopper and Pearson 1934).

    >>> [round(float(x), 3) for x in share_interval(10, 10)]
    [1.0, 0.692, 1.0]

    Args:
        right: number of successes; not a whole number for an effective sample size.
        count: number of trials.
        confidence: of the interval.
    """
    if not count:
        return NOTHING
    tail = (1 - confidence) / 2
    low = special.betaincinv(right, count - right + 1, tail) if right > 0 else 0.0
    high = special.betaincinv(right + 1, count - right, 1 - tail) if right < count else 1.0
    return Interval(right / count, float(low), float(high))


def pooled_share_interval(
    sums: Float[np.ndarray, "N"], counts: Float[np.ndarray, "N"], confidence: float = 0.95
) -> Interval:
    """Return the interval of a share over items of several trials each, as of tokens in texts.

    Clopper and Pearson's at the effective sample size ``p (1 - p) / variance``, corrected for its
    degrees of freedom (Korn and Graubard 1998). The variance is of the ratio over items, whose
    trials are alike. A share of 0 or 1 has no variance: each item then counts as one trial.

    Args:
        sums: successes of each item.
        counts: trials of each item.
        confidence: of the interval.
    """
    sums, counts = sums[counts > 0], counts[counts > 0]
    items, trials = counts.size, float(np.sum(counts))
    if not items:
        return NOTHING
    share = float(np.sum(sums)) / trials
    if np.all(counts == 1):
        return share_interval(float(np.sum(sums)), items, confidence)
    if items == 1:
        return Interval(share, math.nan, math.nan)
    variance = _ratio(sums, counts)[1] ** 2
    size = items if not 0 < share < 1 or variance == 0 else share * (1 - share) / variance
    tail = (1 + confidence) / 2
    size *= (_t(tail, max(1.0, trials - 1)) / _t(tail, items - 1)) ** 2
    size = min(size, trials)
    return Interval(share, *share_interval(share * size, size, confidence)[1:])


def mean_interval(
    sums: Float[np.ndarray, "N"], counts: Float[np.ndarray, "N"], confidence: float = 0.95
) -> Interval:
    """Return the interval of ``sum(sums) / sum(counts)`` over items, as of nats a token over texts.

    The union of two: Student's t on a ratio (Fieller 1954), which symmetric and heavy tails need,
    and the bootstrap-t (Efron and Tibshirani 1993, chapter 12), which skewed values need. Items are
    the unit that was drawn: a long one weighs more, but is one draw. Resampling is seeded.

    Args:
        sums: of each item.
        counts: of each item, such as its target tokens; items of none are left out.
        confidence: of the interval.
    """
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not counts.size:
        return NOTHING
    value, error = _ratio(sums, counts)
    if counts.size == 1 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan)
    if error <= 1e-12 * abs(value):  # the same on every item
        return Interval(value, value, value)
    low, high = _fieller(sums, counts, confidence)
    if math.isnan(low):  # so few items of such different lengths that the mean length is unsure
        half = _t((1 + confidence) / 2, counts.size - 1) * error
        low, high = value - half, value + half
    if counts.size <= _MOST:
        tail = (1 - confidence) / 2
        first, last = np.nanquantile(_studentized(sums, counts, value), [tail, 1 - tail])
        low, high = min(low, value - last * error), max(high, value - first * error)
    return Interval(value, float(low), float(high))


def quotient_interval(
    above: Float[np.ndarray, "N"], below: Float[np.ndarray, "N"], confidence: float = 0.95
) -> Interval:
    """Return Fieller's interval of ``sum(above) / sum(below)``; all NaN where that is undefined.

    It is undefined where the denominator is not surely different from 0.
    """
    if below.size < 2:
        return NOTHING
    low, high = _fieller(above, below, confidence)
    if math.isnan(low):
        return NOTHING
    return Interval(float(np.sum(above) / np.sum(below)), low, high)


def paired_difference(
    first: Bool[np.ndarray, "N"], second: Bool[np.ndarray, "N"], confidence: float = 0.95
) -> Interval:
    """Return the difference of two shares of the same items, ``mean(first) - mean(second)``.

    It is the share that only the first has right less the share that only the second has, each
    with its exact interval, put together by ``minus`` with their multinomial correlation. Where
    McNemar's exact test (``mcnemar``) finds no difference the interval reaches 0.
    """
    n = first.size
    if not n:
        return NOTHING
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    parts = [share_interval(k, n, confidence) for k in (only_first, only_second)]
    p, q = only_first / n, only_second / n
    spread = math.sqrt(p * q * (1 - p) * (1 - q))
    value, low, high = minus(*parts, correlation=-p * q / spread if spread else 0.0)
    if mcnemar(first, second) > 1 - confidence:
        low, high = min(low, 0.0), max(high, 0.0)
    return Interval(value, max(low, -1.0), min(high, 1.0))


def mcnemar(first: Bool[np.ndarray, "N"], second: Bool[np.ndarray, "N"]) -> float:
    """Return the p-value of McNemar's exact test that two shares of the same items are equal."""
    differ = int(np.sum(first != second))
    fewer = min(int(np.sum(first & ~second)), int(np.sum(second & ~first)))
    return min(1.0, 2 * float(special.bdtr(fewer, differ, 0.5)))


def paired_quotient(
    first: Bool[np.ndarray, "N"], second: Bool[np.ndarray, "N"], confidence: float = 0.95
) -> Interval:
    """Return the quotient of two shares of the same items, ``mean(first) / mean(second)``.

    Source: Bonett and Price 2006, a hybrid of two Wilson intervals; all NaN where the second has
    none right.
    """
    n1, n2, either = int(np.sum(first)), int(np.sum(second)), int(np.sum(first | second))
    if not n2:
        return NOTHING
    z = float(special.ndtri((1 + confidence) / 2))
    spread = math.sqrt((np.sum(first != second) + 2) / ((n1 + 1) * (n2 + 1)))
    each = [math.sqrt((1 - (n + 1) / (either + 2)) / (n + 1)) for n in (n1, n2)]
    z *= spread / sum(each)
    (low1, high1), (low2, high2) = (_wilson(n, either, z) for n in (n1, n2))
    return Interval(n1 / n2, low1 / high2, high1 / low2 if low2 > 0 else math.inf)


def minus(first: Interval, second: Interval, correlation: float = 0.0) -> Interval:
    """Return the difference of two estimates from their own intervals.

    Source: the method of variance estimates recovery, Zou and Donner 2008.
    """
    value = first.value - second.value

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a + b * b - 2 * correlation * a * b))

    return Interval(
        value,
        value - reach(first.value - first.low, second.high - second.value),
        value + reach(first.high - first.value, second.value - second.low),
    )


def detectable(found: Interval, items: int, confidence: float = 0.95, power: float = 0.8) -> float:
    """Return the true value that would have been found to be above 0 with so much ``power``.

    Args:
        found: its interval; how far that reaches below the value tells the standard error.
        items: number of items it is of.
        confidence: of the interval.
        power: probability of finding it.
    """
    if items < 2:
        return math.inf
    at, more = _t((1 + confidence) / 2, items - 1), _t(power, items - 1)
    return float((found.value - found.low) * (1 + more / at))


def _t(probability: float, freedom: float | int) -> float:
    """Return Student's quantile."""
    return float(special.stdtrit(freedom, probability))


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return total over total and its standard error by linearization."""
    total = float(np.sum(counts))
    value = float(np.sum(sums)) / total
    rest, n = sums - value * counts, counts.size
    return value, math.sqrt(float(rest @ rest) * n / max(1, n - 1)) / total


def _fieller(above: np.ndarray, below: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the quotients that a t-test on ``above - quotient * below`` does not reject."""
    n = below.size
    t = _t((1 + confidence) / 2, n - 1)
    a, b, spread = float(np.mean(above)), float(np.mean(below)), np.cov(above, below) * t * t / n
    square, middle, rest = b * b - spread[1, 1], a * b - spread[0, 1], a * a - spread[0, 0]
    if square <= 1e-12 * b * b:
        return math.nan, math.nan
    root = math.sqrt(max(0.0, middle * middle - square * rest))
    return float((middle - root) / square), float((middle + root) / square)


@functools.lru_cache(maxsize=16)
def _resamples(items: int) -> Float[np.ndarray, "R N"]:
    """Return how often each item is drawn in each resample."""
    random = np.random.default_rng(items)
    return random.multinomial(items, np.full(items, 1 / items), _RESAMPLES).astype(np.float64)


def _studentized(sums: np.ndarray, counts: np.ndarray, value: float) -> np.ndarray:
    """Return each resample's distance from the value in its own standard errors."""
    n, rest = counts.size, sums - value * counts
    moments = np.stack([rest, counts, rest * rest, rest * counts, counts * counts], axis=1)
    r, c, rr, rc, cc = (_resamples(n) @ moments).T
    away = r / c
    variance = (rr - 2 * away * rc + away * away * cc) * n / (n - 1) / (c * c)
    # A resample of one item, drawn n times, has no spread and tells nothing.
    spread = np.where(variance > 1e-9 * np.median(variance), variance, np.nan)
    with np.errstate(invalid="ignore"):
        return away / np.sqrt(spread)


def _wilson(right: int, count: int, z: float) -> tuple[float, float]:
    share = right / count
    middle, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, float((middle - half) / scale)), min(1.0, float((middle + half) / scale))
