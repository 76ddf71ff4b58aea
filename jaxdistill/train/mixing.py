"""Mix curated examples into data at a stated rate, so that rare cases are not lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxdistill.errors import UserError
from jaxdistill.train.data import load_rows


def parse_mix(text: str) -> tuple[str, float]:
    """Read ``FILE:RATE``, the rate being the share of all examples that come from the file.

    Raises:
        UserError: the text says something else.
    """
    path, _, rate = text.rpartition(":")
    try:
        share = float(rate)
    except ValueError:
        share = -1.0
    if not path or not 0 < share < 1:
        raise UserError(
            f"--mix {text} given; accepted: FILE:RATE, the rate between 0 and 1, as in "
            "rare.jsonl:0.1"
        )
    return path, share


def mixed_order(
    sizes: Sequence[int], rates: Sequence[float]
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Return the source and the row of each example of a mixture, evenly interleaved.

    The first source's rows are all there, once; another's are there as often as its rate asks for:
    in turn, some once more than others, or evenly spaced ones of them where there are too many.

    Args:
        sizes: rows of each source, the first one's included.
        rates: of all sources but the first, shares of the mixture.

    Raises:
        UserError: the rates leave nothing to the first source.
    """
    left = 1 - sum(rates)
    if left <= 0:
        raise UserError(f"--mix rates of {sum(rates):.3g} in all given; accepted: less than 1")
    total = sizes[0] / left
    rows = [np.arange(sizes[0])]
    for size, rate in zip(sizes[1:], rates, strict=True):
        count = max(1, round(rate * total))
        spaced = np.arange(count) * size // count
        rows.append(spaced if count <= size else np.arange(count) % size)
    source = np.repeat(np.arange(len(rows)), [r.size for r in rows])
    place = np.concatenate([(np.arange(r.size) + 0.5) / r.size for r in rows])
    order = np.argsort(place, kind="stable")
    return source[order], np.concatenate(rows)[order]


class MixedRows(Sequence[Mapping[str, Any]]):
    """Give the rows of several sources in a mixture's order, without copying them."""

    def __init__(self, sources: Any, rates: Sequence[float]) -> None:
        self._sources = sources
        self._source, self._row = mixed_order([len(s) for s in sources], rates)

    def __len__(self) -> int:
        return self._source.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._sources[int(self._source[index])][int(self._row[index])]
        return {name: value for name, value in row.items() if value is not None}


def mixed_rows(rows: Any, mixes: Sequence[str]) -> Any:
    """Return rows with those of files mixed in; as they are without any.

    Args:
        rows: of text, conversations or instructions.
        mixes: see ``parse_mix``; each is a source that ``load_rows`` takes.

    Raises:
        UserError: a text is no mix, or its file cannot be read.
    """
    if not mixes:
        return rows
    parsed = [parse_mix(text) for text in mixes]
    return MixedRows([rows, *(load_rows(p) for p, _ in parsed)], [rate for _, rate in parsed])
