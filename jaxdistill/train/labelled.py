"""Labelled data, texts or arrays."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32

from jaxdistill.errors import UserError
from jaxdistill.train.data import load_rows
from jaxdistill.train.slices import Described
from jaxdistill.train.text_file import EXEMPT, MAX_RATIO

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_FORMS = (
    'rows of {"text", "label"} (.jsonl[.gz], .parquet), or an .npz file of `images` or `inputs` '
    "and `labels`"
)
_WHOLE = {"uint8": np.float32(255), "uint16": np.float32(65535)}  # an image's brightest value


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """Hold N labelled examples.

    Attributes:
        labels: each example's place in ``classes``.
        classes: the names of the classes, in the order of their numbers or of the alphabet.
        texts: the examples, where they are texts.
        inputs: the examples, where they are arrays; bytes and 16-bit integers are brought to 0..1.
        columns: what else is known of each example, by name.
        source: what the user gave, for messages.
    """

    labels: Int32[np.ndarray, "N"]
    classes: tuple[str, ...]
    texts: list[str] | None = None
    inputs: Float32[np.ndarray, "N ..."] | None = None
    columns: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    source: str = ""

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.labels)

    def take(self, rows: Int[np.ndarray, "n"]) -> Labelled:
        """Return some of the examples."""
        return dataclasses.replace(
            self,
            labels=self.labels[rows],
            texts=None if self.texts is None else [self.texts[i] for i in rows],
            inputs=None if self.inputs is None else self.inputs[rows],
            columns={name: [column[i] for i in rows] for name, column in self.columns.items()},
        )

    @property
    def described(self) -> Described:
        """Return what tells an example's slices."""
        columns = dict(self.columns)
        if "label" not in columns:
            columns["label"] = [self.classes[i] for i in self.labels]
        return Described(count=len(self), texts=self.texts, columns=columns, source=self.source)

    def fingerprint(self) -> str:
        """Return 16 hex digits, equal for equal examples, labels and classes, in any process."""
        digest = hashlib.sha256(repr(self.classes).encode())
        digest.update(np.ascontiguousarray(self.labels).data)
        for text in self.texts or ():
            digest.update(text.encode() + b"\0")
        if self.inputs is not None:
            digest.update(repr(self.inputs.shape).encode())
            digest.update(np.ascontiguousarray(self.inputs).tobytes())
        return digest.hexdigest()[:16]


def load_labelled(
    path: str, split: str = "train", *, classes: Sequence[str] | None = None
) -> Labelled:
    """Load labelled texts or arrays.

    Args:
        path: an ``.npz`` file of ``images`` or ``inputs`` ``[N, ...]`` and ``labels`` ``[N]``, or
            anything that ``load_rows`` takes, with a ``label`` in each row.
        split: of a directory or hub data set.
        classes: of the data that these shall be compared with; by default, the labels that occur.

    Raises:
        UserError: the data cannot be read, a label is missing, negative, neither integer nor word,
            or none of ``classes``; or there is one class alone.
    """
    if path.lower().endswith(".npz"):
        found = _load_arrays(path)
    else:
        rows = load_rows(path, split=split)
        columns = {name: list(rows[name]) for name in rows.column_names}
        if "text" not in columns or "label" not in columns:
            raise UserError(
                f"data {path!r} has the columns {', '.join(columns)}; accepted: {_FORMS}; name "
                "the columns so, and give labels of one kind"
            )
        labels, texts = columns.pop("label"), columns.pop("text")
        if None in texts:
            raise UserError(
                f"row {texts.index(None) + 1} of {path!r} has no text; accepted: {_FORMS}; remove "
                "the row"
            )
        found = {"texts": texts, "labels": labels, "columns": columns}
    names = _names(path, list(found.pop("labels")))
    known = tuple(classes) if classes is not None else _classes_of(names)
    strange = sorted({str(name) for name in names} - set(known))
    if strange:
        raise UserError(
            f"data {path!r} has the label {strange[0]!r}; accepted: {', '.join(known)}, the labels "
            "of the training data; correct it"
        )
    if len(known) < 2:
        raise UserError(
            f"data {path!r} has one class alone, {', '.join(known)!r}; accepted: two or more; add "
            "others"
        )
    number = {name: i for i, name in enumerate(known)}
    labels = np.asarray([number[str(name)] for name in names], np.int32)
    return Labelled(labels=labels, classes=known, source=path, **found)


def _names(path: str, labels: Sequence[Any]) -> list[int | str]:
    """Return checked labels: all integers, or all words."""
    names: list[int | str] = []
    for row, label in enumerate(labels, 1):
        if isinstance(label, np.generic):
            label = label.item()
        if isinstance(label, bool):
            label = int(label)
        good = isinstance(label, int) and label >= 0 or isinstance(label, str) and bool(label)
        if not good:
            said = "no label" if label is None or label == "" else f"the label {label!r}"
            raise UserError(
                f"row {row} of {path!r} has {said}; accepted: integers from 0, or words; correct it"
            )
        names.append(label)
    return names


def _classes_of(names: list[Any]) -> tuple[str, ...]:
    return tuple(str(name) for name in sorted(set(names)))


def _load_arrays(path: str) -> dict[str, Any]:
    """Read an ``.npz`` file."""
    if not Path(path).is_file():
        raise UserError(f"data {path!r} does not exist; accepted: {_FORMS}; check the path")
    try:
        arrays = _read_npz(Path(path))
    except Exception as e:  # numpy's header is Python's syntax; a damaged one raises a dozen kinds
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
        raise UserError(
            f"data {path!r} cannot be read ({reason}); accepted: {_FORMS}; write it again"
        ) from None
    name = next((name for name in ("images", "inputs") if name in arrays), None)
    if name is None or "labels" not in arrays:
        raise UserError(
            f"data {path!r} has the arrays {', '.join(arrays)}; accepted: {_FORMS}; name them so"
        )
    inputs, labels = arrays.pop(name), arrays.pop("labels")
    numbers = np.issubdtype(inputs.dtype, np.number) and not np.iscomplexobj(inputs)
    if not numbers or not 2 <= inputs.ndim <= 4 or len(inputs) == 0:
        raise UserError(
            f"data {path!r} has {name} of shape {inputs.shape} and type {inputs.dtype}; accepted: "
            "at least one row of real numbers, [N, D], [N, H, W] or [N, H, W, C]; reshape them"
        )
    if labels.shape != (len(inputs),):
        raise UserError(
            f"data {path!r} has labels of shape {labels.shape} for {len(inputs)} {name}; accepted: "
            "one label each; correct them"
        )
    inputs = np.asarray(inputs, np.float32) / _WHOLE.get(inputs.dtype.name, np.float32(1))
    if not np.isfinite(inputs).all():
        raise UserError(
            f"data {path!r} has {name} that are not finite; accepted: finite numbers; correct them"
        )
    columns = {k: v.tolist() for k, v in arrays.items() if v.shape == labels.shape}
    return {"inputs": inputs, "labels": labels, "columns": columns}


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read every array of an ``.npz`` file, after what it says of their sizes is checked."""
    with path.open("rb") as opened, zipfile.ZipFile(opened) as file:
        size = sum(member.file_size for member in file.infolist())
        if size > max(EXEMPT, MAX_RATIO * path.stat().st_size):
            raise ValueError(f"it unpacks to more than {MAX_RATIO} times its bytes")
        for member in file.infolist():
            with file.open(member) as array, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = _HEADERS[np.lib.format.read_magic(array)]
                shape, _, dtype = read(array)
                # math.prod of whole numbers cannot overflow; numpy would allocate this many bytes.
                if math.prod(shape) * dtype.itemsize > member.file_size:
                    raise ValueError(f"{member.filename} is cut off")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return dict(file.items())


def held_out_rows(labels: Int32[np.ndarray, "N"]) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows to learn from, rows held out), the same for the same labels.

    A tenth of each class is held out, at most 1000 rows in all; of a class of fewer than ten rows
    none. ``condense`` learns from the others, and ``evaluate-set`` chooses rates on these.
    """
    rng = np.random.default_rng(0)
    share = min(0.1, 1000 / len(labels))
    held = [np.empty(0, np.int64)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held.append(rows[: int(share * len(rows))])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
