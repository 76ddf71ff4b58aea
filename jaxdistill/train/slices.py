"""Named slices of data, the rare cases that a user watches: by column, by regex, by frequency."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxdistill.errors import UserError
from jaxdistill.train.chat_rows import row_text

FORMS = (
    "a column, NAME=REGEX over the text, or longest:SHARE, rare_words:SHARE, rare_labels:SHARE as "
    "in longest:0.1"
)
WHOLE = "all"  # the slice that every example is in
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """Hold what is known of N examples and can tell a slice.

    Attributes:
        count: N.
        texts: the examples as texts; None where they are none.
        columns: what else is known of each example, by name.
        source: what the user gave, for messages.
    """

    count: int
    texts: Sequence[str] | None = None
    columns: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    source: str = ""


def described(rows: Iterable[Mapping[str, Any]], source: str = "") -> Described:
    """Return what rows of text, conversations or instructions are known by."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return Described(
        count=len(rows),
        texts=[row_text(row) for row in rows],
        columns={name: [row.get(name) for row in rows] for name in names},
        source=source,
    )


def slices_of(
    data: Described, specs: Sequence[str], *, required: bool = True
) -> dict[str, Bool[np.ndarray, "N"]]:
    """Return which examples belong to each named slice.

    Args:
        data: the examples.
        specs: each one of

            - ``NAME=REGEX``, the texts in which the expression is found, whatever the case of
              letters;
            - the name of a column: of true and false (or 1 and 0), the slice where it is true; of
              other values, one slice a value, named ``COLUMN=value``; an empty value or null is in
              none;
            - ``longest:SHARE``, that share of the examples, those of the most characters;
              ``rare_words:SHARE``, those whose words are the least frequent among all, by the mean
              of ``-log frequency``; ``rare_labels:SHARE``, those of a ``label`` that no more than
              that share has.
        required: whether a column that is not there is wrong; else it has no slice.

    Raises:
        UserError: a column is not there, an expression is none, a share is not between 0 and 1, or
            there are no texts for it.
    """
    found: dict[str, np.ndarray] = {}
    for spec in specs:
        name, is_pattern, pattern = spec.partition("=")
        kind, is_share, share = spec.partition(":")
        made: dict[str, np.ndarray] = {}
        if is_pattern:
            made = {name: _matching(data, name, pattern, spec)}
        elif spec in data.columns:
            made = _of_column(spec, data.columns[spec])
        elif is_share and kind in _BY_FREQUENCY:
            if required or kind != "rare_labels" or "label" in data.columns:
                made = {spec: _BY_FREQUENCY[kind](data, _share(share, spec), spec)}
        elif required:
            raise UserError(
                f"--slice {spec} given for data {data.source!r} with the columns "
                f"{', '.join(data.columns) or 'none'}; accepted: one of these, or {FORMS}"
            )
        if taken := [name for name in made if name in found or name == WHOLE]:
            raise UserError(
                f"--slice {spec} given, and the name {taken[0]!r} is taken; accepted: slices of "
                "different names; choose another"
            )
        found |= made
    return found


def _of_column(name: str, column: Sequence[Any]) -> dict[str, np.ndarray]:
    odd = [v for v in column if v is not None and not isinstance(v, str | int | float)]
    if odd:
        raise UserError(
            f"--slice {name} given, and that column holds {odd[0]!r}; accepted: a column of texts, "
            "numbers, or true and false"
        )
    values = {value for value in column if value not in (None, "") and value == value}
    if values <= {True, False}:
        return {name: np.asarray([bool(value) for value in column])}
    ordered = sorted(values, key=str)
    return {f"{name}={v}": np.asarray([other == v for other in column]) for v in ordered}


def _matching(data: Described, name: str, pattern: str, spec: str) -> np.ndarray:
    if not name:
        raise UserError(f"--slice {spec} given for data {data.source!r}; accepted: {FORMS}")
    try:
        expression = re.compile(pattern, re.IGNORECASE)
    except re.error as e:
        raise UserError(
            f"--slice {spec} given, which is no regular expression ({e}); accepted: NAME=REGEX, as "
            "Python's re reads it; correct it"
        ) from None
    return np.asarray([expression.search(text) is not None for text in _texts(data, spec)])


def _texts(data: Described, spec: str) -> Sequence[str]:
    if data.texts is None:
        raise UserError(
            f"--slice {spec} given for data {data.source!r}, which holds no texts; accepted: the "
            "name of a column"
        )
    return data.texts


def _share(text: str, spec: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UserError(f"--slice {spec} given; accepted: a share between 0 and 1, as in 0.1")
    return share


def _greatest(values: Float[np.ndarray, "N"], share: float) -> Bool[np.ndarray, "N"]:
    """Return which are among the greatest, at least one; the first of equals."""
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-values, kind="stable")[: max(1, round(share * values.size))]] = True
    return mask


def _longest(data: Described, share: float, spec: str) -> np.ndarray:
    return _greatest(np.array([len(text) for text in _texts(data, spec)], float), share)


def _rare_words(data: Described, share: float, spec: str) -> np.ndarray:
    words = [_WORD.findall(text.lower()) for text in _texts(data, spec)]
    seen = Counter(word for found in words for word in found)
    return _greatest(
        np.array(
            [np.mean([-np.log(seen[w]) for w in found]) if found else -np.inf for found in words]
        ),
        share,
    )


def _rare_labels(data: Described, share: float, spec: str) -> np.ndarray:
    if "label" not in data.columns:
        raise UserError(
            f"--slice {spec} given for data {data.source!r}, which has no column `label`; "
            "accepted: rows that have one"
        )
    labels = data.columns["label"]
    odd = [v for v in labels if v is not None and not isinstance(v, str | int | float)]
    if odd:
        raise UserError(
            f"--slice {spec} given, and the column `label` holds {odd[0]!r}; accepted: texts or "
            "numbers"
        )
    seen = Counter(labels)
    return np.asarray([v is not None and seen[v] <= share * len(labels) for v in labels])


_BY_FREQUENCY: dict[str, Callable[[Described, float, str], np.ndarray]] = {
    "longest": _longest,
    "rare_words": _rare_words,
    "rare_labels": _rare_labels,
}
