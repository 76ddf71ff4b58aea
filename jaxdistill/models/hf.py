"""Hugging Face model directories, read and written: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxdistill._checksums import check_directory
from jaxdistill.errors import UserError
from jaxdistill.mesh import fetch, is_primary, on_primary
from jaxdistill.models.config import (
    MAX_SIZE,
    ModelConfig,
    config_from_hf,
    config_to_hf,
    with_stop_ids,
)
from jaxdistill.models.decoder import Params
from jaxdistill.models.hf_directory import (
    EDITABLE,
    GENERATION,
    INDEX,
    WEIGHTS,
    some,
    write_model_directory,
    write_weights,
)
from jaxdistill.models.hf_layout import HFTensor, hf_layout
from jaxdistill.models.json_text import read_object
from jaxdistill.models.safetensors import FLOAT_TAGS, SafetensorsFile
from jaxdistill.models.sharding import Layout, make_leaf
from jaxdistill.models.tokenizer import Tokenizer
from jaxdistill.paths import walk

_log = logging.getLogger(__name__)
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 4096  # of a table, compared at a time
_SHARD = re.compile(r"[\w.=+@ -]{1,200}\.safetensors", re.ASCII)  # no way out of the directory
SAVE_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def load_hf(
    directory: str | os.PathLike[str], layout: Layout = "sharded"
) -> tuple[ModelConfig, Params]:
    """Read a model directory's config and weights.

    Tensors of any float type are copied one at a time into float32 leaves allocated beforehand, so
    the peak is the float32 model and one tensor; on a mesh each host reads only what its devices
    hold, one leaf at a time. Where the config ties the head to the embedding and the
    checkpoint has another ``lm_head.weight``, the head is untied and a warning logged, as
    transformers does. Rotary frequency buffers are ignored. Stop ids are those of config.json and
    generation_config.json.

    Args:
        directory: holds config.json and model.safetensors, or its shards and their index.
        layout: how the params lie on the present mesh, see ``models.sharding``.

    Returns:
        The config, and the params, layers stacked on axis 0, kernels ``[in, out]``: numpy arrays,
        or on a mesh JAX arrays in their places.

    Raises:
        UserError: a file or tensor is missing, cut off, misshapen, unexpected or not of float type,
            or a file differs from the directory's checksums.
    """
    directory = Path(directory)
    on_primary(lambda: check_directory(directory, EDITABLE), f"check {directory}")
    raw = read_json(directory / "config.json", "a model directory with config.json and safetensors")
    if raw.get("quantization_config"):
        given = raw["quantization_config"]
        method = given.get("quant_method", "unknown") if isinstance(given, dict) else given
        raise UserError(
            f"{directory} holds weights quantized with {method!r}; accepted: float weights; "
            "give the unquantized model"
        )
    where = _locate(directory)
    config = _untied(directory, _config(directory, raw), where)
    tensors = hf_layout(config)
    _check_names(directory, config, tensors, where)

    for t in tensors:  # all of them, before anything of the model's size is allocated
        file = where[t.name]
        entry = file.entries[t.name]
        if entry.tag not in FLOAT_TAGS:
            raise UserError(
                f"{t.name} in {file.path} is stored as {entry.tag}; accepted: "
                f"{', '.join(FLOAT_TAGS)}; give the unquantized model"
            )
        if entry.shape != t.shape:
            raise UserError(
                f"{t.name} in {file.path} has shape {list(entry.shape)} where config.json asks for "
                f"{list(t.shape)}; give the config.json that belongs to these weights"
            )
    leaves: dict[tuple[str, ...], list[HFTensor]] = {}
    for t in tensors:
        leaves.setdefault(t.path, []).append(t)
    params: Params = {}
    for path, parts in leaves.items():
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        stack = () if parts[0].layer is None else (config.num_layers,)
        shape = (*stack, *parts[0].stored_shape)
        node[path[-1]] = make_leaf(
            "/".join(path), shape, functools.partial(_read_part, where, parts), layout
        )
    return config, params


def read_hf_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """Read a model directory's shape and stop ids; its weights only tell if the head is tied.

    Raises:
        UserError: a file is missing or damaged, or the model is not supported.
    """
    directory = Path(directory)
    on_primary(lambda: check_directory(directory, EDITABLE), f"check {directory}")
    raw = read_json(directory / "config.json", "a model's config.json")
    config = _config(directory, raw)
    has_weights = any((directory / name).is_file() for name in (WEIGHTS, INDEX))
    return _untied(directory, config, _locate(directory)) if has_weights else config


def save_hf(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "float32",
    max_shard_bytes: int | float = 5e9,
    card: str | None = None,
) -> None:
    """Write a model directory that ``transformers`` (and vLLM, MLX, llama.cpp's converter) opens.

    The directory appears whole or not at all: everything is written to a temporary sibling, which
    then takes its name. A former model directory of that name is replaced.

    Args:
        directory: where to write; absent, empty, or a former model directory.
        config: the model's shape.
        params: its params, numpy or JAX arrays of any float type.
        tokenizer: its files are written beside the weights.
        dtype: the stored type: float32, float16 or bfloat16.
        max_shard_bytes: start another file, and write an index, beyond this many bytes.
        card: the text of README.md, with ``hf_directory.CARD_MARK`` in it.

    Raises:
        UserError: ``directory`` holds something else, ``dtype`` is not one of the three, the params
            are not this config's, or they do not fit float16.
    """
    if dtype not in SAVE_DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; accepted: {', '.join(SAVE_DTYPES)}")
    layout = hf_layout(config)
    leaves = _leaves(config, params, layout)
    by_name = {t.name: t for t in layout}

    left = [t.name for t in layout]

    def get(name: str) -> np.ndarray:
        left.remove(name)
        t = by_name[name]
        leaf = fetch(leaves[t.path] if t.layer is None else leaves[t.path][t.layer])
        return leaf.T if t.transpose else leaf

    tensors = [(t.name, SAVE_DTYPES[dtype], t.shape) for t in layout]

    def gather() -> None:  # every process takes part in it, also where the first cannot write
        while left:
            get(left[0])

    def write() -> None:
        try:
            write_model_directory(
                directory,
                config_to_hf(config) | {"torch_dtype": dtype, "dtype": dtype},
                lambda part: write_weights(part, tensors, get, max_shard_bytes),
                tokenizer,
                card,
            )
        finally:
            if jax.process_count() > 1:
                gather()

    if not is_primary():
        gather()
    on_primary(write, f"write {directory}")


# Reading


def read_json(path: Path, accepted: str) -> dict[str, Any]:
    """Return a JSON object; raise ``UserError`` saying what is accepted where there is none."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}; accepted: {accepted}")
    try:
        return read_object(path)
    except (ValueError, OSError) as e:
        raise UserError(f"cannot read {path} as JSON ({e}); fetch it again") from None


def _config(directory: Path, raw: dict[str, Any]) -> ModelConfig:
    """Return the config, its stop ids joined by those of generation_config.json."""
    config, path = config_from_hf(raw), directory / GENERATION
    if not path.is_file():
        return config
    eos = read_json(path, GENERATION).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int and -1 <= token <= MAX_SIZE for token in ids):
        raise UserError(f"{path} has the eos_token_id {eos!r}; accepted: a token id, or several")
    return with_stop_ids(config, ids)


def _untied(
    directory: Path, config: ModelConfig, where: Mapping[str, SafetensorsFile]
) -> ModelConfig:
    """Return the config, untied if the checkpoint has a head that differs from the embedding."""
    head, table = where.get(_HEAD), where.get(_TABLE)
    if not config.tie_embeddings or head is None or table is None:
        return config
    one, other = head.entries[_HEAD], table.entries[_TABLE]
    if one.tag in FLOAT_TAGS and other.tag in FLOAT_TAGS and one.shape == other.shape:
        rows = (slice(i, i + _ROWS) for i in range(0, one.shape[0], _ROWS))
        if all(_same(head.read(_HEAD, part), table.read(_TABLE, part)) for part in rows):
            return config
    if is_primary():
        _log.warning(
            "%s: config.json ties the head to the embedding, but the checkpoint has another %s; "
            "it is read as untied",
            directory,
            _HEAD,
        )
    return dataclasses.replace(config, tie_embeddings=False)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype == b.dtype:
        return a.tobytes() == b.tobytes()
    with np.errstate(all="ignore"):  # a float64 beyond float32 becomes infinite
        return np.array_equal(a.astype(np.float32), b.astype(np.float32))


def _locate(directory: Path) -> dict[str, SafetensorsFile]:
    """Return the file that holds each tensor, from the single file or from the index."""
    if (directory / WEIGHTS).is_file():
        file = SafetensorsFile(directory / WEIGHTS)
        return dict.fromkeys(file.entries, file)
    if not (directory / INDEX).is_file():
        raise UserError(
            f"{directory} has neither {WEIGHTS} nor {INDEX}; accepted: safetensors weights; "
            "convert the model with transformers' save_pretrained"
        )
    names = read_json(directory / INDEX, INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise UserError(f"{directory / INDEX} has no weight_map; fetch it again")
    if outside := [shard for shard in names.values() if not _SHARD.fullmatch(shard)]:
        raise UserError(
            f"{directory / INDEX} names the shard {outside[0]!r}; accepted: files of that "
            "directory that end in .safetensors; fetch it again"
        )
    files: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(names.values())):
        if not (directory / shard).is_file():
            raise UserError(
                f"{directory} lacks the shard {shard} that {INDEX} names; fetch it again"
            )
        files[shard] = SafetensorsFile(directory / shard)
    absent = [n for n, shard in names.items() if n not in files[shard].entries]
    if absent:
        raise UserError(
            f"{directory / names[absent[0]]} lacks {some(absent)} that {INDEX} places there; "
            "fetch it again"
        )
    return {name: files[shard] for name, shard in names.items()}


def _check_names(
    directory: Path, config: ModelConfig, layout: list[HFTensor], where: dict[str, SafetensorsFile]
) -> None:
    """Raise ``UserError`` if the checkpoint lacks a tensor or has one that nothing uses."""
    wanted = {t.name for t in layout}
    missing = [t.name for t in layout if t.name not in where]
    if missing:
        raise UserError(
            f"{directory} lacks {some(missing)}, which its config.json asks for; give the "
            "config.json that belongs to these weights"
        )
    unexpected = sorted(
        n
        for n in where
        if n not in wanted
        and not n.endswith("rotary_emb.inv_freq")
        and not (n == _HEAD and config.tie_embeddings)
    )
    if unexpected:
        raise UserError(
            f"{directory} has {some(unexpected)}, which a {config.model_type} model of its "
            "config.json does not use; give the config.json that belongs to these weights"
        )


def _read_part(
    where: Mapping[str, SafetensorsFile], tensors: Sequence[HFTensor], index: tuple[slice, ...]
) -> np.ndarray:
    """Read a part of a leaf as float32, from the tensors that make it up, one at a time."""
    if tensors[0].layer is None:
        layers, inside = [tensors[0]], index
    else:
        layers, inside = tensors[index[0]], index[1:]
    out = np.empty(0, np.float32)
    for i, t in enumerate(layers):
        stored = inside[::-1] if t.transpose else inside
        source = where[t.name].read(t.name, stored[0])[:, *stored[1:]]
        source = source.T if t.transpose else source
        if not i:
            out = np.empty((len(layers), *source.shape), np.float32)
        with np.errstate(all="ignore"):  # a float64 beyond float32 becomes infinite
            np.copyto(out[i], source, casting="unsafe")
    return out[0] if tensors[0].layer is None else out


# Writing


def _leaves(
    config: ModelConfig, params: Params, layout: list[HFTensor]
) -> dict[tuple[str, ...], Any]:
    """Return the leaves by path; raise ``UserError`` unless they are just those of the config."""
    found = {tuple(path.split("/")): leaf for path, leaf in walk(params)}
    wanted = {
        t.path: ((config.num_layers,) if t.layer is not None else ()) + t.stored_shape
        for t in layout
    }
    missing = ["/".join(p) for p in wanted if p not in found]
    unexpected = ["/".join(p) for p in found if p not in wanted]
    if missing or unexpected:
        what = " and ".join(
            f"{verb} {some(names)}"
            for verb, names in (("lack", missing), ("have", unexpected))
            if names
        )
        raise UserError(
            f"the params {what}, against their config; accepted: the float params of a "
            f"{config.model_type} model; merge or dequantize them first"
        )
    for path, shape in wanted.items():
        if tuple(found[path].shape) != shape:
            raise UserError(
                f"the param {'/'.join(path)} has shape {list(found[path].shape)} where the config "
                f"asks for {list(shape)}; give the config that belongs to these params"
            )
    return {path: found[path] for path in wanted}
