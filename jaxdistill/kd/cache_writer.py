"""Write a teacher's predictions to disk, shard by shard; ``kd.teacher_cache`` reads them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax import lax

from jaxdistill._checksums import checksum
from jaxdistill._disk import LOCK, DirectoryLock, append, reason_of, retried, write_whole
from jaxdistill.errors import UserError
from jaxdistill.kd import teachers as _teachers  # noqa: F401  fills the registry
from jaxdistill.kd.objective import head_of, next_token_targets
from jaxdistill.kd.rows import Rows
from jaxdistill.kd.teacher_cache import (
    CHECKSUMS,
    HEADER,
    PARTS,
    CacheHeader,
    TeacherCache,
    damaged_part,
    open_cache,
    read_checksums,
    read_header,
    shard_file,
)
from jaxdistill.losses.chunked import CHUNK, Head, join_chunks, pad_and_split
from jaxdistill.losses.loss import Term, parse_term
from jaxdistill.losses.top_k import TopK, top_k_of
from jaxdistill.mesh import fetch, on_primary, place_batch
from jaxdistill.models.decoder import ApplyFn

_LOWEST = -6e4  # exp of it is 0; float16 ends at -65504
_SHARD_BYTES = 16 * 2**20


def bytes_per_token(k: int, vocab_size: int, precision: str = "float16") -> int:
    """Return the bytes that a place takes on disk: k ids and log-probabilities, and the tail."""
    number = np.dtype(precision).itemsize
    return min(k, vocab_size) * (number + (2 if vocab_size <= 2**16 else 4)) + number


def _predictor(
    teachers: Sequence[ApplyFn],
    mixture: Term,
    k: int,
    temperature: float,
    vocab_size: int | None,
    chunk: int,
) -> Callable[[Any, Any], TopK]:
    """Return ``(params of each teacher, batch) -> TopK`` of shapes ``[B, T, ...]``, jitted.

    The logits of ``chunk`` tokens exist at a time, those of every teacher included.
    """

    @jax.jit
    def predict(params: Any, batch: Any) -> TopK:
        inputs = (batch["tokens"], batch.get("positions"), batch.get("segment_ids"))
        heads = [head_of(t(p, *inputs), vocab_size) for t, p in zip(teachers, params, strict=True)]
        targets = next_token_targets(batch)[0]
        size = min(chunk, targets.shape[0])

        def one(x):
            hidden, targets = x
            logits = [
                Head(h, head.kernel, head.softcap).logits()
                for h, head in zip(hidden, heads, strict=True)
            ]
            if len(logits) > 1:
                logits = [mixture.entry.function(logits, targets, **mixture.given({}))]
            return top_k_of(logits[0], k, temperature)

        hidden = [pad_and_split(head.hidden, size) for head in heads]
        found = lax.map(one, (hidden, pad_and_split(targets, size)))
        shape = batch["tokens"].shape
        return jax.tree.map(
            lambda x: join_chunks(x, targets.shape[0]).reshape(*shape, *x.shape[2:]), found
        )

    return predict


def write_cache(
    directory: str | Path,
    teacher: ApplyFn | Sequence[ApplyFn],
    params: Any,
    rows: Rows,
    *,
    k: int = 64,
    temperature: float | int = 1.0,
    mixture: str = "mean",
    precision: Literal["float16", "float32"] = "float16",
    rows_per_shard: int | None = None,
    batch_size: int = 8,
    vocab_size: int | None = None,
    chunk: int = CHUNK,
    fingerprints: Mapping[str, str],
    teachers: Sequence[str] = (),
    dtype: str = "float32",
    resume: bool = False,
    progress: Callable[[int, bool], None] | None = None,
) -> TeacherCache:
    """Run teachers over all rows and keep their predictions.

    Args:
        directory: new or empty; with ``resume`` one that was begun with the same arguments.
        teacher: an ``ApplyFn``, or several, whose ``params`` are then a sequence too.
        params: the teacher's.
        rows: the training rows, ``[N, T]``.
        k: tokens to keep of each place; all others become one number.
        temperature: of the softmax; a loss on the cache must have the same.
        mixture: how several teachers become one (``kd.teachers``).
        precision: float type on disk. float16 rounds log-probabilities by up to one part in 2,048.
        rows_per_shard: default, about 16 MiB a shard.
        batch_size: rows that the teacher sees at once.
        vocab_size: tokens of a padded vocabulary that exist; None for all rows of the head.
        chunk: tokens whose logits exist at once.
        fingerprints: of ``model``, ``tokenizer`` and ``data``, to be checked on reading.
        teachers: their names, for the record.
        dtype: type in which they run, for the record.
        resume: go on with a cache; whole shards are kept, others are made again.
        progress: is told how many rows are done, each time some are, and whether they were made
            now (False: found whole).

    Raises:
        UserError: a bad argument, a directory that holds something else, a teacher whose
            predictions are not finite, or a full disk.
    """
    several = (teacher,) if callable(teacher) else tuple(teacher)
    own = (params,) if callable(teacher) else tuple(params)
    for name, given in (("k", k), ("batch_size", batch_size), ("chunk", chunk)):
        if given < 1:
            raise UserError(f"{name} is {given}; accepted: 1 or more; raise it")
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; accepted: above 0; raise it")
    if not len(rows):
        raise UserError("the data has no rows of tokens to cache; give longer texts")
    term = parse_term(mixture, "mixture")
    if vocab_size is None:
        first: Any = rows[:1]
        inputs = (first["tokens"], first.get("positions"), first.get("segment_ids"))
        out = jax.eval_shape(lambda p: several[0](p, *inputs), own[0])
        vocab_size = int(out.head.shape[0])
    seq_len = int(rows[:1]["tokens"].shape[1])
    each = bytes_per_token(k, vocab_size, precision)
    if rows_per_shard is None:
        batches = max(1, _SHARD_BYTES // (each * seq_len * batch_size))
        rows_per_shard = batches * batch_size
    header = CacheHeader(
        k=min(k, vocab_size),
        temperature=float(temperature),
        precision=precision,
        vocab_size=vocab_size,
        rows=len(rows),
        seq_len=seq_len,
        rows_per_shard=rows_per_shard,
        bytes_per_token=each,
        fingerprints=dict(fingerprints),
        teachers=tuple(teachers),
        mixture=mixture if len(several) > 1 else "",
        dtype=dtype,
    )
    path = Path(directory)
    predict = _predictor(several, term, header.k, float(temperature), vocab_size, chunk)
    try:
        with contextlib.ExitStack() as held:

            def begin() -> None:
                begun = _begun(path, header, resume)
                path.mkdir(parents=True, exist_ok=True)
                held.enter_context(DirectoryLock(path))
                if not begun and not _begun(path, header, resume):  # as it is now, no other writer
                    text = json.dumps(dataclasses.asdict(header), indent=2) + "\n"
                    (path / CHECKSUMS).unlink(missing_ok=True)
                    _write(path / HEADER, text.encode())
                else:
                    _tidy(path)

            on_primary(begin, f"write {path}")
            sums = read_checksums(path) or {}
            for shard in range(header.shards):
                start = shard * rows_per_shard
                stop = min(start + rows_per_shard, len(rows))
                if damaged_part(path, header, shard, sums) is None:
                    if progress is not None:
                        progress(stop - start, False)
                    continue
                parts = _predicted(predict, own, rows, start, stop, batch_size, header, progress)
                write = functools.partial(_write_shard, path, header, shard, parts)
                on_primary(write, f"write {path}")
            on_primary(lambda: _tidy(path), f"clear {path}")
    except OSError as e:
        raise UserError(
            f"{path} cannot be written ({reason_of(e)}); make room or choose another directory, "
            "and resume"
        ) from None
    return open_cache(path, fingerprints)


def _predicted(predict, params, rows, start, stop, batch_size, header, progress):
    """Return the parts of rows ``start`` to ``stop``; the last batch is filled with zeros."""
    found: list[dict[str, np.ndarray]] = []
    for at in range(start, stop, batch_size):
        batch = rows[at : min(at + batch_size, stop)]
        names = ("tokens", "loss_mask", "positions", "segment_ids")
        batch = {name: batch[name] for name in names if name in batch}
        n = len(batch["tokens"])
        batch = {name: np.pad(a, ((0, batch_size - n), (0, 0))) for name, a in batch.items()}
        top = predict(params, place_batch(batch))
        parts = {part: fetch(getattr(top, part))[:n] for part in PARTS}
        if not all(np.isfinite(np.exp(parts[part])).all() for part in ("log_probs", "log_tail")):
            raise UserError(
                f"the teacher's probabilities in rows {at} to {at + n - 1} are not finite; nothing "
                "of them is cached; look at the teacher's weights and the data"
            )
        for part in ("log_probs", "log_tail"):
            parts[part] = np.maximum(parts[part], np.float32(_LOWEST))
        found.append({part: a.astype(header.dtypes[part]) for part, a in parts.items()})
        if progress is not None:
            progress(n, True)
    return {part: np.concatenate([x[part] for x in found]) for part in PARTS}


def _tidy(path: Path) -> None:
    """Remove half-written files, and sort the checksums, without a line that a kill cut off."""
    for left in path.glob("*.part"):
        left.unlink()
    lines = [[name, *pair] for name, pair in sorted((read_checksums(path) or {}).items())]
    write_whole(path / CHECKSUMS, "".join(json.dumps(line) + "\n" for line in lines))


def _write_shard(
    path: Path, header: CacheHeader, shard: int, parts: Mapping[str, np.ndarray]
) -> None:
    for part in PARTS:
        assert parts[part].shape == header.shape_of(shard, part)
        file = io.BytesIO()
        np.save(file, parts[part])
        _write(shard_file(path, shard, part), file.getvalue())


def _begun(path: Path, header: CacheHeader, resume: bool) -> bool:
    """Return whether a directory holds this cache; raise ``UserError`` if it can be neither."""
    known = path / HEADER
    if known.is_file():
        before, now = read_header(path), header
        if not resume:
            raise UserError(
                f"{path} already holds a teacher cache; resume it, or choose another directory"
            )
        for field in dataclasses.fields(CacheHeader):
            old, new = (getattr(h, field.name) for h in (before, now))
            if old != new:
                raise UserError(
                    f"{path} was started with {field.name} {old!r}, now it is {new!r}; resume "
                    "with the same model, data and options, or choose another directory"
                )
        return True

    def ours(file: Path) -> bool:
        return file.suffix == ".part" or file.name in (LOCK, CHECKSUMS)

    if path.exists() and (not path.is_dir() or not all(ours(file) for file in path.iterdir())):
        raise UserError(f"{path} exists and is not a teacher cache; choose another directory")
    if resume:
        raise UserError(f"{path} holds no teacher cache to resume; start it without resume")
    return False


def _write(path: Path, content: bytes) -> None:
    """Write a file of the cache and its checksum; the file whole or not at all, and read back."""
    write_whole(path, content)
    pair = [len(content), zlib.crc32(content)]
    if checksum(path) != pair:
        raise UserError(f"{path} does not read back as it was written; look at the disk")
    retried(lambda: append(path.with_name(CHECKSUMS), json.dumps([path.name, *pair]) + "\n"))
