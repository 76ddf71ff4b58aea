"""Cascades: the small model answers what it is sure of, and hands the rest to a larger one.

Tiers stand in order of cost: student, teacher, person. Each item goes to the first tier whose
confidence reaches that tier's threshold; the last one answers all that comes to it. An item has
paid for every tier that it passed. Confidences lie in 0..1, larger being surer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

from jaxdistill.errors import UserError

Confidence = Float[np.ndarray, "N"]
Correct = Bool[np.ndarray, "N"]
SIGNALS = ("max_probability", "margin", "entropy")  # of ``choice_confidence``
NEVER = np.inf  # the threshold of a tier that never answers


class Tier(NamedTuple):
    """Hold what one tier did with every item, whether or not the item would come to it.

    Attributes:
        name: of the tier.
        correct: whether its answer was right.
        cost: of one item, in any unit that all tiers share.
        confidence: how sure it was; the last tier's is not read.
    """

    name: str
    correct: Correct
    cost: float
    confidence: Confidence | None = None


class Outcome(NamedTuple):
    """Hold what a cascade does with some items: its accuracy, cost an item, and tiers' shares."""

    accuracy: float
    cost: float
    shares: tuple[float, ...]


class Operating(NamedTuple):
    """Hold an operating point: thresholds of all tiers but the last, and what they gave."""

    thresholds: tuple[float, ...]
    outcome: Outcome


class Curve(NamedTuple):
    """Hold what two tiers do at every threshold of the first, from the most careful on.

    Attributes:
        thresholds: the first tier's confidences, falling.
        coverage: share of the items that it answers.
        answered: its accuracy on those.
        accuracy: of both together.
        cost: of an item.
    """

    thresholds: Float[np.ndarray, "K"]
    coverage: Float[np.ndarray, "K"]
    answered: Float[np.ndarray, "K"]
    accuracy: Float[np.ndarray, "K"]
    cost: Float[np.ndarray, "K"]


def choice_confidence(log_likelihoods: Sequence[Float[np.ndarray, "_"]]) -> dict[str, Confidence]:
    """Return signals in 0..1 of how sure a model is of its choice, by name.

    ``max_probability`` of the choices' softmax; ``margin`` between the two likeliest (Scheffer et
    al. 2001); ``entropy``, as ``1 - H / log C``.

    Args:
        log_likelihoods: of each item's two or more choices, see ``evals.choices.score_choices``.
    """
    found: dict[str, list[float]] = {"max_probability": [], "margin": [], "entropy": []}
    for scores in log_likelihoods:
        p = special.softmax(np.asarray(scores, np.float64))
        second, first = np.sort(p)[-2:]
        found["max_probability"].append(first)
        found["margin"].append(first - second)
        found["entropy"].append(1 - np.sum(special.entr(p)) / np.log(p.size))
    return {name: np.clip(values, 0.0, 1.0) for name, values in found.items()}


def route(confidences: Sequence[Confidence], thresholds: Sequence[float]) -> Int[np.ndarray, "N"]:
    """Return the number of the tier that answers each item."""
    sure = [c >= t for c, t in zip(confidences, thresholds, strict=True)]
    last = np.ones_like(sure[0], dtype=bool)
    return np.argmax(np.stack([*sure, last]), axis=0)


def outcome(tiers: Sequence[Tier], thresholds: Sequence[float]) -> Outcome:
    """Return what the cascade does with the items that ``tiers`` were run on."""
    took = route(_confidences(tiers), thresholds)
    correct = _of_tier([t.correct for t in tiers], took)
    paid = np.cumsum([t.cost for t in tiers])[took]
    shares = tuple(float(np.mean(took == i)) for i in range(len(tiers)))
    return Outcome(float(np.mean(correct)), float(np.mean(paid)), shares)


def _of_tier(values: Sequence[np.ndarray], took: np.ndarray) -> np.ndarray:
    """Return each item's value of the tier that answers it."""
    return np.stack(values)[took, np.arange(took.size)]


def _confidences(tiers: Sequence[Tier]) -> list[Confidence]:
    """Return those of all tiers but the last; raise ``UserError`` where one cannot be used."""
    items = tiers[0].correct.size
    if not items:
        raise UserError("no item given; accepted: one or more")
    found = []
    for tier in tiers[:-1]:
        c = tier.confidence
        if c is None or c.size != items or not np.all((c >= 0) & (c <= 1)):
            raise UserError(
                f"the confidences of {tier.name} are missing, other in number than the {items} "
                "answers, or outside 0..1; accepted: one in 0..1 for each answer"
            )
        found.append(c)
    for tier in tiers:
        if tier.correct.size != items:
            raise UserError(
                f"{tier.name} has {tier.correct.size} answers and {tiers[0].name} {items}; "
                "accepted: the same items for all"
            )
    return found


def coverage_curve(student: Tier, teacher: Tier) -> Curve:
    """Return coverage, accuracy and cost at each of the student's confidences."""
    confidences = _confidences((student, teacher))[0]
    order = np.argsort(-confidences, kind="stable")
    last = np.append(np.diff(confidences[order]) != 0, True)  # ties are answered together
    count = np.arange(1, order.size + 1)[last]
    own = np.cumsum(student.correct[order])[last]
    rest = np.sum(teacher.correct) - np.cumsum(teacher.correct[order])[last]
    coverage = count / order.size
    return Curve(
        thresholds=confidences[order][last],
        coverage=coverage,
        answered=own / count,
        accuracy=(own + rest) / order.size,
        cost=student.cost + (1 - coverage) * teacher.cost,
    )


def calibrate(
    tiers: Sequence[Tier],
    target: float | None = None,
    *,
    max_drop: float | None = None,
    confidence: float = 0.95,
    grid: int = 101,
) -> Operating | None:
    """Return the cheapest thresholds that keep a promise; None where none can be trusted to.

    With probability ``confidence`` over the draw of the calibration items, on items of the same
    kind the cascade's accuracy is at least ``target``; or, with ``max_drop``, at most that much
    below the last tier's, for no greater share of the items is answered wrongly that the last
    tier has right. The second promise compares the tiers on the same items, and so needs fewer
    of them.

    Thresholds are tested from the most careful on, and the first that fails ends the search: Learn
    then Test's fixed sequences (Angelopoulos et al., arXiv 2110.01052), by exact binomial tests.
    With three tiers each threshold of the second starts a sequence of its own, and the error rate
    is divided among them.

    Args:
        tiers: what each did with the calibration items, cheapest first.
        target: accuracy wanted, in 0..1.
        max_drop: accuracy that may be lost, in 0..1; one of the two is given.
        confidence: of the guarantee, in 0..1.
        grid: thresholds tried in 0..1; the items do not choose them, or the guarantee were void.
    """
    if len(tiers) not in (2, 3):
        raise UserError(f"{len(tiers)} tiers given; accepted: two or three")
    if (target is None) == (max_drop is None):
        raise UserError(
            f"target accuracy {target} and greatest drop {max_drop} given; accepted: one of them"
        )
    wanted = target if max_drop is None else max_drop
    for name, value in (("target accuracy or drop", wanted), ("confidence", confidence)):
        if value is None or not 0 < value < 1:
            raise UserError(f"{name} {value} given; accepted: between 0 and 1")
    careful = [NEVER, *np.linspace(1.0, 0.0, grid)]
    later = careful[:: max(1, grid // 10)] if len(tiers) == 3 else [None]
    error = (1 - confidence) / len(later)
    confidences, correct = _confidences(tiers), [t.correct for t in tiers]
    count = correct[0].size
    passed: list[Operating] = []
    for second in later:
        for first in careful:
            thresholds = (first,) if second is None else (first, second)
            right = _of_tier(correct, route(confidences, thresholds))
            if max_drop is not None:  # P(so few are harmed, or fewer | the greatest drop)
                risk = special.bdtr(np.sum(correct[-1] & ~right), count, max_drop)
            else:  # P(so many are right, or more | target)
                risk = special.bdtrc(np.sum(right) - 1, count, target)
            if risk > error:
                break
            passed.append(Operating(thresholds, outcome(tiers, thresholds)))
    return min(passed, key=lambda o: o.outcome.cost, default=None)
