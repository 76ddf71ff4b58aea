"""Safetensors files, read and written one tensor at a time.

The ``safetensors`` package gives numpy no bfloat16 or float8 arrays and takes a whole file's
tensors at once. The format is a length, a JSON header and the raw bytes
(https://github.com/huggingface/safetensors#format). A memory map would count the whole file as the
process's memory once it is read through, so each tensor's bytes are read by themselves.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxdistill.errors import UserError

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
    file and has as many bytes as its type and shape need.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open ``path``; raise ``UserError`` if it is missing, cut off or no safetensors file."""
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
                # 100 MB is the format's own limit on the header.
                raw = f.read(length) if 8 <= size and length <= 100_000_000 else b""
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
            header = json.loads(raw)
            self.entries = {
                name: Entry(
                    str(d["dtype"]), tuple(map(int, d["shape"])), *map(int, d["data_offsets"])
                )
                for name, d in header.items()
                if name != "__metadata__"
            }
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
    with open(path, "wb") as f:
        f.write(len(raw).to_bytes(8, "little"))
        f.write(raw)
        for name, dtype, shape in tensors:
            array = np.ascontiguousarray(get(name), dtype=dtype)
            if array.shape != tuple(shape):
                raise ValueError(f"{name}: {array.shape} was given for shape {tuple(shape)}")
            f.write(array.reshape(-1).view(np.uint8).data)
    return offset
