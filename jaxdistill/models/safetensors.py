"""Safetensors files, read and written one tensor at a time.

The ``safetensors`` package gives numpy no bfloat16 or float8 arrays and takes a whole file's
tensors at once. The format is a length, a JSON header and the raw bytes
(https://github.com/huggingface/safetensors#format). A memory map would count the whole file as the
process's memory once it is read through, so each tensor's bytes are read by themselves.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxdistill._checksums import checksum
from jaxdistill.errors import UserError
from jaxdistill.models.json_text import parse_json

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_DIMENSIONS, _MAX_NUMBER = 16, 2**53
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("bool"),
}
FLOAT_TAGS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Describe one stored tensor: its type's tag, its shape, and its bytes ``[begin, end)``."""

    tag: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """Read one safetensors file lazily.

    The whole header is checked when the file is opened: every tensor in ``entries`` lies inside the
    file, has as many bytes as its type and shape need, and shares none of them with another.

    Attributes:
        path: the file.
        entries: what it holds, by name.
        metadata: the header's strings, empty where it has none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open ``path``; raise ``UserError`` if it is missing, cut off or no safetensors file."""
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{self.path} is no file; give a readable file")
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
                raw = f.read(length) if 8 <= size and length <= _MAX_HEADER else b""
        except OSError as e:
            raise UserError(
                f"cannot read {self.path}: {e.strerror}; give a readable file"
            ) from None
        if size < 8 or 8 + length > size:
            raise UserError(
                f"{self.path} is cut off or not a safetensors file: its header needs "
                f"{8 + length} bytes and the file has {size}; fetch it again"
            )
        try:
            header = parse_json(raw)
            self.metadata = _metadata(header.pop("__metadata__", None) or {})
            self.entries = {name: _entry(given) for name, given in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{self.path} is not a safetensors file; fetch it again") from None
        self._start = 8 + length
        needed = max((e.end for e in self.entries.values()), default=0)
        if self._start + needed > size:
            raise UserError(
                f"{self.path} is cut off: its tensors need {self._start + needed} bytes and the "
                f"file has {size}; fetch it again"
            )
        for name, e in self.entries.items():
            width = DTYPES[e.tag].itemsize if e.tag in DTYPES else None
            sane = 0 <= e.begin <= e.end and min(e.shape, default=0) >= 0
            if not sane or (width and e.end - e.begin != math.prod(e.shape) * width):
                raise UserError(
                    f"{self.path} is damaged: the bytes of {name} do not fit its shape "
                    f"{list(e.shape)} in {e.tag}; fetch it again"
                )
        filled = sorted((e.begin, e.end, name) for name, e in self.entries.items())
        for (_, end, one), (begin, _, other) in itertools.pairwise(
            span for span in filled if span[0] < span[1]
        ):
            if begin < end:  # a small file would stand for a large model
                raise UserError(
                    f"{self.path} is damaged: {one} and {other} share bytes; fetch it again"
                )

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Read one tensor, or a stretch of its first axis, in its stored type.

        Raises:
            UserError: the stored type has no numpy counterpart.
        """
        e = self.entries[name]
        if e.tag not in DTYPES:
            raise UserError(
                f"{name} in {self.path} is stored as {e.tag}; accepted: {', '.join(DTYPES)}"
            )
        first, last, _ = rows.indices(e.shape[0]) if e.shape else (0, 1, 1)
        width = (e.end - e.begin) // (e.shape[0] if e.shape else 1) if e.end > e.begin else 0
        begin, size = self._start + e.begin + first * width, max(0, last - first) * width
        raw = np.fromfile(self.path, np.uint8, size, offset=begin)
        shape = (max(0, last - first), *e.shape[1:]) if e.shape else ()
        return raw.view(DTYPES[e.tag]).reshape(shape)


def _entry(given: dict[str, Any]) -> Entry:
    """Return one tensor's entry; raise ``ValueError`` or ``TypeError`` unless it is of the form."""
    shape, (begin, end) = given["shape"], given["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError("a shape of too many dimensions, or none")
    for number in (*shape, begin, end):
        if type(number) is not int or abs(number) > _MAX_NUMBER:
            raise ValueError(f"{number} is no size")
    if math.prod(max(number, 1) for number in shape) > _MAX_NUMBER:  # beside a 0 too
        raise ValueError("a shape beyond any memory")
    if not isinstance(given["dtype"], str):
        raise TypeError("a type that is no string")
    return Entry(given["dtype"], tuple(shape), begin, end)


def _metadata(given: Any) -> dict[str, str]:
    """Return the header's metadata; raise ``TypeError`` unless it maps strings to strings."""
    if not isinstance(given, dict) or not all(isinstance(v, str) for v in given.values()):
        raise TypeError("metadata that are no strings")
    return given


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]],
    get: Callable[[str], np.ndarray],
) -> int:
    """Write one safetensors file, asking for one tensor at a time.

    Args:
        path: the file to write.
        tensors: name, type and shape of every tensor, in file order.
        get: called once with each name; returns the array, which is cast to the named type.

    Returns:
        The number of bytes of tensor data.

    Raises:
        UserError: the file does not read back as it was written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": _TAGS[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    crc = 0
    with open(path, "wb") as f:

        def write(part: Any) -> None:
            nonlocal crc
            crc = zlib.crc32(part, crc)
            f.write(part)

        write(len(raw).to_bytes(8, "little"))
        write(raw)
        for name, dtype, shape in tensors:
            array = np.ascontiguousarray(get(name), dtype=dtype)
            if array.shape != tuple(shape):
                raise ValueError(f"{name}: {array.shape} was given for shape {tuple(shape)}")
            write(array.reshape(-1).view(np.uint8).data)
    if checksum(Path(path)) != [8 + len(raw) + offset, crc]:
        raise UserError(f"{path} does not read back as it was written; look at the disk")
    return offset
