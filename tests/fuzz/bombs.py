"""Files that are small and ask for much, or reach out of their directory: one by one, by hand."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Files = dict[str, bytes]  # path inside the folder of a valid set -> what stands there instead


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _header(fields: list[bytes], tensors: list[bytes] = ()) -> bytes:  # type: ignore[assignment]
    return b"".join([b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields)), *fields, *tensors])


def _field(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    table = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return _text(name.encode()) + table


def gguf() -> dict[str, Files]:
    arch = _field("general.architecture", 8, _text(b"llama"))
    numbers = _field("x", 9, struct.pack("<IQ", 0, 4_000_000) + bytes(4_000_000))
    strings = _field("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 300_000) + bytes(2_400_000))
    piece = _text(b"ab" * 100_000)
    long = [
        _field("tokenizer.ggml.model", 8, _text(b"llama")),
        _field("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 1) + piece),
        _field("tokenizer.ggml.scores", 9, struct.pack("<IQf", 6, 1, 0.0)),
    ]
    overlap = [_tensor(f"blk.{i}.x", (64, 64), 0, 0) for i in range(100)]
    huge = [_tensor("token_embd.weight", (2**32, 2**32), 0, 0)]
    found = {
        "array of 4 million bytes": _header([arch, numbers]),
        "array of empty strings": _header([arch, strings]),
        "one long token": _header([arch, *long], [_tensor("token_embd.weight", (64, 64), 0, 0)])
        + bytes(20_000),
        "tensors that share bytes": _header([arch], overlap) + bytes(20_000),
        "a product beyond 64 bits": _header([arch], huge) + bytes(64),
        "alignment 0": _header([_field("general.alignment", 4, struct.pack("<I", 0))]) + bytes(64),
        "65 thousand fields": _header([_field(f"k{i}", 0, b"\0") for i in range(70_000)]),
    }
    return {name: {"model.gguf": data} for name, data in found.items()}


def _file(header: object, data: bytes = bytes(64)) -> bytes:
    raw = header if isinstance(header, bytes) else _json(header)
    return struct.pack("<Q", len(raw)) + raw + data


def _entry(shape: list[int], begin: int = 0, end: int = 4) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def safetensors() -> dict[str, Files]:
    found = {
        "100,000 dimensions": _file({"a": _entry([1] * 100_000)}),
        "numbers of 4,000 digits": _file({"a": _entry([10**4000] * 200)}),
        "a product beyond 64 bits": _file({"a": _entry([2**40, 2**40, 2**40])}),
        "tensors that share bytes": _file({f"t{i}": _entry([16], 0, 64) for i in range(5000)}),
        "deep": _file(b'{"a":' * 100_000),
        "deep metadata": _file(b'{"__metadata__":' + b"[" * 5000 + b"]" * 5000 + b"}"),
        "zero and huge": _file({"a": _entry([0, 2**53, 2**53], 0, 0)}),
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + bytes(64),
        "a name with line ends": _file({"a\n\x1b[31m" * 500: _entry([2])}),
    }
    return {name: {"x.safetensors": data} for name, data in found.items()}


_LLAMA = {
    "model_type": "llama",
    "vocab_size": 10**6,
    "hidden_size": 10**6,
    "intermediate_size": 10**6,
    "num_hidden_layers": 100,
    "num_attention_heads": 100,
}


def hf() -> dict[str, Files]:
    def shard(name: object) -> Files:
        return {
            "model/model.safetensors.index.json": _json({"weight_map": {"a": name, "b": name}}),
            "model/model.safetensors": b"",
        }

    def config(**changes: object) -> Files:
        return {"model/config.json": _json(_LLAMA | changes)}

    index = "model/model.safetensors.index.json"
    return {
        "10^12 parameters": config(),
        "10^9 layers": config(num_hidden_layers=10**9),
        "10,000 layers": config(num_hidden_layers=10_000),
        "sizes of 400 digits": config(hidden_size=10**400),
        "no heads": config(num_attention_heads=0),
        "a shard above": shard("../x.safetensors"),
        "a shard at the root": shard("/etc/passwd"),
        "a shard of the devices": shard("/dev/zero"),
        "a shard with NUL": shard("x\0.safetensors"),
        "a shard with a long name": shard("x" * 5000 + ".safetensors"),
        "a shard that is a list": shard(["x"]),
        "a shard that is here": shard("."),
        "a deep index": {index: b'{"weight_map":' * 50_000, "model/model.safetensors": b""},
    }


def tokenizer() -> dict[str, Files]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>"}

    def template(text: str) -> Files:
        return {"chat_template.jinja": text.encode()}

    return {
        "a file elsewhere": {
            "tokenizer_config.json": _json(
                config | {"fast_tokenizer_files": ["../../../etc/tokenizer.1.0.0.json"]}
            )
        },
        "a file elsewhere, by the map": {
            "special_tokens_map.json": _json({"tokenizer_file": "/etc/passwd"})
        },
        "a GGUF file": {"tokenizer_config.json": _json(config | {"gguf_file": "/etc/passwd"})},
        "deep": {"tokenizer.json": b'{"model":' * 50_000},
        "an id of 2^31": {"tokenizer.json": _json({"model": {"vocab": {"a": 2**31}}})},
        "a template that opens files": template("{% include '/etc/passwd' %}"),
        "a template that runs code": template(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__ }}"
        ),
        "a template that divides by 0": template("{{ 1 / 0 }}"),
        "a template that calls itself": template("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
        "a template of a large range": template("{% for i in range(10**9) %}{% endfor %}"),
    }


def data() -> dict[str, Files]:
    def gz(raw: bytes) -> Files:
        return {"data.jsonl.gz": gzip.compress(raw, 1)}

    def lines(rows: list[object]) -> Files:
        return {"data.jsonl": b"\n".join(_json(row) for row in rows)}

    n = 6000
    message = {"role": "user", "content": "x"}
    table = io.BytesIO()
    texts = pa.DictionaryArray.from_arrays(np.zeros(200_000, np.int32), ["x" * 10_000])
    pq.write_table(pa.table({"text": texts}), table, compression="zstd")
    picture = {"info": {"features": {"text": {"dtype": "string", "_type": "Value"}}}}
    picture["info"]["features"]["image"] = {"_type": "Image"}  # type: ignore[assignment]
    paths = pa.array([{"bytes": None, "path": "/etc/passwd"}] * 3)
    pictures = pa.table({"text": ["a", "b", "c"], "image": paths})
    named = io.BytesIO()
    pq.write_table(pictures.replace_schema_metadata({"huggingface": json.dumps(picture)}), named)
    return {
        "100 MB of spaces on a line": gz(b" " * 100_000_000),
        "100 MB of empty lines": gz(b"\n" * 100_000_000),
        "100 MB of one string": gz(b'{"text": "' + b"a" * 100_000_000),
        "a line of 20 MB": {"data.jsonl": _json({"text": "ab " * 7_000_000})},
        "deep": {"data.jsonl": b'{"text": ' + b"[" * 200_000},
        "a key of its own in every row": lines([{"text": "a", f"k{i}": 1} for i in range(n)]),
        "a key of its own in every object": lines(
            [{"text": "a", "meta": {f"k{i}": 1}} for i in range(n)]
        ),
        "a key of its own in every message": lines(
            [{"messages": [message | {f"k{i}": "x"}]} for i in range(n)]
        ),
        "half a character": {"data.jsonl": b'{"text": "a\\ud800b"}\n'},
        "keys twice": {"data.jsonl": b'{"text": "a", "text": "b"}\n'},
        "2 GB of one string in Parquet": {"data.parquet": table.getvalue()},
        "paths of pictures in Parquet": {"data.parquet": named.getvalue()},
        "NUL": {"data.jsonl": b"\0" * 1000},
    }


def _npz(name: str, raw: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"{name}.npy", raw)
        file.writestr("labels.npy", _npy(np.zeros(4, np.int64)))
    return out.getvalue()


def _npy(x: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, x, allow_pickle=True)
    return out.getvalue()


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was run')",)


def labelled() -> dict[str, Files]:
    claim = _npy(np.zeros((4, 4), np.float32)).replace(b"(4, 4)", b"(9999999999,4)", 1)
    found = {
        "200 MB of zeros": _npz("inputs", _npy(np.zeros((50, 10**6), np.float32))),
        "a claim of 160 GB": _npz("inputs", claim),
        "a pickle": _npz("inputs", _npy(np.array([_Runs()], dtype=object))),
    }
    return {name: {"data.npz": raw} for name, raw in found.items()}


def teacher_cache() -> dict[str, Files]:
    header = {
        "k": 4,
        "temperature": 1.0,
        "precision": "float16",
        "vocab_size": 96,
        "rows": 6,
        "seq_len": 8,
        "rows_per_shard": 2,
        "bytes_per_token": 18,
        "fingerprints": {},
        "teachers": [],
        "mixture": "mean",
        "format": 1,
    }

    def said(**changes: object) -> Files:
        return {"cache.json": _json(header | changes)}

    return {
        "2^47 shards": said(rows=2**47, rows_per_shard=1),
        "2^47 rows in a shard": said(rows=2**47, rows_per_shard=2**47),
        "a row of 2^47": said(seq_len=2**47),
        "no rows in a shard": said(rows_per_shard=0),
        "a type that is code": said(precision="V9999999999"),
        "a pickle": {"00000.log_probs.npy": _npy(np.array([_Runs()], dtype=object))},
        "a zip file": {"00000.log_probs.npy": _npz("x", b"")},
    }


def quantized() -> dict[str, Files]:
    return {
        "10^12 parameters": {"m/config.json": _json(_LLAMA)},
        "a regex that is none": {
            "m/quantization.json": _json({"weights": {}, "activations": [["(", None]]})
        },
        "deep": {"m/quantization.json": b"[" * 100_000},
    }


def stored_set() -> dict[str, Files]:
    def said(**changes: object) -> Files:
        header = {"level": "text", "method": "m", "classes": [], "texts": ["a"], "settings": {}}
        header |= {"slices": {}} | changes
        metadata = {"format": "jaxdistill synthetic set 1", "set": json.dumps(header)}
        entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        raw = {"__metadata__": metadata, "learned/inputs": entry}
        return {"set/synthetic.safetensors": _file(raw, bytes(4))}

    return {
        "texts that are one string": said(texts="a"),
        "slices that are a list": said(slices=[1]),
        "a slice of texts": said(slices={"a": ["x"]}),
        "classes that are numbers": said(classes=[1, 2]),
        "a level that is a list": said(level=["text"]),
        "settings that are deep": said(settings=json.loads("[" * 500 + "]" * 500)),
    }


def run_directory() -> dict[str, Files]:
    return {
        "rows that are none": {"run/metrics.jsonl": b'3\n[]\n{}\n{"step": "x"}\n\xff\n'},
        "deep": {"run/config.json": b'{"options":' * 50_000},
        "a deep row": {"run/metrics.jsonl": b"[" * 100_000},
        "weights that are a list": {"run/student/quantization.json": b'{"weights": [1]}'},
    }


BOMBS: dict[str, Callable[[], dict[str, Files]]] = {
    "gguf": gguf,
    "safetensors": safetensors,
    "hf": hf,
    "tokenizer": tokenizer,
    "data": data,
    "labelled": labelled,
    "teacher_cache": teacher_cache,
    "quantized": quantized,
    "stored_set": stored_set,
    "run_directory": run_directory,
}


def place(files: Files, folder: Path) -> None:
    """Puts a bomb into a folder: empty files are removed; lone data files replace each other."""
    if folder.is_dir() and any(name.startswith("data.") for name in files):
        for path in folder.iterdir():
            path.unlink()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if data:
            path.write_bytes(data)
        else:
            path.unlink(missing_ok=True)
