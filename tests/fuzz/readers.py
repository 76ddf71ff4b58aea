"""The readers of files that others wrote: valid small files for each, and what reading them is."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jaxdistill.dd.stored_set import StoredSet, load_set, save_set
from jaxdistill.dd.synthetic import Synthetic
from jaxdistill.evals.choices import load_choices
from jaxdistill.export.model_card import read_run
from jaxdistill.kd.cache_writer import write_cache
from jaxdistill.kd.teacher_cache import open_cache
from jaxdistill.models.config import RopeScaling, config_from_hf, config_to_hf
from jaxdistill.models.decoder import Output
from jaxdistill.models.gguf import read_gguf
from jaxdistill.models.gguf_layout import llama3_factors
from jaxdistill.models.hf import load_hf, save_hf
from jaxdistill.models.hf_layout import hf_layout
from jaxdistill.models.hub import load_model
from jaxdistill.models.json_text import read_object
from jaxdistill.models.quantized import save_quantized
from jaxdistill.models.safetensors import SafetensorsFile, write_safetensors
from jaxdistill.models.tokenizer import fingerprint, load_tokenizer
from jaxdistill.quant.activations import ActivationSpec
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import default_policy
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.data import encode_rows, load_rows, pack
from jaxdistill.train.labelled import held_out_rows, load_labelled, slices_of
from jaxdistill.train.packing import Packed
from jaxdistill.train.pairing import pair_rows
from jaxdistill.train.run_directory import RunDirectory, read_metrics
from tests import stored, tiny
from tests.gguf_files import (
    byte_fields,
    byte_tokenizer,
    float_params,
    piece_fields,
    raw_fields,
    raw_tensors,
    tiny_config,
    write_raw,
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader under test.

    Attributes:
        makes: each writes one valid set of files into a folder.
        read: reads it, as a recipe would, and uses what it read.
        kinds: file name's ending -> how ``mutate.KINDS`` damages it; others are left alone.
        slow: read by orbax: a tenth of a second an input or more, and its threads print.
    """

    makes: tuple[Callable[[Path], Any], ...]
    read: Callable[[Path], Any]
    kinds: dict[str, str]
    slow: bool = False


# ---------------------------------------------------------------------------- models

_SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8}


_BANDS: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_BANDS["original_max_position_embeddings"] = 8192


def _gguf(kind: str | None, arch: str, folder: Path) -> None:
    pieces = arch == "llama" and kind is None
    config = tiny_config(arch, **_SMALL, tie_embeddings=arch != "qwen3")
    tensors = raw_tensors(config, float_params(config))
    if arch == "llama" and not pieces:
        tensors["rope_freqs.weight"] = llama3_factors(
            config.head_dim,
            config.rope_theta,
            RopeScaling(rope_type="llama3", factor=8.0, **_BANDS),
        )
    write_raw(
        folder / "model.gguf",
        arch,
        raw_fields(config) | {"rope.dimension_count": config.head_dim},
        tensors,
        piece_fields() if pieces else byte_fields(chat_template=tiny.CHATML, add_bos_token=True),
        kind=None if kind is None else gguf.GGMLQuantizationType[kind],
    )


def _read_gguf(folder: Path) -> None:
    _, _, tokenizer = read_gguf(folder / "model.gguf")
    fingerprint(tokenizer)
    tokenizer.decode(tokenizer.encode("hello there 123"))


def _safetensors(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "b": np.arange(5, dtype=np.int64),
        "c": rng.normal(size=(2, 2, 2)).astype(np.float16),
        "d": np.ones(1, np.float32),
    }
    described = [(name, x.dtype, x.shape) for name, x in arrays.items()]
    write_safetensors(folder / "x.safetensors", described, arrays.__getitem__)


def _read_safetensors(folder: Path) -> None:
    file = SafetensorsFile(folder / "x.safetensors")
    for name in file.entries:
        file.read(name)


def _hf(shards: bool, folder: Path) -> None:
    c = tiny.config(**_SMALL, num_layers=1, tie_embeddings=not shards)
    save_hf(folder / "model", c, float_params(c), max_shard_bytes=20_000 if shards else 1e9)
    _safetensors(folder)  # outside of the model's directory


def _config(kind: str, folder: Path) -> None:
    c = tiny.config(model_type=kind, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3")
    d = config_to_hf(c) | {"layer_types": ["full_attention"] * 2, "hidden_act": "silu"}
    d |= {"use_sliding_window": False, "max_window_layers": 2, "partial_rotary_factor": 1.0}
    if kind == "llama":
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling |= {"rope_type": "llama3", "original_max_position_embeddings": 64}
        d |= {"rope_scaling": scaling, "eos_token_id": [0, 1]}
    (folder / "config.json").write_text(json.dumps(d))


def _read_config(folder: Path) -> None:
    from jaxdistill.errors import UserError

    try:
        raw = read_object(folder / "config.json")
    except (OSError, ValueError) as e:  # as its callers do
        raise UserError(f"cannot read config.json ({e})") from None
    config = config_from_hf(raw)
    config_from_hf(config_to_hf(config))
    hf_layout(config)


def _tokenizer(template: bool, folder: Path) -> None:
    tokenizer = byte_tokenizer(bos=True) if template else tiny.byte_tokenizer(template=None)
    tokenizer.save_pretrained(folder)
    if not template:
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))


_CHAT = [{"role": "user", "content": "hi  there"}, {"role": "assistant", "content": "12 34é"}]


def _read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    fingerprint(tokenizer)
    encode_rows([{"text": "hello hello 1234\n"}, {"messages": _CHAT}], tokenizer)
    encode_rows([{"messages": _CHAT}], tokenizer, loss_on="completion", template="plain")


def _quantized(spec: str, folder: Path) -> None:
    config, params = stored.model("bytes", spec)
    rules = (("self_attn", ActivationSpec(bits=8)), ("mlp", None))
    policy = dataclasses.replace(default_policy(QuantSpec(), tied=False), activations=rules)
    save_quantized(folder / "m", config, params, tiny.byte_tokenizer(), policy)


# ---------------------------------------------------------------------------- teachers and states


def _cache(precision: Any, folder: Path) -> None:
    c = tiny.config()
    rows = Packed(**{name: np.array(a) for name, a in tiny.batch(c, 6, 8).items()})
    h, e = jax.random.normal(jax.random.key(0), (2, c.vocab_size, 8))

    def apply(params: Any, tokens: Any, positions: Any = None, segment_ids: Any = None) -> Output:
        return Output(jnp.take(params["h"], tokens, axis=0), params["e"])

    write_cache(
        folder,
        apply,
        {"h": h, "e": e},
        rows,
        k=4,
        rows_per_shard=2,
        batch_size=2,
        precision=precision,
        fingerprints={"model": "m", "tokenizer": "t", "data": "d"},
    )


def _read_cache(folder: Path) -> None:
    cache = open_cache(folder)
    cache[0], cache[: min(len(cache), 100)]


def _set(level: Any, folder: Path) -> None:
    rng = np.random.default_rng(0)
    learned = {
        "inputs": jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32),
        "label_logits": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32),
        "log_rates": jnp.float32(-1.5),
    }
    fixed = {"labels": jnp.array([0, 2, 1, 0], jnp.int32), "mask": jnp.ones((4, 2), bool)}
    made = StoredSet(
        synthetic=Synthetic(learned=learned, fixed=fixed),
        level=level,
        method="random",
        classes=("a", "b", "c"),
        texts=("one", "two", "three", "four"),
        settings={"inner_steps": 7, "rate": 0.05},
        slices={"rare": [1, 3]},
    )
    save_set(folder / "set", made)


def _state(value: float) -> dict[str, Any]:
    return {"step": jnp.asarray(3, jnp.int32), "w": {"kernel": jnp.full((8, 8), value)}}


def _checkpoint(folder: Path) -> None:
    with Checkpoints(folder / "c") as checkpoints:
        checkpoints.save(3, _state(1.0), "data")


def _read_checkpoint(folder: Path) -> None:
    with Checkpoints(folder / "c") as checkpoints:
        if checkpoints.latest is not None:
            checkpoints.restore(_state(0.0), "data")


_OPTIONS = {"model": "m", "bits": 4, "lr": 0.1, "names": ["a"], "out": "x"}


def _run(folder: Path) -> None:
    run = RunDirectory(folder / "run", _OPTIONS, resume=False)
    rows = [{"step": i, "loss": 1.0 / (i + 1), "kl": float("nan")} for i in range(5)]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.path / "results.json").write_text(json.dumps({"teacher": {"nll": 1.0}, "seconds": 3}))
    run.student.mkdir()
    weights = {"layers/mlp/up_proj/kernel": {"bits": 4, "group": 32}}
    marks = {"weights": weights, "activations": [["mlp", None]]}
    (run.student / "quantization.json").write_text(json.dumps(marks))


def _read_run(folder: Path) -> None:
    path = folder / "run"
    [row["step"] + 1 for row in read_metrics(path)]
    facts = read_run(path)
    assert facts.name == "run"
    RunDirectory(path, _OPTIONS, resume=True).rewind(3)


# ---------------------------------------------------------------------------- data

_ROWS: list[dict[str, Any]] = [
    {"text": "the quick brown fox", "label": 0, "rare": True, "weight": 0.5, "meta": {"a": [1]}},
    {"text": "jumps 1234 hello", "label": 1, "rare": False, "weight": 2, "meta": {"a": []}},
    {"text": "über 中文 😀", "label": 0, "rare": None, "weight": None, "meta": None},
]
_CHATS: list[dict[str, Any]] = [
    {"messages": [*_CHAT, {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
    {"instruction": "add 1 2", "input": "now", "output": "3"},
    {"messages": _CHAT, "id": 7},
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
    slices_of(data, ["rare"], required=False)
    data.take(np.array([0]))


def _choices(folder: Path) -> None:
    row = {"context": "2 + 2 =", "choices": [" 4", " 5"], "label": 0}
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))


def _each(make: Callable[..., Any], *options: tuple[Any, ...]) -> tuple[Callable[[Path], Any], ...]:
    return tuple(functools.partial(make, *chosen) for chosen in options)


_DATA = {".jsonl": "lines", ".gz": "gz", ".json": "json", ".parquet": "bytes", ".txt": "bytes"}
READERS = {
    "gguf": Reader(
        _each(_gguf, ("Q8_0", "llama"), ("F16", "qwen3"), (None, "llama"), ("Q4_0", "qwen2")),
        _read_gguf,
        {".gguf": "gguf"},
    ),
    "safetensors": Reader((_safetensors,), _read_safetensors, {".safetensors": "safetensors"}),
    "hf": Reader(
        _each(_hf, (False,), (True,)),
        lambda folder: load_hf(folder / "model"),
        {".json": "json", ".safetensors": "safetensors"},
    ),
    "config": Reader(
        _each(_config, ("llama",), ("mistral",), ("qwen2",), ("qwen3",)),
        _read_config,
        {".json": "json"},
    ),
    "tokenizer": Reader(
        _each(_tokenizer, (True,), (False,)),
        _read_tokenizer,
        {".json": "json", ".jinja": "bytes"},
    ),
    "quantized": Reader(
        _each(_quantized, ("group 32",), ("asymmetric channel",)),
        lambda folder: load_model(folder / "m"),
        {".json": "json", "": "bytes", "_METADATA": "json"},
        slow=True,
    ),
    "teacher_cache": Reader(
        _each(_cache, ("float16",), ("float32",)), _read_cache, {".json": "json", ".npy": "npy"}
    ),
    "data": Reader(
        (
            *_each(_jsonl, (_ROWS, "data.jsonl"), (_CHATS, "data.jsonl")),
            *_each(_jsonl, (_ROWS, "data.json"), (_CHATS, "data.jsonl.gz")),
            functools.partial(_parquet, _ROWS),
            functools.partial(_parquet, _CHATS),
            _txt,
        ),
        _read_data,
        _DATA,
    ),
    "labelled": Reader(
        (
            *_each(_npz, ("images",), ("inputs",)),
            functools.partial(_jsonl, _ROWS, "data.jsonl"),
            functools.partial(_parquet, _ROWS),
        ),
        _read_labelled,
        _DATA | {".npz": "npz"},
    ),
    "pairing": Reader(
        _each(_jsonl, (_ROWS, "data.jsonl"), (_CHATS, "data.jsonl")), _read_pairs, _DATA
    ),
    "choices": Reader(
        (_choices,), lambda folder: load_choices(folder / "q.jsonl"), {".jsonl": "lines"}
    ),
    "stored_set": Reader(
        _each(_set, ("embeddings",), ("text",)),
        lambda folder: load_set(folder / "set"),
        {".safetensors": "safetensors"},
    ),
    "run_directory": Reader((_run,), _read_run, {".json": "json", ".jsonl": "lines"}),
    "checkpoint": Reader(
        (_checkpoint,),
        _read_checkpoint,
        {"": "bytes", "_METADATA": "json", "metadata": "json"},
        slow=True,
    ),
}


def targets(reader: Reader, folder: Path) -> list[tuple[Path, str]]:
    """The files of a valid set that are damaged, each with the way of it, in a fixed order."""
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.parent == folder and reader is READERS["hf"]:
            continue
        names = [end for end in reader.kinds if end and path.name.endswith(end)]
        if not names and "" in reader.kinds:
            names = [""]
        if names:
            found.append((path, reader.kinds[names[-1]]))
    return found
