"""Evaluations of several models on the same rows: intervals, and what compares them in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.evals.slices import ItemSums, difference, gap_recovered, metric_interval

Evaluation = dict[str, Any]


def summarize(sums: ItemSums) -> Evaluation:
    """Return one model's evaluation from each row's (sum, count).

    Returns:
        ``nll`` (nats a target token), ``perplexity``, ``tokens``, with a teacher ``kl`` and
        ``agreement``; ``intervals`` of 95 % over the rows, by metric; ``rows``, by metric each
        row's sum, and the ``tokens`` that it counts.

    Raises:
        UserError: no row has a target token.
    """
    counts = sums["nll"][1]
    full = counts > 0
    if not full.any():
        raise UserError("the evaluation data hold no target token; give longer texts")
    tokens = float(np.sum(counts))
    intervals = {m: metric_interval(m, s[full], c[full]) for m, (s, c) in sums.items()}
    result: Evaluation = {m: float(np.sum(s)) / tokens for m, (s, _) in sums.items()}
    result["perplexity"] = math.exp(min(result["nll"], 700.0))
    result["tokens"] = int(tokens)
    result["intervals"] = {m: found.plain()[1:] for m, found in intervals.items()}
    result["rows"] = {m: s[full].tolist() for m, (s, _) in sums.items()}
    result["rows"]["tokens"] = counts[full].tolist()
    return result


def compare(results: Mapping[str, Evaluation], start: str) -> None:
    """Add to each evaluation what compares it with the earlier ones on the same rows.

    ``against``: by ``teacher`` and the start, by metric the difference and its interval, as lists
    of value, low and high. To the student ``gap_recovered``, by metric; null where teacher and
    start cannot be told apart.

    Args:
        results: by label; ``student`` may be the start itself.
        start: label of the student before training.
    """
    sums = {label: _sums(result) for label, result in results.items() if "rows" in result}
    pairs = [(label, "teacher") for label in (start, "student")]
    if results["student"] is not results[start]:
        pairs.append(("student", start))
    for label, other in pairs:
        if label not in sums or other not in sums:
            continue
        both = sums[label].keys() & sums[other].keys()
        results[label].setdefault("against", {})[other] = {
            metric: difference(metric, sums[label], sums[other]).plain()
            for metric in sums[label]
            if metric in both
        }
    if ("student", start) in pairs and {"student", start} <= sums.keys():
        gaps = {}
        if "kl" in sums["student"]:
            gaps["kl"] = gap_recovered(sums[start], sums["student"], "kl").plain()
        if "teacher" in sums:
            gaps["nll"] = gap_recovered(
                sums[start], sums["student"], "nll", sums["teacher"]
            ).plain()
        results["student"]["gap_recovered"] = {k: None if None in v else v for k, v in gaps.items()}


def _sums(result: Evaluation) -> dict[str, Any]:
    counts = np.asarray(result["rows"]["tokens"], np.float64)
    return {
        metric: (np.asarray(sums, np.float64), counts)
        for metric, sums in result["rows"].items()
        if metric != "tokens"
    }
