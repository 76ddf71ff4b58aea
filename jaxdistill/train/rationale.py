"""Two tasks of one row: to give the answer, and to give the reasons for it.

Distilling step-by-step (Hsieh et al. 2023, arXiv 2305.02301): a teacher's rationales are a second
target of the same model, told apart by a word before the instruction. At inference the answer is
asked for alone, so reasons cost nothing then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import datasets

from jaxdistill.errors import UserError

ANSWER, RATIONALE = "[answer] ", "[rationale] "


def _question(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row's instruction and input; raise ``UserError`` where it has no such form."""
    asked = {name: row.get(name) for name in ("instruction", "output", "rationale")}
    sound = all(isinstance(asked[name], str) for name in ("instruction", "output"))
    if not sound or not isinstance(asked["rationale"], str | None):
        kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in asked.items())
        raise UserError(
            f"a row of {kinds} given; rationales need rows of 'instruction', 'output' and, where "
            "there is one, 'rationale', each a string"
        )
    return {"instruction": row["instruction"], "input": row.get("input") or ""}


def answer_rows(rows: Iterable[Mapping[str, Any]]) -> datasets.Dataset:
    """Return rows that ask for the answer alone, in the words of ``rationale_rows``."""
    found = []
    for row in rows:
        asked = _question(row)
        asked["instruction"] = ANSWER + asked["instruction"]
        kept = {name: value for name, value in row.items() if name != "rationale"}
        found.append(kept | asked)
    return datasets.Dataset.from_list(found)


def rationale_rows(rows: Iterable[Mapping[str, Any]], weight: float) -> datasets.Dataset:
    """Return each row as two: its output, and its rationale at a weight.

    With the loss on completions it is ``sum over answers + weight * sum over rationales``, divided
    by the like sum of tokens. What the student is asked later must begin with ``ANSWER`` as well.

    Args:
        rows: ``instruction``, ``output`` and ``rationale``, perhaps ``input``; those without a
            rationale give their output alone. Weights of their own are not looked at.
        weight: of a rationale's tokens, the paper's lambda.

    Raises:
        UserError: no row has a rationale, a row has another form, or the weight is negative.
    """
    if not weight >= 0:
        raise UserError(f"rationale weight {weight} given; accepted: 0 or more")
    found: list[dict[str, Any]] = []
    for row in rows:
        asked = _question(row)
        first = {"instruction": ANSWER + asked["instruction"], "output": row["output"]}
        found.append(asked | first | {"weight": 1.0})
        if row.get("rationale"):
            second = {"instruction": RATIONALE + asked["instruction"]}
            second |= {"output": row["rationale"]}
            found.append(asked | second | {"weight": float(weight)})
    if not any(row["instruction"].startswith(RATIONALE) for row in found):
        raise UserError("no row has a 'rationale'; add the column, or train without rationales")
    return datasets.Dataset.from_list(found)
