"""A synthetic set on disk: the arrays that train with it, and the same as an ordinary data set.

A directory holds ``synthetic.safetensors`` (arrays ``learned/...`` and ``fixed/...``, everything
else as JSON in the header), one data file for other programs (``train.jsonl`` at the level of
text, ``train.parquet`` at every other) and ``checksums.crc32``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64
from safetensors.numpy import save_file

from jaxdistill._checksums import MANIFEST, check_directory, seal
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.errors import UserError
from jaxdistill.models.json_text import parse_json
from jaxdistill.models.safetensors import SafetensorsFile

Level = Literal["features", "embeddings", "images", "text"]
# What rows of embeddings for a language model hold, each place's; answers and embeddings are wider.
ROWS = ("embeddings", "teacher_logits", "tokens", "loss_mask", "positions", "segment_ids")
ARRAYS = "synthetic.safetensors"
TEXTS, TABLE = "train.jsonl", "train.parquet"
_FORMAT = "jaxdistill synthetic set 1"
_HEADER = ("level", "method", "classes", "texts", "settings", "slices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredSet:
    """Hold a synthetic set and what must be known to train with it.

    Attributes:
        synthetic: M examples. Every array has M rows, but ``log_rates`` (``[]`` or ``[K]``).
        level: what ``inputs`` are: a model's features, input embeddings, images; at the level of
            text the examples are ``texts`` themselves. Rows that language models train on have no
            inputs but all of ``ROWS``, as ``kd_objective`` reads a batch.
        method: what made the set.
        classes: their names, in the order of ``labels`` and ``label_logits``; without classes those
            arrays mean what the task says (language modelling) and the data file leaves them out.
        texts: of each example the nearest or the real text; None where there is none.
        settings: JSON values: the model that made the features and its fingerprint, inner steps
            and rate, architecture, fingerprint of the source data.
        slices: name to the rows in it.
    """

    synthetic: Synthetic
    level: Level
    method: str
    classes: tuple[str, ...] = ()
    texts: tuple[str, ...] | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    slices: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise UserError(
                f"level {self.level!r} given; accepted: {', '.join(get_args(Level))}; choose one"
            )
        self._check_arrays()
        size = self.synthetic.size
        if self.level == "text" and self.texts is None:
            raise UserError("a set at the level of text has no texts; give one an example")
        if self.texts is not None and len(self.texts) != size:
            raise UserError(
                f"{len(self.texts)} texts given for {size} examples; give one an example"
            )
        for name, rows in self.slices.items():
            if not all(0 <= row < size for row in rows):
                raise UserError(
                    f"slice {name!r} names the rows {rows}; accepted: 0 to {size - 1}; correct it"
                )
        try:
            json.dumps([self.settings, self.slices], allow_nan=False)
        except (TypeError, ValueError) as e:
            raise UserError(
                f"settings or slices that JSON cannot hold ({e}); accepted: strings, finite "
                "numbers, booleans, None, lists and dicts of them; convert the others"
            ) from None

    def _check_arrays(self) -> None:
        batch = {name: np.asarray(x) for name, x in self.synthetic.batch().items()}
        if self.has_rows:
            _check_rows(batch)
        elif not batch or (self.level != "text" and "inputs" not in batch):
            raise UserError(
                f"a set at the level of {self.level} holds {', '.join(batch) or 'no arrays'}; "
                "accepted: inputs (at the level of text any array) and labels; add them"
            )
        shapes = {name: x.shape for name, x in batch.items()}
        if any(not s or s[0] != self.synthetic.size or 0 in s for s in shapes.values()):
            raise UserError(
                f"arrays of the shapes {shapes} given; accepted: one number of rows for all of "
                "them, none empty; correct them"
            )
        rates = np.asarray(self.synthetic.learned.get("log_rates", 0.0))
        if rates.ndim > 1:
            raise UserError(f"log_rates of the shape {rates.shape} given; accepted: [] or [K]")
        for name, x in {**batch, "log_rates": rates}.items():
            if not np.issubdtype(x.dtype, np.number) and x.dtype.kind not in "bV":
                raise UserError(f"{name} has the type {x.dtype}; give an array of numbers")
            if jnp.issubdtype(x.dtype, jnp.floating) and not np.isfinite(x).all():
                raise UserError(
                    f"{name} of the synthetic set is not finite; condense again at a lower rate"
                )
        classes = len(self.classes)
        if not classes:
            return
        if len(set(self.classes)) < classes:
            raise UserError(f"classes {self.classes} given twice; give each class its own name")
        labels, logits = batch.get("labels"), batch.get("label_logits")
        if logits is not None and logits.shape[1:] != (classes,):
            raise UserError(
                f"label_logits of the shape {logits.shape} given for {classes} classes; "
                f"accepted: ({self.synthetic.size}, {classes}); correct the classes"
            )
        if labels is not None and (
            labels.ndim != 1
            or not np.issubdtype(labels.dtype, np.integer)
            or not 0 <= labels.min() <= labels.max() < classes
        ):
            raise UserError(
                f"labels of the shape {labels.shape} and type {labels.dtype} from {labels.min()} "
                f"to {labels.max()} given; accepted: one whole number from 0 to {classes - 1} an "
                "example; correct the labels or the classes"
            )

    @property
    def has_rows(self) -> bool:
        """Return whether these are rows of embeddings that language models train on."""
        names = self.synthetic.batch()
        return self.level == "embeddings" and "inputs" not in names and "embeddings" in names

    def labels(self) -> tuple[Int64[np.ndarray, "M"], Float32[np.ndarray, "M C"]]:
        """Return hard labels and probabilities: the soft labels', or a one-hot row.

        Raises:
            UserError: the set has no labels.
        """
        batch = self.synthetic.batch()
        if not self.has_labels:
            raise UserError(
                f"a set of {', '.join(batch)} has no labels of {len(self.classes)} classes; "
                "accepted: labels or label_logits, and classes; add them"
            )
        if "label_logits" in batch:
            logits = np.asarray(batch["label_logits"], np.float64)
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            probs = shares / shares.sum(axis=1, keepdims=True)
        else:
            probs = np.eye(len(self.classes))[np.asarray(batch["labels"])]
        labels = np.asarray(batch["labels"]) if "labels" in batch else probs.argmax(axis=1)
        return labels.astype(np.int64), probs.astype(np.float32)

    @property
    def has_labels(self) -> bool:
        """Return whether the set has labels of named classes."""
        return bool(self.classes) and bool({"labels", "label_logits"} & set(self.synthetic.batch()))

    @property
    def data_file(self) -> str:
        """Return the name of the data file for other programs."""
        return TEXTS if self.level == "text" else TABLE


def save_set(directory: str | os.PathLike[str], stored: StoredSet) -> Path:
    """Write a set as a directory, whole or not at all; a set that is there before is replaced.

    ``train.jsonl`` has a row ``{"text", "label", "label_name", "label_probs"}`` an example,
    ``train.parquet`` the columns ``inputs`` (flattened, its ``shape`` beside it), ``label``,
    ``label_probs``, ``text`` and every other array of the set, each where the set has it.
    ``label_probs`` is the softmax of ``label_logits``, or the hard label's one-hot row.

    Raises:
        UserError: the directory holds something else, or cannot be written.
    """
    target = Path(directory).absolute()
    old = target.with_name(f".jaxdistill.{os.getpid()}.old")
    part = target.with_name(f".jaxdistill.{os.getpid()}.part")
    try:
        _check_target(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        _write_arrays(part / ARRAYS, stored)
        if stored.level == "text":
            rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in _text_rows(stored))
            (part / TEXTS).write_text("".join(rows), encoding="utf-8")
        else:
            pq.write_table(_table(stored), part / TABLE)
        seal(part)
        _check_written(part, stored)
        if target.exists():
            target.rename(old)
        try:
            part.rename(target)
        except BaseException:  # an interruption too must not cost the set that was there
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    except OSError as e:
        raise UserError(
            f"cannot write {str(target)!r} ({e.strerror or e}); give a directory that can be made"
        ) from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return target


def _check_written(part: Path, stored: StoredSet) -> None:
    """Raise ``UserError`` where a set does not read back as it was written."""
    pairs = zip(
        *(jax.tree.leaves(s.synthetic.batch()) for s in (load_set(part), stored)), strict=True
    )
    if not all(np.array_equal(a, np.asarray(jnp.asarray(b))) for a, b in pairs):
        raise UserError(f"{part} does not read back as it was written; look at the disk")


def load_set(directory: str | os.PathLike[str]) -> StoredSet:
    """Read what ``save_set`` wrote.

    Raises:
        UserError: there is no set, a file is cut off or differs from the checksums, or the arrays
            do not fit together or are not finite.
    """
    path = Path(directory) / ARRAYS
    if not path.is_file():
        raise UserError(
            f"{str(directory)!r} holds no {ARRAYS}; give the directory of a synthetic set"
        )
    check_directory(Path(directory))
    file = SafetensorsFile(path)
    metadata = file.metadata
    if metadata.get("format") != _FORMAT:
        raise UserError(
            f"{path} has the format {metadata.get('format')!r}; accepted: {_FORMAT!r}; "
            "condense again, or load it with the version that wrote it"
        )
    arrays: dict[str, dict[str, Any]] = {"learned": {}, "fixed": {}}
    try:
        header = parse_json(metadata["set"])
        found = {name: header[name] for name in _HEADER}
        _check_header(found)
        for entry in file.entries:
            group, name = entry.split("/", 1)
            with np.errstate(all="ignore"):  # to 32 bits; what is not finite is refused
                arrays[group][name] = jnp.asarray(file.read(entry))
    except (KeyError, ValueError, TypeError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}: {e}); condense again") from None
    texts = found["texts"]
    found |= {
        "synthetic": Synthetic(**arrays),
        "classes": tuple(found["classes"]),
        "texts": None if texts is None else tuple(texts),
    }
    try:
        return StoredSet(**found)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def _check_header(found: dict[str, Any]) -> None:
    """Raise ``TypeError`` where a field of the header has another type than ``StoredSet`` says."""

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)

    slices = found["slices"]
    good = {
        "level": isinstance(found["level"], str),
        "method": isinstance(found["method"], str),
        "classes": texts(found["classes"]),
        "texts": found["texts"] is None or texts(found["texts"]),
        "settings": isinstance(found["settings"], dict),
        "slices": isinstance(slices, dict)
        and all(isinstance(v, list) and all(type(i) is int for i in v) for v in slices.values()),
    }
    for name, fits in good.items():
        if not fits:
            raise TypeError(f"{name} of another type")


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    inside = {file.name for file in target.iterdir()} if target.is_dir() else {target.name}
    others = sorted(inside - {ARRAYS, TEXTS, TABLE, MANIFEST})
    if others:
        raise UserError(
            f"{str(target)!r} holds {others[0]}; accepted: a new or empty directory, or an older "
            "synthetic set, which is replaced; give another directory"
        )


def _write_arrays(path: Path, stored: StoredSet) -> None:
    groups = {"learned": stored.synthetic.learned, "fixed": stored.synthetic.fixed}
    arrays = {
        f"{group}/{name}": np.ascontiguousarray(x).reshape(np.shape(x))  # scalars stay scalars
        for group, members in groups.items()
        for name, x in members.items()
    }
    header = {name: getattr(stored, name) for name in _HEADER}
    save_file(arrays, path, metadata={"format": _FORMAT, "set": json.dumps(header)})


def _check_rows(batch: dict[str, np.ndarray]) -> None:
    """Raise ``UserError`` where rows for language models lack an array, or places differ."""
    missing = [name for name in ROWS if name not in batch]
    if missing:
        raise UserError(
            f"rows of embeddings for language models have no {', '.join(missing)}; accepted: "
            f"{', '.join(ROWS)}; condense again"
        )
    shapes = {name: batch[name].shape for name in ROWS}
    places = shapes["tokens"]
    wide = [len(shapes[name]) == 3 for name in ("embeddings", "teacher_logits")]
    if len(places) != 2 or not all(wide) or any(s[:2] != places for s in shapes.values()):
        raise UserError(
            f"rows of the shapes {shapes} given; accepted: [M, T], embeddings [M, T, D] and "
            "teacher_logits [M, T, V]; condense again"
        )
    least, most, words = batch["tokens"].min(), batch["tokens"].max(), shapes["teacher_logits"][2]
    if not np.issubdtype(batch["tokens"].dtype, np.integer) or not 0 <= least <= most < words:
        raise UserError(
            f"tokens of the type {batch['tokens'].dtype} from {least} to {most} given for "
            f"teacher_logits of {words} words; accepted: whole numbers from 0 to {words - 1}; "
            "condense again"
        )
    if not batch["loss_mask"][:, 1:].any():
        raise UserError("no place of the rows is a target (loss_mask); condense again")


def _text_rows(stored: StoredSet) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"text": text} for text in stored.texts or ()]
    if stored.has_labels:
        labels, probs = stored.labels()
        for row, label, each in zip(rows, labels.tolist(), probs.tolist(), strict=True):
            row |= {"label": label, "label_name": stored.classes[label], "label_probs": each}
    return rows


def _table(stored: StoredSet) -> pa.Table:
    """Lay a set out as columns, with the types that ``datasets`` looks for in the schema."""
    kinds: dict[str, Any] = {}
    columns: dict[str, Any] = {}

    def put(name: str, values: np.ndarray) -> None:
        values = values.astype(np.float32) if values.dtype.name == "bfloat16" else values
        kind = datasets.Value(values.dtype.name)
        flat = pa.array(values.reshape(-1))
        if values.ndim > 1:
            width = int(np.prod(values.shape[1:]))
            kind = datasets.Sequence(kind, length=width)
            flat = pa.FixedSizeListArray.from_arrays(flat, width)
        kinds[name], columns[name] = kind, flat

    for name, x in stored.synthetic.batch().items():
        if name in ("labels", "label_logits"):
            continue
        values = np.asarray(x)
        put(name, values)
        if name == "inputs":
            shape = np.array([values.shape[1:]], np.int64)
            put("shape", np.repeat(shape, len(values), axis=0))
    if stored.has_labels:
        labels, probs = stored.labels()
        put("label", labels)
        kinds["label"] = datasets.ClassLabel(names=list(stored.classes))
        put("label_probs", probs)
    if stored.texts is not None:
        kinds["text"], columns["text"] = datasets.Value("string"), pa.array(stored.texts)
    return pa.table(columns, schema=datasets.Features(kinds).arrow_schema)
