"""A GGUF file's metadata and tensors, read without trust in any number that stands in it.

The reader of the ``gguf`` package makes an array object for every element of the metadata, some
hundred bytes for each one in the file, and lets tensors share their bytes; here a file needs little
more memory than it has bytes. The layout is that of ggml/docs/gguf.md, versions 2 and 3; quantized
types are dequantized by the package.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from jaxtyping import Float

from jaxdistill.errors import UserError

AGAIN = "download or write the file again"
_MAX_FIELDS = _MAX_TENSORS = 2**16
_MAX_ITEMS = 2**22  # of an array; the largest vocabularies have 2**18 tokens
_MAX_NAME = 2**16 - 1  # bytes of a key; the format's own limit
_MAX_DIMS = 4
_STRING, _ARRAY, _UINT32, _BOOL = 8, 9, 4, 7
_TYPES = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


class GGUFTensor(NamedTuple):
    """Describe one tensor: its type, its shape with the rows first, its bytes ``[begin, end)``."""

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int
    end: int


class GGUFFile:
    """Read one GGUF file lazily.

    The header is checked when the file is opened: every value and tensor lies inside the file, no
    name stands twice, no tensor shares bytes with another.

    Attributes:
        path: the file.
        tensors: what it holds, by name.
    """

    def __init__(self, path: str | Path) -> None:
        """Open ``path``; raise ``UserError`` if it is missing, damaged or no GGUF file."""
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"no GGUF file at {str(path)!r}; give the path of an existing .gguf file"
            )
        self._fields: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._walk()
        except (ValueError, KeyError, struct.error, OSError) as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            raise UserError(f"{str(path)!r} is cut off or damaged ({reason}); {AGAIN}") from e

    def _walk(self) -> None:
        if self.path.stat().st_size < 24:
            raise UserError(f"{str(self.path)!r} is not a GGUF file (too short); give a .gguf file")
        with (
            self.path.open("rb") as f,
            mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if data[:4] != b"GGUF":
                raise UserError(f"{str(self.path)!r} is not a GGUF file; give a .gguf file")
            (version,) = struct.unpack_from("<I", data, 4)
            if version not in (2, 3):
                raise UserError(
                    f"{str(self.path)!r} is not a little-endian GGUF file of version 2 or 3; "
                    "convert the model again"
                )
            tensor_count, field_count = struct.unpack_from("<QQ", data, 8)
            if tensor_count > _MAX_TENSORS or field_count > _MAX_FIELDS:
                raise ValueError(f"{tensor_count} tensors and {field_count} metadata values")
            at, strings = 24, [_MAX_ITEMS * 2]
            for _ in range(field_count):
                key, at = _name(data, at)
                if key in self._fields:
                    raise ValueError(f"the key {key!r} stands twice")
                (kind,) = struct.unpack_from("<I", data, at)
                self._fields[key] = kind, at + 4
                at = _after(data, at + 4, kind, strings)
            table = []
            for _ in range(tensor_count):
                entry, at = _table_row(data, at)
                table.append(entry)
            self._header = data[:at]
            self._place(table, at, len(data))

    def _place(self, table: list[GGUFTensor], at: int, size: int) -> None:
        """Put the tensors after the header, at the file's alignment."""
        step = 32
        if "general.alignment" in self._fields:
            step = self.value("general.alignment")
            if self._fields["general.alignment"][0] != _UINT32 or step < 1 or step & (step - 1):
                raise ValueError(f"an alignment of {step}")
        start = at + -at % step
        for entry in table:
            if entry.name in self.tensors:
                raise ValueError(f"the tensor {entry.name!r} stands twice")
            placed = entry._replace(begin=start + entry.begin, end=start + entry.end)
            if placed.end > size:
                raise ValueError(f"the tensor {entry.name!r} ends after the file")
            self.tensors[entry.name] = placed
        for one, other in itertools.pairwise(sorted(self.tensors.values(), key=lambda t: t.begin)):
            if other.begin < one.end:  # a small file would stand for a large model
                raise ValueError(f"the tensors {one.name!r} and {other.name!r} share bytes")

    def value(self, key: str) -> Any:
        """Return one metadata value as Python objects, None where the file lacks it.

        Raises:
            ValueError: a string is not UTF-8.
        """
        if key not in self._fields:
            return None
        kind, at = self._fields[key]
        if kind == _STRING:
            return _text(self._header, at)[0]
        if kind != _ARRAY:
            return self._numbers(kind, at, 1)[0]
        item, count = struct.unpack_from("<IQ", self._header, at)
        if item != _STRING:
            return self._numbers(item, at + 12, count)
        texts, at = [], at + 12
        for _ in range(count):  # the walk has seen that all of them lie inside
            (length,) = struct.unpack_from("<Q", self._header, at)
            texts.append(str(self._header[at + 8 : at + 8 + length], "utf-8"))
            at += 8 + length
        return texts

    def _numbers(self, kind: int, at: int, count: int) -> list[Any]:
        numbers = np.frombuffer(self._header, _TYPES[kind], count, at)
        return (numbers.astype(bool) if kind == _BOOL else numbers).tolist()

    def read(self, tensor: GGUFTensor) -> Float[np.ndarray, "..."]:
        """Return one tensor in float32.

        Raises:
            UserError: the ``gguf`` package cannot dequantize its type.
        """
        raw = np.fromfile(self.path, np.uint8, tensor.end - tensor.begin, offset=tensor.begin)
        try:
            with np.errstate(all="ignore"):  # scales that are not finite give weights that are not
                rows = raw.reshape(math.prod(tensor.shape[:-1]), -1)
                x = gguf.quants.dequantize(rows, tensor.kind)
        except NotImplementedError:
            raise UserError(
                f"GGUF tensor {tensor.name!r} has type {tensor.kind.name}, which cannot be "
                "dequantized here; requantize the file to a common type such as Q4_0 or Q8_0"
            ) from None
        return np.asarray(x, np.float32).reshape(tensor.shape)


def _name(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    if length > _MAX_NAME:
        raise ValueError(f"a name of {length} bytes")
    return _text(data, at)


def _text(data: mmap.mmap | bytes, at: int) -> tuple[str, int]:
    """Return a string and where it ends."""
    (length,) = struct.unpack_from("<Q", data, at)
    end = _inside(data, at + 8 + length)
    return str(data[at + 8 : end], "utf-8"), end


def _after(data: mmap.mmap, at: int, kind: int, strings: list[int]) -> int:
    """Return where a metadata value ends; ``strings`` is how many more may stand in arrays."""
    if kind == _STRING:
        (length,) = struct.unpack_from("<Q", data, at)
        return _inside(data, at + 8 + length)
    if kind != _ARRAY:
        return _inside(data, at + _width(kind))
    item, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item != _STRING:
        at = _inside(data, at + count * _width(item))
    else:
        _inside(data, at + count * 8)
        strings[0] -= count
    if count > _MAX_ITEMS or strings[0] < 0:
        raise ValueError(f"an array of {count} values")
    if item == _STRING:
        for _ in range(count):  # beyond the end, there is nothing to unpack
            at += 8 + struct.unpack_from("<Q", data, at)[0]
            if at > len(data):
                break
    return _inside(data, at)


def _width(kind: int) -> int:
    if kind not in _TYPES:
        raise ValueError(f"a metadata value of type {kind}")
    return _TYPES[kind].itemsize


def _inside(data: mmap.mmap | bytes, at: int) -> int:
    if at > len(data):
        raise ValueError("a metadata value ends after the file")
    return at


def _table_row(data: mmap.mmap, at: int) -> tuple[GGUFTensor, int]:
    """Return a row of the tensor table, its bytes counted from the first tensor's, and its end."""
    name, at = _name(data, at)
    (dims,) = struct.unpack_from("<I", data, at)
    if not 1 <= dims <= _MAX_DIMS:
        raise ValueError(f"a tensor of {dims} dimensions")
    shape = struct.unpack_from(f"<{dims}Q", data, at + 4)[::-1]
    kind, begin = struct.unpack_from("<IQ", data, at + 4 + 8 * dims)
    block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    if 0 in shape or shape[-1] % block:
        raise ValueError(f"the tensor {name!r} has the shape {shape} in type {kind}")
    size = math.prod(shape) // block * width
    tensor = GGUFTensor(name, gguf.GGMLQuantizationType(kind), shape, begin, begin + size)
    return tensor, at + 4 + 8 * dims + 12
