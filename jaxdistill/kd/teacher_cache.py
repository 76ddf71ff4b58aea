"""Read a teacher's predictions from disk: k likeliest tokens and a tail for each place.

``DIR/cache.json`` says what the cache is of; shards ``DIR/00000.{log_probs,indices,log_tail}.npy``
hold a range of rows each. A shard's files appear whole or not at all, the tail's last, so that a
kill at any time costs at most the shard that was being made. ``DIR/checksums.jsonl`` has a line
``[name, size, CRC-32]`` for each file. Every place of a row is kept, at which the next token is
predicted, targets or not.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill._checksums import Checksums, checksum
from jaxdistill.errors import UserError
from jaxdistill.kd.rows import Rows
from jaxdistill.losses.loss import Loss, parse_loss
from jaxdistill.models.json_text import read_object

FORMAT = 1
PARTS = ("log_probs", "indices", "log_tail")  # the order of writing
HEADER, CHECKSUMS = "cache.json", "checksums.jsonl"
_SHARD = re.compile(rf"(\d{{5,12}})\.(?:{'|'.join(PARTS)})\.npy")
_WHAT = {
    "model": "give the teacher that was cached, or cache this one",
    "tokenizer": "give a student of the teacher's family, or cache a teacher of this tokenizer",
    "data": "give the data and options (--data, --eval-data, --seq-len, --loss-on, --packing, "
    "--curriculum) that were cached, or cache these",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheHeader:
    """Say what a cache holds and what of; the contents of ``cache.json``.

    Attributes:
        k: tokens kept of each place.
        temperature: of the softmax that was cached: the temperature of any loss on it.
        precision: float type of the log-probabilities.
        vocab_size: tokens of the teacher's vocabulary.
        rows: rows of data, in their order.
        seq_len: places of a row.
        rows_per_shard: rows of each shard but the last.
        bytes_per_token: on disk, without the 128 bytes that begin each file.
        fingerprints: of ``model``, ``tokenizer`` and ``data``.
        teachers: what the user called them.
        mixture: how several became one.
        dtype: type in which the teachers ran.
        format: version of this layout.

    Raises:
        ValueError: a size is no positive whole number, or what is written has another type.
    """

    k: int
    temperature: float
    precision: str
    vocab_size: int
    rows: int
    seq_len: int
    rows_per_shard: int
    bytes_per_token: int
    fingerprints: Mapping[str, str]
    teachers: tuple[str, ...]
    mixture: str
    dtype: str = "float32"
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("k", "vocab_size", "rows", "seq_len", "rows_per_shard"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**48:
                raise ValueError(f"{name} is {value!r}")
        if self.k > self.vocab_size or self.precision not in ("float16", "float32"):
            raise ValueError(f"k is {self.k}, the precision {self.precision!r}")
        if type(self.temperature) not in (int, float) or not 0 < self.temperature < 1e30:
            raise ValueError(f"the temperature is {self.temperature!r}")
        texts = (self.mixture, self.dtype, *self.teachers)
        if not isinstance(self.fingerprints, Mapping) or not all(
            isinstance(text, str) for text in (*texts, *self.fingerprints.values())
        ):
            raise ValueError("a name is no text")

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Return the type of each part on disk."""
        ids = np.uint16 if self.vocab_size <= 2**16 else np.int32
        number = np.dtype(self.precision)
        return {"log_probs": number, "indices": np.dtype(ids), "log_tail": number}

    @property
    def shards(self) -> int:
        """Count the shards."""
        return -(-self.rows // self.rows_per_shard)

    def shape_of(self, shard: int, part: str) -> tuple[int, ...]:
        """Return the shape of a shard's part."""
        rows = min(self.rows_per_shard, self.rows - shard * self.rows_per_shard)
        return (rows, self.seq_len) + (() if part == "log_tail" else (self.k,))


def shard_file(directory: Path, shard: int, part: str) -> Path:
    """Return where a part of a shard lies."""
    return directory / f"{shard:05d}.{part}.npy"


def _open_part(directory: Path, header: CacheHeader, shard: int, part: str) -> np.ndarray | None:
    """Map a part of a shard; None where it is missing, cut off or of another shape."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = np.load(shard_file(directory, shard, part), mmap_mode="r", allow_pickle=False)
    except Exception:  # numpy's header is Python's syntax, and raises a dozen kinds
        return None
    if not isinstance(found, np.ndarray):
        return None
    right = found.dtype == header.dtypes[part] and found.shape == header.shape_of(shard, part)
    return found if right else None


def read_checksums(directory: Path) -> Checksums | None:
    """Read the checksum of each file; None where the cache has none, as one of another program.

    A line that cannot be read is left out: its file does not count as whole then.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        return None
    sums: Checksums = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            name, *pair = json.loads(line)
            sums[str(name)] = pair
        except (ValueError, TypeError):
            continue
    return sums


def damaged_part(
    directory: Path, header: CacheHeader, shard: int, sums: Checksums | None
) -> str | None:
    """Name a file of a shard that is cut off, of another shape or not what was written.

    None where all are whole; the name of a missing file is returned too.
    """
    for part in PARTS:
        file = shard_file(directory, shard, part)
        if _open_part(directory, header, shard, part) is None:
            return file.name
        if sums is not None and sums.get(file.name) != checksum(file):
            return file.name
    return None


def read_header(path: Path) -> CacheHeader:
    """Read ``cache.json``; raise ``UserError`` where it is missing, damaged or another's."""
    sums = read_checksums(path)
    if not (path / HEADER).is_file():
        raise UserError(
            f"{path} holds no teacher cache; give a directory that `jaxdistill cache-teacher` wrote"
        )
    if sums is not None and sums.get(HEADER) != checksum(path / HEADER):
        raise UserError(
            f"{path / HEADER} is damaged (it differs from {CHECKSUMS}); write the cache again"
        )
    try:
        said = read_object(path / HEADER)
        version = said["format"]
        if version == FORMAT:
            said["teachers"] = tuple(said["teachers"])
            return CacheHeader(**said)
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise UserError(
            f"{path / HEADER} is damaged ({type(e).__name__}); write the cache again"
        ) from None
    raise UserError(
        f"{path} has the cache format {version}; accepted: {FORMAT}; write the cache again"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherCache:
    """Read a finished cache, memory-mapped; ``open_cache`` makes one.

    Attributes:
        path: its directory.
        header: what it holds.
    """

    path: Path
    header: CacheHeader
    _mapped: dict[tuple[int, str], np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Count the rows."""
        return self.header.rows

    def __getitem__(self, index: int | slice) -> dict[str, np.ndarray]:
        """Give what a row's or a slice of rows' batch needs of the teacher.

        ``teacher_log_probs`` and ``teacher_indices`` ``[..., T, k]``, likeliest first, and
        ``teacher_log_tail`` ``[..., T]``, in the types on disk. Losses renormalise them: rounded
        probabilities need not add up to 1.
        """
        if isinstance(index, slice):
            rows = range(*index.indices(len(self)))
            if rows.step != 1:
                parts = [self[i] for i in rows]
                found = {name: [part[name] for part in parts] for name in _FIELDS}
                return {
                    name: np.stack(found[name]) if parts else self._none(name) for name in found
                }
            return {name: self._between(name, rows.start, rows.stop) for name in _FIELDS}
        at = range(len(self))[index]  # raises IndexError beyond the end
        return {name: self._between(name, at, at + 1)[0] for name in _FIELDS}

    def _none(self, name: str) -> np.ndarray:
        part = _FIELDS[name]
        return np.empty((0, *self.header.shape_of(0, part)[1:]), self.header.dtypes[part])

    def _between(self, name: str, start: int, stop: int) -> np.ndarray:
        size, parts = self.header.rows_per_shard, [self._none(name)]
        for shard in range(start // size, -(-stop // size)):
            from_, to = max(start - shard * size, 0), min(stop - shard * size, size)
            parts.append(self._part(shard, _FIELDS[name])[from_:to])
        return np.concatenate(parts)

    def _part(self, shard: int, part: str) -> np.ndarray:
        if (shard, part) not in self._mapped:
            found = _open_part(self.path, self.header, shard, part)
            if found is None:
                raise UserError(
                    f"{shard_file(self.path, shard, part)} was removed or changed while the cache "
                    "is in use; resume `jaxdistill cache-teacher` to make it again"
                )
            if len(self._mapped) >= _MAPPED:  # the system allows some tens of thousands
                self._mapped.clear()
            self._mapped[shard, part] = found
        return self._mapped[shard, part]


_MAPPED = 3 * 1024
_THREADS = 4
_FIELDS = {f"teacher_{part}": part for part in PARTS}


def open_cache(
    directory: str | Path, fingerprints: Mapping[str, str] | None = None
) -> TeacherCache:
    """Open a finished cache of this model, tokenizer and data.

    Args:
        directory: what ``cache-teacher`` or ``write_cache`` wrote.
        fingerprints: any of ``model``, ``tokenizer`` and ``data``; those given must be the cache's.

    Raises:
        UserError: there is no cache, it is not finished or damaged, or a fingerprint differs.
    """
    path = Path(directory)
    header = read_header(path)
    for name, now in (fingerprints or {}).items():
        cached = header.fingerprints.get(name)
        if cached != now:
            raise UserError(
                f"{path} is of the {name} {cached}, and the {name} here is {now}; "
                f"accepted: the same {name}; {_WHAT.get(name, 'cache it again')}"
            )
    # By what is there, not by what the header says there should be: that may be any number.
    here = {int(m[1]) for file in path.iterdir() if (m := _SHARD.fullmatch(file.name))}
    here = sorted(shard for shard in here if shard < header.shards)
    sums = read_checksums(path)
    with ThreadPoolExecutor(_THREADS) as pool:
        bad = list(pool.map(lambda shard: damaged_part(path, header, shard, sums), here))
    whole = [shard for shard, name in zip(here, bad, strict=True) if name is None]
    if len(whole) < header.shards:
        done = sum(header.shape_of(shard, "log_tail")[0] for shard in whole)
        changed = [name for name in bad if name is not None and (path / name).exists()]
        what = f"is damaged ({changed[0]} is cut off or changed)" if changed else "is not finished"
        raise UserError(
            f"{path} {what}: {done} of {header.rows} rows are whole; run the same "
            "`jaxdistill cache-teacher` with --resume"
        )
    return TeacherCache(path, header)


@dataclasses.dataclass(frozen=True, eq=False)
class CachedRows:
    """Serve rows with what the cache knows of them; ``train.packing.batches`` takes it.

    Attributes:
        rows: the rows that were cached, in their order.
        cache: of these rows.
    """

    rows: Rows
    cache: TeacherCache

    def __post_init__(self) -> None:
        header = self.cache.header
        shape = (len(self.rows), self.rows[:1]["tokens"].shape[1])
        if shape != (header.rows, header.seq_len):
            raise UserError(
                f"{self.cache.path} is of {header.rows} rows of {header.seq_len} tokens, and here "
                f"are {shape[0]} of {shape[1]}; {_WHAT['data']}"
            )

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> dict[str, np.ndarray]:
        """Give one row or a slice of rows, the teacher's part included."""
        return self.rows[index] | self.cache[index]

    def confidence(self) -> float:
        """Return the mean of the teacher's largest probability, over the targets, for ``cakld``.

        Raises:
            UserError: the cache has another temperature than 1, or no row has a target.
        """
        if self.cache.header.temperature != 1:
            raise UserError(
                f"{self.cache.path} has the temperature {self.cache.header.temperature}, at which "
                "cakld's confidence is not to be measured; write cakld:confidence=NUMBER"
            )
        return self._mean_over_targets(1)

    def kept(self) -> float:
        """Return the mean probability of the k kept tokens together, over the targets."""
        return self._mean_over_targets(self.cache.header.k)

    def _mean_over_targets(self, n: int) -> float:
        """Return the mean probability of the n likeliest tokens, where a target is predicted."""
        total, count = 0.0, 0
        for i in range(len(self)):
            mask = self.rows[i]["loss_mask"][1:].astype(bool)  # the place before predicts a target
            log_p = self.cache[i]["teacher_log_probs"][:-1, :n].astype(np.float32)
            total += float(np.exp(log_p[mask]).sum())
            count += int(mask.sum())
        if not count:
            raise UserError("the data hold no target token; give longer texts")
        return total / count


def check_loss(cache: TeacherCache, loss: Loss | str, *, correction: Any = None) -> None:
    """Raise ``UserError`` where a loss asks for what a cached teacher cannot tell.

    Args:
        cache: gives the temperature, which each term that compares with the teacher must have: what
            was summed into the tail cannot be softened afterwards.
        loss: as ``parse_loss`` reads it.
        correction: of the teacher by labels, which needs its logit of any label.
    """
    at = cache.header.temperature
    if correction is not None:
        raise UserError(
            "a correction by labels needs the teacher's logit of every label, and the cache has "
            f"the {cache.header.k} likeliest; leave the correction out, or give a live teacher"
        )
    for term in (parse_loss(loss) if isinstance(loss, str) else loss).terms:
        name, inputs = term.entry.name, term.entry.inputs
        if term.entry.kind != "divergence" or {"teacher_logits", "targets"} <= set(inputs):
            raise UserError(
                f"{name} needs a live teacher, and {cache.path} holds only the {cache.header.k} "
                "likeliest tokens of each place; accepted: divergences and ce; give --teacher "
                "without a cache"
            )
        given = term.arguments.get("temperature", 1.0)
        if "teacher_logits" in inputs and given != at:
            said = f"{given[0]:g}..{given[1]:g}" if isinstance(given, tuple) else given
            raise UserError(
                f"{name} has the temperature {said} and {cache.path} was made at {at:g}; "
                f"accepted: {name}:temperature={at:g}, or cache the teacher again with "
                f"--temperature at the loss's"
            )
