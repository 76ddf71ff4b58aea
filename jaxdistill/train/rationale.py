"""Two tasks of one row: to give the answer, and to give the reasons for it.

Distilling step-by-step (Hsieh et al. 2023, arXiv 2305.02301): a teacher's rationales are a second
target of the same model, told apart by a word before the instruction. At inference the answer is
asked for alone, so reasons cost nothing then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets

from jaxdistill.errors import UserError

ANSWER, RATIONALE = "[answer] ", "[rationale] "


def rationale_rows(rows: Iterable[Mapping[str, Any]], weight: float) -> datasets.Dataset:
    """Return each row as two: its output, and its rationale at a weight.

    The loss is ``sum over answers + weight * sum over rationales``, divided by the like sum of
    tokens.

    Args:
        rows: ``instruction``, ``output`` and ``rationale``, perhaps ``input``; those without a
            rationale give their output alone.
        weight: of a rationale's tokens, the paper's lambda.

    Raises:
        UserError: no row has a rationale, or the weight is negative.
    """
    if not weight >= 0:
        raise UserError(f"rationale weight {weight} given; accepted: 0 or more")

    def both() -> Iterator[dict[str, Any]]:
        for row in rows:
            if row.get("instruction") is None or row.get("output") is None:
                raise UserError(
                    "a row without instruction and output given; rationales need rows of "
                    "'instruction', 'output' and 'rationale'"
                )
            asked = {"instruction": row["instruction"], "input": row.get("input") or ""}
            first = {"instruction": ANSWER + asked["instruction"], "output": row["output"]}
            yield asked | first | {"weight": 1.0}
            if row.get("rationale"):
                second = {"instruction": RATIONALE + asked["instruction"]}
                yield asked | second | {"output": row["rationale"], "weight": float(weight)}

    found = list(both())
    if not any(row["instruction"].startswith(RATIONALE) for row in found):
        raise UserError("no row has a 'rationale'; add the column, or train without rationales")
    return datasets.Dataset.from_list(found)
