"""Cut examples into pieces that fit into rows, and choose the row of each piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int

from jaxdistill.errors import UserError
from jaxdistill.train.encode import Example


class Pieces(NamedTuple):
    """P runs of tokens, each of one example, none longer than a row.

    Attributes:
        example: index of the example.
        start: first token within the example.
        length: tokens, at least 1.
    """

    example: Int[np.ndarray, "P"]
    start: Int[np.ndarray, "P"]
    length: Int[np.ndarray, "P"]

    def take(self, index: np.ndarray) -> Pieces:
        """Return the pieces of an index or a mask."""
        return Pieces(*(array[index] for array in self))


def split(examples: Sequence[Example], seq_len: int, *, cut_texts: bool = True) -> Pieces:
    """Return the pieces of examples that fit into rows, in order; all of them have a target.

    An example longer than a row that is all targets, a text, is cut into pieces of ``seq_len``
    tokens and a rest if ``cut_texts``. One that is not (a question and its answer, say) is
    truncated, because an answer without its question teaches something else.
    """
    check_length(seq_len)
    lengths = lengths_of(examples)
    count = np.minimum(lengths, 1)
    for i in np.flatnonzero(lengths > seq_len).tolist() if cut_texts else ():
        is_text = examples[i].loss_mask[1:].all()
        count[i] = -(-lengths[i] // seq_len) if is_text else 1
    example = np.repeat(np.arange(len(examples)), count)
    number = np.arange(len(example)) - np.repeat(np.cumsum(count) - count, count)
    start = number * seq_len
    pieces = Pieces(example, start, np.minimum(lengths[example] - start, seq_len))
    masks = [np.zeros(0, bool), *(target_mask(e) for e in examples)]
    before = np.concatenate([[0], np.cumsum(np.concatenate(masks))])
    first = (np.cumsum(lengths) - lengths)[example] + start
    return pieces.take(before[first + pieces.length] > before[first + 1])


def crop(example: Example, start: int, stop: int | None) -> Example:
    """Return the example's tokens from ``start`` to ``stop``."""
    where, weights = slice(start, stop), example.weights
    return Example(
        tokens=example.tokens[where],
        loss_mask=example.loss_mask[where],
        weights=None if weights is None else weights[where],
    )


def target_mask(example: Example) -> Bool[np.ndarray, "n"]:
    """Return which tokens are targets; one of weight 0 is not."""
    weights = example.weights
    return example.loss_mask if weights is None else example.loss_mask & (weights > 0)


def token_weights(example: Example) -> Float32[np.ndarray, "n"]:
    """Return the weight of each token."""
    ones = np.ones(len(example.tokens), np.float32)
    return ones if example.weights is None else example.weights


def check_length(seq_len: int) -> None:
    """Raise ``UserError`` where no token of a row could be a target."""
    if seq_len < 2:
        raise UserError(
            f"seq_len is {seq_len}; accepted: 2 or more, as the first token of a row is never "
            "predicted; raise it"
        )


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Count the tokens of each example."""
    return np.fromiter((len(e.tokens) for e in examples), np.int64, len(examples))


def wrapped(
    lengths: np.ndarray, order: np.ndarray, seq_len: int
) -> tuple[Pieces, Int[np.ndarray, "P"]]:
    """Cut the stream of the examples in this order; return the pieces and the row of each."""
    begins = np.cumsum(lengths[order]) - lengths[order]
    total = int(lengths.sum())
    at = np.union1d(begins[lengths[order] > 0], np.arange(0, total, seq_len))
    which = np.searchsorted(begins, at, side="right") - 1  # the last of those that begin there
    pieces = Pieces(order[which], at - begins[which], np.diff(at, append=total))
    return pieces, at // seq_len


def best_fit(lengths: Int[np.ndarray, "P"], seq_len: int) -> Int[np.ndarray, "P"]:
    """Return the row of each piece: longest first, each into the row that it fills best."""
    rows = np.zeros(len(lengths), np.int64)
    rows_with: dict[int, list[int]] = {}  # by the places left
    spaces = 0  # bit s is set where some row has s places left
    number = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        if wide := spaces >> length:
            space = length + (wide & -wide).bit_length() - 1
            row = rows_with[space].pop()
            spaces ^= 0 if rows_with[space] else 1 << space
        else:
            space, row, number = seq_len, number, number + 1
        rows[i] = row
        if left := space - length:
            rows_with.setdefault(left, []).append(row)
            spaces |= 1 << left
    first = np.full(number, len(lengths))
    np.minimum.at(first, rows, np.arange(len(lengths)))
    return np.argsort(np.argsort(first))[rows]


def next_fit(lengths: Int[np.ndarray, "P"], seq_len: int) -> Int[np.ndarray, "P"]:
    """Return the row of each piece in order: the last row while there is room, else a new one."""
    rows, row, used = np.zeros(len(lengths), np.int64), 0, 0
    for i, length in enumerate(lengths.tolist()):
        if used + length > seq_len:
            row, used = row + 1, 0
        rows[i], used = row, used + length
    return rows
