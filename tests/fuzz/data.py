"""Readers of data: text, labelled examples, pairs, choices."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdistill.evals.choices import load_choices
from jaxdistill.train.data import encode_rows, load_rows, pack
from jaxdistill.train.labelled import held_out_rows, load_labelled
from jaxdistill.train.pairing import pair_rows
from jaxdistill.train.slices import slices_of
from tests import tiny
from tests.fuzz.reader import CHAT, Reader, each
from tests.gguf_files import (
    byte_tokenizer,
)

_ROWS: list[dict[str, Any]] = [
    {"text": "the quick brown fox", "label": 0, "rare": True, "weight": 0.5, "meta": {"a": [1]}},
    {"text": "jumps 1234 hello", "label": 1, "rare": False, "weight": 2, "meta": {"a": []}},
    {"text": "über 中文 😀", "label": 0, "rare": None, "weight": None, "meta": None},
]
_CHATS: list[dict[str, Any]] = [
    {"messages": [*CHAT, {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
    {"instruction": "add 1 2", "input": "now", "output": "3"},
    {"messages": CHAT, "id": 7},
]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _jsonl(rows: list[dict[str, Any]], name: str, folder: Path) -> None:
    data = json.dumps(rows).encode() if name.endswith("json") else _lines(rows)
    (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)


def _parquet(rows: list[dict[str, Any]], folder: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] * 20 for name in names}
    pq.write_table(pa.table(columns), folder / "data.parquet", compression="zstd")


def _txt(folder: Path) -> None:
    (folder / "data.txt").write_text("hello hello\n 12 34 über 😀 \n" * 5)


def _only(folder: Path) -> str:
    path = next(iter(folder.iterdir()), folder / "data.jsonl")
    return str(path)


@functools.cache
def _tokenizers() -> tuple[Any, Any]:
    return tiny.byte_tokenizer(), byte_tokenizer()


def _read_data(folder: Path) -> None:
    rows = load_rows(_only(folder))
    pack(encode_rows(rows, _tokenizers()[0]), 16)


def _read_pairs(folder: Path) -> None:
    rows = load_rows(_only(folder))
    pair_rows([rows[i] for i in range(min(len(rows), 50))], *_tokenizers(), 16)


def _npz(kind: str, folder: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (8, 4, 4)).astype(np.uint8)
    inputs = rng.normal(size=(8, 3)).astype(np.float32)
    named: dict[str, Any] = {"images": images} if kind == "images" else {"inputs": inputs}
    np.savez_compressed(folder / "data.npz", **named, labels=np.arange(8) % 2, rare=np.arange(8))


def _read_labelled(folder: Path) -> None:
    data = load_labelled(_only(folder))
    data.fingerprint()
    held_out_rows(data.labels)
    slices_of(data.described, ["rare"], required=False)
    data.take(np.array([0]))


def _choices(folder: Path) -> None:
    row = {"context": "2 + 2 =", "choices": [" 4", " 5"], "label": 0}
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))


_DATA = {".jsonl": "lines", ".gz": "gz", ".json": "json", ".parquet": "bytes", ".txt": "bytes"}
READERS = {
    "data": Reader(
        (
            *each(_jsonl, (_ROWS, "data.jsonl"), (_CHATS, "data.jsonl")),
            *each(_jsonl, (_ROWS, "data.json"), (_CHATS, "data.jsonl.gz")),
            functools.partial(_parquet, _ROWS),
            functools.partial(_parquet, _CHATS),
            _txt,
        ),
        _read_data,
        _DATA,
    ),
    "labelled": Reader(
        (
            *each(_npz, ("images",), ("inputs",)),
            functools.partial(_jsonl, _ROWS, "data.jsonl"),
            functools.partial(_parquet, _ROWS),
        ),
        _read_labelled,
        _DATA | {".npz": "npz"},
    ),
    "pairing": Reader(
        each(_jsonl, (_ROWS, "data.jsonl"), (_CHATS, "data.jsonl")), _read_pairs, _DATA
    ),
    "choices": Reader(
        (_choices,), lambda folder: load_choices(folder / "q.jsonl"), {".jsonl": "lines"}
    ),
}
