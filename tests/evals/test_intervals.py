"""Intervals: closed forms, scipy's own, and coverage by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxdistill.evals.intervals import (
    Interval,
    mcnemar,
    mean_interval,
    minus,
    paired_difference,
    paired_quotient,
    pooled_share_interval,
    quotient_interval,
    share_interval,
)


@pytest.mark.parametrize(("right", "count"), [(10, 10), (0, 5), (9, 10), (423, 1000)])
def test_a_share_has_scipys_exact_interval(right, count):
    low, high = stats.binomtest(right, count).proportion_ci(0.95, "exact")
    assert share_interval(right, count) == pytest.approx((right / count, low, high))
    one = np.ones(count)
    pooled = pooled_share_interval((np.arange(count) < right).astype(float), one)
    assert pooled == share_interval(right, count)


@pytest.mark.parametrize(("n", "p"), [(5, 0.5), (10, 0.9), (10, 0.99), (100, 0.9), (1000, 0.99)])
def test_the_exact_interval_of_a_share_covers_at_least_as_often_as_it_says(n, p):
    """By the binomial distribution itself: no simulation."""
    covers = [share_interval(k, n).low <= p <= share_interval(k, n).high for k in range(n + 1)]
    assert stats.binom.pmf(np.flatnonzero(covers), n, p).sum() >= 0.95


def coverage(draw, interval, truth, times=300):
    random = np.random.default_rng(0)
    found = [interval(*draw(random)) for _ in range(times)]
    return np.mean([f.low - 1e-12 <= truth <= f.high + 1e-12 for f in found])


NATS = {
    "normal": lambda r, n: r.normal(0.1, 0.2, n),
    "skewed": lambda r, n: r.exponential(0.1, n),
    "heavy": lambda r, n: 0.1 + 0.1 * r.standard_t(3, n),
}


@pytest.mark.parametrize("n", [5, 10, 30])
@pytest.mark.parametrize("kind", NATS)
@pytest.mark.parametrize("lengths", ["equal", "unequal"])
def test_the_interval_of_nats_a_token_covers(kind, lengths, n):
    def draw(r):
        counts = np.ones(n) if lengths == "equal" else 1 + np.round(r.lognormal(4, 0.6, n))
        return NATS[kind](r, n) * counts, counts

    assert coverage(draw, mean_interval, 0.1) >= 0.925


def test_with_equal_counts_and_many_items_it_is_students_t():
    x = np.random.default_rng(1).normal(2.0, 0.5, 800)
    low, high = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert mean_interval(10 * x, np.full(800, 10.0)) == pytest.approx((x.mean(), low, high))


@pytest.mark.parametrize("n", [5, 10, 30, 100])
@pytest.mark.parametrize(("first", "second"), [(0.1, 0.1), (0.08, 0.02), (0.3, 0.05)])
def test_the_paired_difference_and_quotient_cover(n, first, second):
    """Shares that only the first, and only the second, has right."""

    def draw(r):
        cell = r.choice(4, n, p=[0.6 - first, first, second, 0.4 - second])
        return cell <= 1, (cell == 0) | (cell == 2)

    assert coverage(draw, paired_difference, first - second) >= 0.94
    quotient, random = 0.6 / (0.6 - first + second), np.random.default_rng(1)
    found = [paired_quotient(*draw(random)) for _ in range(300)]  # NaN where undefined
    assert np.mean([not (f.high < quotient or f.low > quotient) for f in found]) >= 0.92


def test_a_difference_that_mcnemar_does_not_find_reaches_zero():
    first, second = np.arange(12) < 9, np.arange(12) < 4  # five differ, all one way: p = 1/16
    assert mcnemar(first, second) == pytest.approx(2 / 2**5)
    assert paired_difference(first, second).low <= 0
    first = np.arange(12) < 10  # six: p = 1/32
    assert mcnemar(first, second) == pytest.approx(2 / 2**6)
    assert paired_difference(first, second).low > 0
    alike = paired_difference(first, first)
    assert alike.value == 0 and alike.low < -0.2 and alike.high > 0.2  # 12 items know no more


@pytest.mark.parametrize("items", [10, 40])
def test_a_share_of_tokens_counts_texts_not_tokens(items):
    """Tokens of a text are alike: the interval covers, the binomial one of all tokens does not."""

    def draw(r):
        share = r.beta(9, 1, items)  # each text's own, 0.9 in the mean
        counts = np.full(items, 50)
        return r.binomial(50, share).astype(float), counts.astype(float)

    assert coverage(draw, pooled_share_interval, 0.9, 300) >= 0.9
    naive = coverage(draw, lambda s, c: share_interval(s.sum(), c.sum()), 0.9, 300)
    assert naive < 0.8
    all_right = pooled_share_interval(np.full(10, 50.0), np.full(10, 50.0))
    assert all_right.low < 0.7 and all_right.high == 1.0


def test_fieller_covers_or_says_that_there_is_no_quotient():
    def draw(r):
        below = r.normal(1.0, 1.0, 40)
        return 0.5 * below + r.normal(0, 0.3, 40), below

    assert coverage(draw, quotient_interval, 0.5) >= 0.93
    nothing = quotient_interval(*np.random.default_rng(0).normal(0, 1, (2, 40)))
    assert np.isnan(nothing).all()


def test_differences_of_independent_estimates_add_their_variances():
    first, second = Interval(3.0, 0.0, 6.0), Interval(1.0, -3.0, 5.0)
    assert minus(first, second) == (2.0, -3.0, 7.0)


def test_what_no_item_tells():
    none = np.zeros(3)
    assert np.isnan(mean_interval(none, none)).all()
    one = mean_interval(np.array([2.0, 0.0]), np.array([4.0, 0.0]))
    assert one.value == 0.5 and math.isnan(one.low)
    broken = mean_interval(np.array([1.0, np.nan]), np.ones(2))
    assert np.isnan(broken).all()
    assert mean_interval(np.full(4, 2.0), np.full(4, 8.0)) == (0.25, 0.25, 0.25)
