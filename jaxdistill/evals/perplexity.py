"""Next-token quality: NLL, perplexity, KL to the teacher, top-1 agreement, over target tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.kd.objective import Objective
from jaxdistill.mesh import fetch, place_batch


def make_evaluator(
    objective: Objective,
) -> Callable[[Any, Any, Iterable[Mapping[str, Any]]], dict[str, float | int]]:
    """Return ``evaluate(params, teacher_params, batches)``, compiled once for all its calls.

    Its result holds ``nll`` (nats a target token), ``perplexity``, ``tokens`` (targets counted),
    and where the objective has a teacher ``kl`` (nats a token, teacher to student) and
    ``agreement`` (share of equal argmax).
    """
    score = jax.jit(lambda p, t, b: objective(p, t, b)[2])

    def evaluate(params, teacher_params, batches) -> dict[str, float | int]:
        totals: dict[str, list[float]] = {}
        for batch in batches:
            for name, pair in score(params, teacher_params, place_batch(batch)).items():
                value, count = (float(x) for x in pair)
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += value
                total[1] += count
        tokens = totals.get("nll", [0.0, 0.0])[1]
        if not tokens:
            raise UserError("the evaluation data hold no target token; give longer texts")
        means = {name: value / count for name, (value, count) in totals.items() if name != "loss"}
        means["perplexity"] = math.exp(min(means["nll"], 700.0))
        return means | {"tokens": int(tokens)}

    return evaluate


# evaluate(params, teacher_params, batches) -> by metric each row's (sum, count)
RowEvaluator = Callable[
    [Any, Any, Iterable[Mapping[str, Any]]], dict[str, tuple[np.ndarray, np.ndarray]]
]


def make_row_evaluator(objective: Objective) -> RowEvaluator:
    """Return ``evaluate(params, teacher_params, batches)``: by metric, each row's (sum, count).

    The sums of all rows over their counts are what ``make_evaluator`` returns. The objective is one
    ``by_row``, see ``kd_objective``.
    """
    score = jax.jit(lambda p, t, b: objective(p, t, b)[2])

    def evaluate(params, teacher_params, batches) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        found = [
            jax.tree.map(fetch, score(params, teacher_params, place_batch(b))) for b in batches
        ]
        if not found:
            raise UserError("the evaluation data hold no row; give some")
        parts = jax.tree.map(lambda *x: np.concatenate(x).astype(np.float64), *found)
        return {name: tuple(pair) for name, pair in parts.items() if name != "loss"}

    return evaluate


def recovered(ptq: float, student: float, teacher: float = 0.0) -> float:
    """Return the share of the gap from teacher to PTQ that training closed: 1 is all of it."""
    gap = ptq - teacher
    return float(np.nan) if gap == 0 else (ptq - student) / gap
