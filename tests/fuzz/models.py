"""Readers of models: GGUF, safetensors, configs, tokenizers, quantized students."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxdistill.models.config import RopeScaling, config_from_hf, config_to_hf
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
from jaxdistill.train.data import encode_rows
from tests import stored, tiny
from tests.fuzz.reader import CHAT, Reader, each
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


def _read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    fingerprint(tokenizer)
    encode_rows([{"text": "hello hello 1234\n"}, {"messages": CHAT}], tokenizer)
    encode_rows([{"messages": CHAT}], tokenizer, loss_on="completion", template="plain")


def _quantized(spec: str, folder: Path) -> None:
    config, params = stored.model("bytes", spec)
    rules = (("self_attn", ActivationSpec(bits=8)), ("mlp", None))
    policy = dataclasses.replace(default_policy(QuantSpec(), tied=False), activations=rules)
    save_quantized(folder / "m", config, params, tiny.byte_tokenizer(), policy)


READERS = {
    "gguf": Reader(
        each(_gguf, ("Q8_0", "llama"), ("F16", "qwen3"), (None, "llama"), ("Q4_0", "qwen2")),
        _read_gguf,
        {".gguf": "gguf"},
    ),
    "safetensors": Reader((_safetensors,), _read_safetensors, {".safetensors": "safetensors"}),
    "hf": Reader(
        each(_hf, (False,), (True,)),
        lambda folder: load_hf(folder / "model"),
        {".json": "json", ".safetensors": "safetensors"},
        beside=("x.safetensors",),
    ),
    "config": Reader(
        each(_config, ("llama",), ("mistral",), ("qwen2",), ("qwen3",)),
        _read_config,
        {".json": "json"},
    ),
    "tokenizer": Reader(
        each(_tokenizer, (True,), (False,)),
        _read_tokenizer,
        {".json": "json", ".jinja": "bytes"},
    ),
    "quantized": Reader(
        each(_quantized, ("group 32",), ("asymmetric channel",)),
        lambda folder: load_model(folder / "m"),
        {".json": "json", "": "bytes", "_METADATA": "json"},
        slow=True,
    ),
}
