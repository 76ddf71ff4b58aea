"""Damages files: bytes of any kind, and the inside of JSON, safetensors, GGUF, numpy and gzip."""

from __future__ import annotations

import copy
import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

Rng = np.random.Generator

WHOLE = [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1]
WHOLE += [2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
WHOLE += [-n for n in (1, 2, 128, 32768, 2**31, 2**63)]
VALUES: list[Any] = [None, True, False, "", "x", "1", [], {}, [1], ["a"], {"a": 1}, [[]], 0.5, -0.5]
VALUES += [1e300, -1e300, 1e-300, 10**30, -(10**30), 2.0, *WHOLE]
VALUES += ["\x00", "\n", "\x1b[31m", "é中😀", "../x", "/etc/passwd", "a" * 5000, "\ud800", " "]
VALUES += [float("nan"), float("inf"), -float("inf"), [None], [[1, 2], [3]], {"": {"": []}}]


def pick(rng: Rng, among: Any) -> Any:
    """One of several."""
    return among[int(rng.integers(len(among)))]


def damage(rng: Rng, data: bytes) -> bytes:
    """Changes bytes without knowing what they are."""
    size, kind = len(data), int(rng.integers(10))
    if size == 0 or kind == 0:
        return rng.bytes(int(pick(rng, [0, 1, 7, 8, 24, 100, 3000])))
    at = int(rng.integers(size))
    if rng.random() < 0.5:  # most of what is interesting stands in front
        at = int(rng.integers(min(size, 512)))
    to = min(size, at + int(pick(rng, [1, 2, 4, 8, 16, 64, 512])))
    other = int(rng.integers(size))
    match kind:
        case 1:
            return data[: int(pick(rng, [at, other, size - 1, size // 2, min(size, 8)]))]
        case 2 | 3:
            out = bytearray(data)
            for _ in range(int(pick(rng, [1, 1, 1, 4, 32]))):
                out[int(rng.integers(size))] ^= 1 << int(rng.integers(8))
            out[at] ^= 1 << int(rng.integers(8))
            return bytes(out)
        case 4:
            return data[:at] + rng.bytes(to - at) + data[to:]
        case 5:
            return data[:at] + data[other : other + to - at] + data[to:]
        case 6:
            return data[:at] + data[to:]
        case 7:
            return data[:at] + data[at:to] * int(pick(rng, [2, 3, 100])) + data[to:]
        case 8:
            fill = int(pick(rng, [0, 255, 127, 34, 91, 123, 10, 92]))
            return data[:at] + bytes([fill]) * (to - at) + data[to:]
        case _:
            return with_number(rng, data, at, int(pick(rng, [1, 2, 4, 8])))


def with_number(rng: Rng, data: bytes, at: int, width: int) -> bytes:
    """Puts a boundary value in the place of a little-endian number."""
    number = int(pick(rng, WHOLE))
    if rng.random() < 0.3:
        number = int.from_bytes(data[at : at + width], "little") + int(pick(rng, [-1, 1, 8, 4096]))
    return data[:at] + (number % 2 ** (8 * width)).to_bytes(width, "little") + data[at + width :]


def damage_value(rng: Rng, value: Any) -> Any:
    """Changes one or a few places of a JSON value: dropped, renamed, retyped, made extreme."""
    root = {"": json.loads(json.dumps(value))}
    for _ in range(int(pick(rng, [1, 1, 1, 2, 5]))):
        places: list[tuple[Any, Any]] = []
        stack: list[Any] = [root]
        while stack and len(places) < 5000:
            node = stack.pop(int(rng.integers(len(stack))))
            items = list(node.items() if isinstance(node, dict) else enumerate(node))
            places += [(node, key) for key, _ in items]
            stack += [child for _, child in items if isinstance(child, dict | list)]
        node, key = pick(rng, places)
        match int(rng.integers(8)):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[str(pick(rng, ["x", "", "__metadata__", key + "x", "\n"]))] = node.pop(key)
            case 2 if isinstance(node[key], int | float) and not isinstance(node[key], bool):
                node[key] = pick(rng, [node[key] * 2, node[key] + 1, -node[key], *WHOLE])
            case 3:
                other, name = pick(rng, places)
                if name in other if isinstance(other, dict) else name < len(other):
                    node[key] = json.loads(json.dumps(other[name]))
            case 4 if isinstance(node[key], list):
                node[key] = node[key] * int(pick(rng, [0, 2, 50]))
            case 5:
                deep: Any = 1
                for _ in range(int(pick(rng, [3, 90, 300]))):
                    deep = [deep] if rng.random() < 0.5 else {"a": deep}
                node[key] = deep
            case _:
                node[key] = copy.deepcopy(pick(rng, VALUES))  # the next change may be inside
        if "" not in root:
            root[""] = {}
    return root[""]


def damage_json(rng: Rng, data: bytes) -> bytes:
    """Changes a JSON text by its structure, seldom by its bytes."""
    kind = int(rng.integers(12))
    if kind == 0:
        return damage(rng, data)
    if kind == 1:
        return pick(
            rng,
            [
                b"",
                b"null",
                b"[]",
                b"{}",
                b"3",
                b'"x"',
                b"[" * 100_000,
                b'{"a":' * 100_000,
                b"\xff\xfe" + data,
                b"\xef\xbb\xbf" + data,
                b"\x00" + data,
                data.replace(b"{", b'{"a":1,"a":2,', 1),
                data + data,
                b"1" * 5000,
                data.decode("utf-8", "replace").encode("utf-16"),
            ],
        )
    try:
        value = json.loads(data)
    except ValueError:
        return damage(rng, data)
    try:
        return json.dumps(damage_value(rng, value)).encode()
    except RecursionError:  # nested in what was nested
        return damage(rng, data)


def damage_lines(rng: Rng, data: bytes) -> bytes:
    """Changes one line of a file of JSON lines, or its bytes."""
    if rng.random() < 0.2:
        return damage(rng, data)
    lines = data.split(b"\n")
    at = int(rng.integers(len(lines)))
    lines[at] = damage_json(rng, lines[at])
    return b"\n".join(lines)


def damage_gz(rng: Rng, data: bytes) -> bytes:
    """Changes what a gzip file holds, or its bytes."""
    if rng.random() < 0.4:
        return damage(rng, data)
    return gzip.compress(damage_lines(rng, gzip.decompress(data)), 1)


def damage_safetensors(rng: Rng, data: bytes) -> bytes:
    """Changes a safetensors file's header by its structure, or its bytes."""
    if rng.random() < 0.3:
        return damage(rng, data)
    end = 8 + int.from_bytes(data[:8], "little")
    header = damage_json(rng, data[8:end])
    return struct.pack("<Q", len(header)) + header + data[end:]


def damage_npy(rng: Rng, data: bytes) -> bytes:
    """Changes the Python text in a numpy file's header, or its bytes."""
    if rng.random() < 0.4:
        return damage(rng, data)
    end = 10 + int.from_bytes(data[8:10], "little")
    text = data[10:end]
    swaps = {
        b"'<f4'": [
            b"'|O'",
            b"'<f2'",
            b"'>f8'",
            b"'<U9999999'",
            b"[('a','<f4')]",
            b"None",
            b"'<M8'",
        ],
        b"'<f2'": [b"'|O'", b"'<f4'", b"'V2'", b"'<c16'", b"'(2,)<f4'", b"("],
        b"False": [b"True", b"1", b"__import__('os')"],
        b"(": [b"(0, ", b"(-1, ", b"(99999999999, ", b"(2**9,", b"((", b"('a',"],
        b"shape": [b"shap", b"descr", b"shape'  "],
    }
    for _ in range(int(rng.integers(1, 3))):
        old = pick(rng, list(swaps))
        text = text.replace(old, pick(rng, swaps[old]), 1)
    return data[:8] + struct.pack("<H", len(text) % 65536) + text + data[end:]


def damage_npz(rng: Rng, data: bytes) -> bytes:
    """Changes the arrays in a zip file of them, or its bytes."""
    if rng.random() < 0.4:
        return damage(rng, data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", 8) as new:
        names = old.namelist()
        chosen = pick(rng, names)
        for name in names:
            inside = old.read(name)
            if name == chosen:
                inside = damage_npy(rng, inside)
                name = "x.npy" if rng.random() < 0.1 else name
            new.writestr(name, inside)
    return out.getvalue()


def gguf_numbers(data: bytes) -> list[tuple[int, int]]:
    """Where a valid GGUF file's counts, lengths, types, sizes, offsets and scalars stand."""
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    places, at = [(4, 4), (8, 8), (16, 8)], 24
    tensors, fields = struct.unpack_from("<QQ", data, 8)

    def text(at: int) -> int:
        places.append((at, 8))
        return at + 8 + struct.unpack_from("<Q", data, at)[0]

    def value(at: int, kind: int) -> int:
        if kind == 8:
            return text(at)
        if kind != 9:
            places.append((at, widths[kind]))
            return at + widths[kind]
        item, count = struct.unpack_from("<IQ", data, at)
        places.extend([(at, 4), (at + 4, 8)] * 5)
        at += 12
        for i in range(count):
            kept = len(places)
            at = value(at, item)
            if i > 3:  # a vocabulary would drown everything else
                del places[kept:]
        return at

    for _ in range(fields):
        at = text(at)
        places.append((at, 4))
        at = value(at + 4, struct.unpack_from("<I", data, at)[0])
    for _ in range(tensors):
        at = text(at)
        (dims,) = struct.unpack_from("<I", data, at)
        places += [(at, 4), *((at + 4 + 8 * i, 8) for i in range(dims))]
        at += 4 + 8 * dims
        places += [(at, 4), (at + 4, 8)]
        at += 12
    return places


def damage_gguf(rng: Rng, data: bytes) -> bytes:
    """Changes numbers of a GGUF file's header, or its bytes."""
    if rng.random() < 0.3:
        return damage(rng, data)
    places = gguf_numbers(data)
    for _ in range(int(pick(rng, [1, 1, 1, 2, 4]))):
        data = with_number(rng, data, *pick(rng, places))
    if rng.random() < 0.1:
        at = int(rng.integers(min(len(data), 8000)))
        data = data[:at] + rng.bytes(3) + data[at + 3 :]
    return data


KINDS: dict[str, Callable[[Rng, bytes], bytes]] = {
    "bytes": damage,
    "json": damage_json,
    "lines": damage_lines,
    "gz": damage_gz,
    "safetensors": damage_safetensors,
    "npy": damage_npy,
    "npz": damage_npz,
    "gguf": damage_gguf,
}
