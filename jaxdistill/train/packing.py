"""Lay examples out in rows of equal length, and serve the rows as batches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import grain
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from jaxdistill.errors import UserError
from jaxdistill.kd.rows import Rows
from jaxdistill.mesh import HostRows, own_rows
from jaxdistill.train.encode import Example
from jaxdistill.train.pieces import (
    Pieces,
    best_fit,
    check_length,
    lengths_of,
    next_fit,
    split,
    target_mask,
    token_weights,
    wrapped,
)

Batch = dict[str, np.ndarray]
Packing = Literal["best-fit", "wrap", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """The tokens of some examples, by what became of them in rows.

    ``targets + masked + padded`` is the size of the rows, and ``targets + masked + truncated +
    dropped`` all tokens of the examples.

    Attributes:
        examples: examples.
        rows: rows.
        targets: tokens in the rows that are predicted.
        masked: tokens in the rows that are not.
        padded: places of the rows that hold padding.
        cut: tokens in the rows, in a segment that does not begin where their example does.
        truncated: tokens of an example in the rows that are not: those beyond its row.
        dropped: tokens of what was dropped because it had no target.
    """

    examples: int
    rows: int
    targets: int
    masked: int
    padded: int
    cut: int
    truncated: int
    dropped: int

    def __str__(self) -> str:
        """Say it in one line."""
        places = max(1, self.targets + self.masked + self.padded)
        parts = [
            f"{self.targets:,} targets",
            f"{self.masked:,} without a target",
            f"{self.padded:,} padding ({self.padded / places:.1%})",
        ]
        parts += [f"{self.cut:,} cut off from the start of their text"] if self.cut else []
        parts += [f"{self.truncated:,} truncated"] if self.truncated else []
        parts += [f"{self.dropped:,} dropped for want of a target"] if self.dropped else []
        return f"{self.examples:,} texts in {self.rows:,} rows; tokens: {', '.join(parts)}"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """N rows of T tokens.

    Attributes:
        tokens: token ids, the padding id where ``segment_ids`` is 0.
        loss_mask: ``loss_mask[n, t]`` says whether token ``t`` is a target, to be predicted at
            ``t-1``. Never true for the first token of a segment, nor for padding.
        segment_ids: 1, 2, ... within each row; 0 for padding. Tokens of different segments must
            not attend to each other.
        positions: 0, 1, ... within each segment; 0 for padding.
        weights: of each token as a target; None where all weigh 1, and then left out of batches.
        counts: what became of the examples' tokens; None where that is not known.
    """

    tokens: Int32[np.ndarray, "N T"]
    loss_mask: Bool[np.ndarray, "N T"]
    segment_ids: Int32[np.ndarray, "N T"]
    positions: Int32[np.ndarray, "N T"]
    weights: Float32[np.ndarray, "N T"] | None = None
    counts: Counts | None = None

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.tokens)

    def __getitem__(self, index: int | slice) -> Batch:
        """Give one row, arrays [T], or a slice of rows, arrays [B, T]."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: a[index] for name, a in arrays.items() if isinstance(a, np.ndarray)}

    @property
    def numtargets_of(self) -> int:
        """Count the tokens that are predicted."""
        return int(self.loss_mask.sum())


def pack(
    examples: Sequence[Example],
    seq_len: int,
    *,
    packing: Packing = "best-fit",
    by_length: bool = False,
    pad_id: int = 0,
) -> Packed:
    """Lay the examples out in rows of ``seq_len`` tokens.

    - ``best-fit``: several examples a row, each in one piece where it fits (best-fit decreasing:
      longest first, each into the fullest row that has room). Rows are in the order of their first
      examples.
    - ``wrap``: one stream of all examples, cut at every ``seq_len`` tokens, without padding. An
      example that a border cuts continues in the next row without its beginning in view.
    - ``none``: one example a row.

    An example longer than a row is truncated, except by ``best-fit`` if it is a text, all targets:
    then it is cut into pieces (``pieces.split``). Rows without a target are dropped.
    ``Packed.counts`` says how many tokens each of this concerns.

    >>> texts = [Example(tokens=np.arange(n, dtype=np.int32), loss_mask=np.arange(n) > 0)
    ...          for n in (3, 5, 4)]
    >>> print(pack(texts, 8).segment_ids)
    [[1 1 1 2 2 2 2 2]
     [1 1 1 1 0 0 0 0]]

    Args:
        examples: those without tokens are skipped.
        seq_len: T, at least 2.
        packing: see above.
        by_length: lay out the shortest examples first, rows in that order; with ``best-fit`` a row
            then holds examples that follow each other.
        pad_id: the id of padding.

    Raises:
        UserError: if ``seq_len`` is below 2, or the packing is unknown.
    """
    if packing not in get_args(Packing):
        raise UserError(f"packing is {packing!r}; accepted: {', '.join(get_args(Packing))}")
    check_length(seq_len)
    if packing == "wrap":
        lengths = lengths_of(examples)
        order = np.argsort(lengths, kind="stable") if by_length else np.arange(len(examples))
        pieces, row = wrapped(lengths, order, seq_len)
    else:
        pieces = split(examples, seq_len, cut_texts=packing == "best-fit")
        if by_length:
            pieces = pieces.take(np.argsort(pieces.length, kind="stable"))
        if packing == "none":
            row = np.arange(len(pieces.length))
        else:
            row = (next_fit if by_length else best_fit)(pieces.length, seq_len)
    return _lay_out(examples, pieces, row, seq_len, pad_id)


def recount(packed: Packed, examples: Sequence[Example], kept: Sequence[int]) -> Packed:
    """Count again where the rows hold a crop each of the ``kept`` examples, by index, in order."""
    lengths, counts = lengths_of(examples), packed.counts
    assert counts is not None  # pack made the rows
    inside = int(lengths[list(kept)].sum())
    truncated, dropped = inside - counts.targets - counts.masked, int(lengths.sum()) - inside
    counts = dataclasses.replace(
        counts, examples=len(examples), truncated=truncated, dropped=dropped
    )
    return dataclasses.replace(packed, counts=counts)


def _lay_out(
    examples: Sequence[Example],
    pieces: Pieces,
    row: Int[np.ndarray, "P"],
    seq_len: int,
    pad_id: int,
) -> Packed:
    """Write pieces into their rows, in order; rows without a target are left out."""
    order = np.argsort(row, kind="stable")
    pieces, row = pieces.take(order), row[order]
    used = np.bincount(row, pieces.length).astype(np.int64)
    index = np.arange(seq_len, dtype=np.int32)
    filled = index[None, :] < used[:, None]
    begins = np.cumsum(pieces.length) - pieces.length
    starts = np.zeros(filled.shape, np.bool_)
    starts[row, begins - (np.cumsum(used) - used)[row]] = True
    positions = index - np.maximum.accumulate(np.where(starts, index, np.int32(0)), axis=1)
    at = list(zip(*(array.tolist() for array in pieces), strict=True))

    def fill(parts: list[np.ndarray], empty: Any, dtype: Any) -> np.ndarray:
        out = np.full(filled.shape, empty, dtype)
        if parts:
            out[filled] = np.concatenate(parts)
        return out

    arrays = {
        "tokens": fill([examples[i].tokens[s : s + n] for i, s, n in at], pad_id, np.int32),
        "loss_mask": fill([target_mask(examples[i])[s : s + n] for i, s, n in at], False, np.bool_),
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32) * filled,
        "positions": np.where(filled, positions, np.int32(0)),
    }
    if any(e.weights is not None for e in examples):
        weights = [token_weights(examples[i])[s : s + n] for i, s, n in at]
        arrays["weights"] = fill(weights, 1, np.float32)
    arrays["loss_mask"] &= ~starts
    useful = arrays["loss_mask"].any(axis=1)
    if not useful.all():
        arrays = {name: array[useful] for name, array in arrays.items()}
    counts = _counts(examples, pieces, useful[row], arrays["loss_mask"])
    return Packed(**arrays, counts=counts)


def _counts(
    examples: Sequence[Example], pieces: Pieces, useful: np.ndarray, loss_mask: np.ndarray
) -> Counts:
    """Count what became of the examples' tokens, of which the ``useful`` pieces have a row."""
    lengths = lengths_of(examples)
    reach = np.bincount(pieces.example, pieces.length, len(examples)).astype(np.int64)
    truncated = int((lengths - reach)[reach > 0].sum())
    kept, targets = int(pieces.length[useful].sum()), int(loss_mask.sum())
    return Counts(
        examples=len(examples),
        rows=len(loss_mask),
        targets=targets,
        masked=kept - targets,
        padded=loss_mask.size - kept,
        cut=int(pieces.length[useful & (pieces.start > 0)].sum()),
        truncated=truncated,
        dropped=int(lengths.sum()) - kept - truncated,
    )


def batches(
    packed: Rows, *, batch_size: int, seed: int, shuffle: bool = True, per_host: bool = False
) -> grain.MapDataset[Batch]:
    """Serve the rows as an endless sequence of batches, reshuffled every epoch.

    ``ds[i]`` is the batch of step ``i``: a pure function of the rows, ``batch_size``, ``seed`` and
    ``i``, so that a run resumes exactly by going on at its step. Every row comes once an epoch;
    epochs follow without a gap, so that a batch may hold the end of one and the start of the next.
    With fewer rows than ``batch_size``, repeated rows fill the batch.

    Args:
        packed: at least one row.
        batch_size: B, at least 1.
        seed: from 0 to 2**32 - 1.
        shuffle: False for the rows in their order, over and over.
        per_host: read those rows alone that this host's devices hold (``mesh.HostRows``); which
            rows make a batch does not depend on it, so a run may go on with more or fewer hosts.

    Returns:
        Elements are dictionaries of ``tokens``, ``loss_mask``, ``segment_ids`` and ``positions``,
        arrays [B, T].

    Raises:
        UserError: if there are no rows, or ``batch_size`` or ``seed`` is out of range.
    """
    _check_batch(packed, batch_size)
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; accepted: 0 to {2**32 - 1}; choose one of these")
    ds = grain.MapDataset.range(len(packed)).seed(seed)
    ds = ds.shuffle() if shuffle else ds
    read = functools.partial(read_rows, packed, per_host=per_host)
    return ds.repeat().batch(batch_size).map(read)


def read_rows(rows: Any, index: Int[np.ndarray, "B"], *, per_host: bool = False) -> Batch:
    """Return the rows of an index as one batch; of several hosts, this one's alone if ``per_host``.

    Args:
        rows: ``rows[i]`` is a dict of arrays.
        index: of the rows; one may come twice.
        per_host: see ``batches``.
    """
    own = own_rows(len(index)) if per_host else np.arange(len(index))
    read = [rows[int(i)] for i in index[own]]
    batch = {name: np.stack([row[name] for row in read]) for name in read[0]}
    return batch if len(own) == len(index) else HostRows(batch, own, len(index))


def eval_batches(packed: Rows, batch_size: int) -> list[Batch]:
    """Cut the rows into batches, in order, each row once.

    The last batch is filled up with rows of padding: no targets, segment 0, token 0. All batches
    have the same shapes, and sums over ``loss_mask`` are not changed.

    Raises:
        UserError: if there are no rows, or ``batch_size`` is below 1.
    """
    _check_batch(packed, batch_size)
    out = [packed[at : at + batch_size] for at in range(0, len(packed), batch_size)]
    missing = batch_size - len(out[-1]["tokens"])
    out[-1] = {
        name: np.pad(a, ((0, missing), *[(0, 0)] * (a.ndim - 1))) for name, a in out[-1].items()
    }
    return out


def _check_batch(packed: Rows, batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; accepted: 1 or more; raise it")
    if not len(packed):
        raise UserError(
            "the data has no rows of tokens to make batches of; accepted: at least one row; "
            "give examples of two tokens or more, with a target among them"
        )


def fingerprint(packed: Rows) -> str:
    """Hash the arrays and their shapes to 16 hex digits: equal for equal data, in any process."""
    return batches_fingerprint([packed[:]])


def batches_fingerprint(batches: Iterable[Mapping[str, Any]]) -> str:
    """Hash batches as ``fingerprint`` hashes all rows."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, array in batch.items():
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
