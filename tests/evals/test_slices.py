"""Slices: values by hand, intervals that cover, and the slice that lost most."""

import numpy as np
import pytest

from jaxdistill.errors import UserError
from jaxdistill.evals.slices import (
    WHOLE,
    SliceReport,
    report_slices,
    slice_power,
    slice_warning,
    worst_slice,
)

RNG = np.random.default_rng(0)


def losses(items, mean, counts=None):
    counts = np.full(items, 10.0) if counts is None else counts
    return {"nll": (RNG.normal(mean, 0.3, items) * counts, counts)}


def test_values_by_hand():
    one = np.ones(4)
    results = {
        "teacher": {"acc": (np.array([1.0, 1, 1, 0]), one)},
        "ptq": {"acc": (np.array([0.0, 1, 0, 0]), one)},
        "student": {"acc": (np.array([1.0, 1, 0, 0]), one)},
    }
    masks = {"last": np.array([False, False, True, True]), "none": np.zeros(4, bool)}
    found = report_slices(results, masks, by="acc")
    assert list(found) == [WHOLE, "last"]
    whole = found[WHOLE]
    assert whole.items == 4
    assert whole.metrics["student"]["acc"].value == 0.5
    assert {k: v.value for k, v in whole.derived.items()} == pytest.approx(
        {"lost": 0.25, "retention": 2 / 3, "gap_recovered": np.nan}, nan_ok=True
    )  # of four items two are no gap
    assert found["last"].derived["lost"].value == 0.5
    assert found["last"].derived["excess"].value == 0.5  # nothing was lost on the first two
    assert found["last"].derived["retention"].value == 0
    nothing = report_slices({"student": {"nll": (one[:2], 0 * one[:2])}}, {}, by="nll")[WHOLE]
    assert nothing.plain()["metrics"] == {"student": {"nll": [None, None, None]}}


def test_a_mean_weighs_by_counts():
    results = {"student": {"nll": (np.array([10.0, 1.0]), np.array([5.0, 1.0]))}}
    found = report_slices(results, {}, by="nll")[WHOLE].metrics["student"]["nll"]
    assert found.value == pytest.approx(11 / 6)
    assert found.low < 1.0 and found.high > 2.0  # two items tell almost nothing


def test_a_comparison_is_paired():
    """The difference of two models is the same on every item, so its interval is a point."""
    teacher = losses(50, 2.0)
    total, counts = teacher["nll"]
    student = {"nll": (total + 0.25 * counts, counts)}
    found = report_slices({"teacher": teacher, "student": student}, {}, by="nll")[WHOLE]
    assert found.derived["lost"] == pytest.approx((0.25, 0.25, 0.25))
    spread = found.metrics["student"]["nll"]
    assert spread.high - spread.low > 0.1


def lossy(rare, common, items=400):
    """Returns a student that is worse by so much on a tenth of the items, and on the others."""
    mask = np.arange(items) % 10 == 0
    teacher = losses(items, 2.0)
    total, counts = teacher["nll"]
    worse = np.where(mask, rare, common) + RNG.normal(0, 0.05, items)
    student = {"nll": (total + worse * counts, counts)}
    other = np.arange(items) % 7 == 0
    return report_slices(
        {"teacher": teacher, "student": student}, {"other": other, "rare": mask}, by="nll"
    )


def test_the_slice_that_lost_most_is_named():
    reports = lossy(0.8, 0.1)
    assert worst_slice(reports) == "rare"
    said = slice_warning(reports, "nll") or ""
    assert "the slice 'rare' (40 items) lost most: nll is 0." in said
    assert "nats a token worse than the teacher's" in said and "--mix" in said
    assert "more than on the other items" in said


def test_no_slice_is_named_where_all_lost_alike_or_nothing_was_lost():
    assert worst_slice(lossy(0.1, 0.1)) is None
    assert slice_warning(lossy(-0.2, -0.3), "nll") is None
    alone = report_slices({"student": losses(20, 2.0)}, {"a": np.arange(20) < 5}, by="nll")
    assert worst_slice(alone) is None


@pytest.mark.parametrize("size", [2, 20])
def test_slices_that_lost_no_more_than_others_are_rarely_named(size):
    """Eight slices of the same kind; hardly ever one of them is named by chance."""
    named = []
    for _ in range(30):
        items = 8 * size
        teacher = losses(items, 2.0)
        total, counts = teacher["nll"]
        student = {"nll": (total + RNG.normal(0.2, 0.3, items) * counts, counts)}
        masks = {f"s{i}": np.arange(items) // size == i for i in range(8)}
        reports = report_slices({"teacher": teacher, "student": student}, masks, by="nll")
        named.append(worst_slice(reports) is not None)
    assert np.mean(named) <= 0.1


def test_a_slice_too_small_to_show_a_doubled_loss_is_named_with_what_it_could_show():
    """The loss it could show is found in 4 of 5 draws, by simulation."""
    random = np.random.default_rng(3)
    mask = np.arange(400) < 12

    def draw(extra):
        worse = random.normal(0.05, 0.3, 400) + extra * mask
        counts = np.full(400, 10.0)
        sums = {"teacher": {"nll": (2 * counts, counts)}}
        sums["student"] = {"nll": ((2 + worse) * counts, counts)}
        return report_slices(sums, {"rare": mask}, by="nll")

    reports = [draw(0.0) for _ in range(40)]
    said = slice_power(reports[0], "nll")
    assert said is not None and "'rare' (12 items" in said
    assert SliceReport.from_plain(reports[0]["rare"].plain()) == reports[0]["rare"]
    least = float(np.mean([r["rare"].detectable for r in reports]))
    assert 0.7 < np.mean([draw(least)["rare"].derived["excess"].low > 0 for _ in range(100)]) < 0.95
    large = np.arange(400) < 200
    sums = {"teacher": losses(400, 2.0)}
    total, counts = sums["teacher"]["nll"]
    sums["student"] = {"nll": (total + RNG.normal(0.5, 0.1, 400) * counts, counts)}
    assert slice_power(report_slices(sums, {"half": large}, by="nll"), "nll") is None


def test_the_gap_recovered_is_undefined_where_ptq_is_within_noise_of_the_teacher():
    teacher, random = losses(60, 2.0), np.random.default_rng(5)
    total, counts = teacher["nll"]

    def worse(by):
        return {"nll": (total + random.normal(by, 0.2, 60) * counts, counts)}

    noise = report_slices(
        {"teacher": teacher, "ptq": worse(0.0), "student": worse(0.0)}, {}, by="nll"
    )[WHOLE]
    assert noise.plain()["derived"]["gap_recovered"] == [None, None, None]
    sure = report_slices(
        {"teacher": teacher, "ptq": worse(1.0), "student": worse(0.25)}, {}, by="nll"
    )[WHOLE].derived["gap_recovered"]
    assert sure.low < 0.75 < sure.high and sure.high - sure.low < 0.2


def test_what_cannot_be_judged():
    with pytest.raises(UserError, match="no item given"):
        report_slices({"student": {"nll": (np.zeros(0), np.zeros(0))}}, {}, by="nll")
    with pytest.raises(UserError, match="confidence must be between 0 and 1, got 1.0"):
        report_slices({"student": losses(3, 1.0)}, {}, by="nll", confidence=1.0)
