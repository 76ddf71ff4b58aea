"""Lay examples out in rows of equal length, and serve the rows as batches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from jaxdistill.errors import UserError
from jaxdistill.kd.rows import Rows
from jaxdistill.mesh import HostRows, own_rows
from jaxdistill.train.encode import Example

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Hold N rows of T tokens.

    Attributes:
        tokens: token ids, the padding id where ``segment_ids`` is 0.
        loss_mask: ``loss_mask[n, t]`` says whether token ``t`` is a target, to be predicted at
            ``t-1``. Never true for the first token of a segment, nor for padding.
        segment_ids: 1, 2, ... within each row; 0 for padding. Tokens of different segments must
            not attend to each other.
        positions: 0, 1, ... within each segment; 0 for padding.
        weights: of each token as a target; None where all weigh 1, and then left out of batches.
    """

    tokens: Int32[np.ndarray, "N T"]
    loss_mask: Bool[np.ndarray, "N T"]
    segment_ids: Int32[np.ndarray, "N T"]
    positions: Int32[np.ndarray, "N T"]
    weights: Float32[np.ndarray, "N T"] | None = None

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.tokens)

    def __getitem__(self, index: int | slice) -> Batch:
        """Give one row, arrays [T], or a slice of rows, arrays [B, T]."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: array[index] for name, array in arrays.items() if array is not None}

    @property
    def num_targets(self) -> int:
        """Count the tokens that are predicted."""
        return int(self.loss_mask.sum())


def pack(examples: Sequence[Example], seq_len: int, *, pad_id: int = 0) -> Packed:
    """Concatenate the examples in order and cut the stream into rows, without a gap.

    An example that a row's border cuts goes on in the next row as a segment of its own, whose
    first token is not a target: n tokens cut into k pieces have n-k targets where ``loss_mask``
    was true for all but the first. Only the last row is padded.

    Args:
        examples: those without tokens are skipped.
        seq_len: T, at least 2.
        pad_id: the id that fills the last row.

    Raises:
        UserError: if ``seq_len`` is below 2.
    """
    lengths = _lengths(examples, seq_len)
    total = int(lengths.sum())
    shape = (-(-total // seq_len), seq_len)
    tokens = np.full(shape, pad_id, np.int32)
    loss_mask = np.zeros(shape, np.bool_)
    starts = np.zeros(shape, np.bool_)  # where a segment begins
    weights = _weights(examples, shape)
    if total and weights is not None:
        weights.reshape(-1)[:total] = np.concatenate([token_weights(e) for e in examples])
    if total:
        tokens.reshape(-1)[:total] = np.concatenate([e.tokens for e in examples])
        loss_mask.reshape(-1)[:total] = np.concatenate([e.loss_mask for e in examples])
        starts.reshape(-1)[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        starts[:, 0] = True
    index = np.broadcast_to(np.arange(seq_len, dtype=np.int32), shape)
    segment_ids = np.cumsum(starts, axis=1, dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    segment_ids.reshape(-1)[total:] = 0
    positions.reshape(-1)[total:] = 0
    return Packed(
        tokens=tokens,
        loss_mask=loss_mask & ~starts,
        segment_ids=segment_ids,
        positions=positions,
        weights=weights,
    )


def no_packing(examples: Sequence[Example], seq_len: int, *, pad_id: int = 0) -> Packed:
    """Give every example a row of its own, truncated or padded to ``seq_len`` tokens.

    Examples of fewer than two tokens, which have nothing to predict, are dropped.

    Args:
        examples: in the order of the rows.
        seq_len: T, at least 2.
        pad_id: the id that fills the rows.

    Raises:
        UserError: if ``seq_len`` is below 2.
    """
    lengths = _lengths(examples, seq_len)
    kept = [e for e, n in zip(examples, lengths, strict=True) if n >= 2]
    lengths = np.minimum(lengths[lengths >= 2], seq_len)
    index = np.arange(seq_len, dtype=np.int32)
    filled = index[None, :] < lengths[:, None]
    tokens = np.full(filled.shape, pad_id, np.int32)
    loss_mask = np.zeros(filled.shape, np.bool_)
    weights = _weights(kept, filled.shape)
    if weights is not None:
        weights[filled] = np.concatenate([token_weights(e)[:seq_len] for e in kept])
    if kept:
        tokens[filled] = np.concatenate([e.tokens[:seq_len] for e in kept])
        loss_mask[filled] = np.concatenate([e.loss_mask[:seq_len] for e in kept])
    loss_mask[:, 0] = False
    return Packed(
        tokens=tokens,
        loss_mask=loss_mask,
        segment_ids=filled.astype(np.int32),
        positions=np.where(filled, index[None, :], np.int32(0)),
        weights=weights,
    )


def _weights(examples: Sequence[Example], shape: tuple[int, ...]) -> np.ndarray | None:
    """Return ones to fill in where any example has a weight of its own, None where none has."""
    weighted = any(e.weights is not None for e in examples)
    return np.ones(shape, np.float32) if weighted else None


def token_weights(example: Example) -> Float32[np.ndarray, "n"]:
    """Return the weight of each of an example's tokens."""
    ones = np.ones(len(example.tokens), np.float32)
    return ones if example.weights is None else example.weights


def _lengths(examples: Sequence[Example], seq_len: int) -> np.ndarray:
    """Count the tokens of each example; also check the row length."""
    if seq_len < 2:
        raise UserError(
            f"seq_len is {seq_len}; accepted: 2 or more, as the first token of a row is never "
            "predicted; raise it"
        )
    return np.fromiter((len(e.tokens) for e in examples), np.int64, len(examples))


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
            "give examples of two tokens or more"
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
