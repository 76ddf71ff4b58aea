"""Writing a quantized model as a GGUF file that llama.cpp and transformers open.

Integers and scales go into the file as they are stored: a 4-bit kernel becomes Q4_0, an 8-bit one
Q8_0, everything else float32. Both block types hold 32 weights and one float16 scale ``d``; Q4_0
packs ``u = q + 8`` as ``byte[j] = u[j] | u[j + 16] << 4`` (ggml's ``ggml-common.h``). A scale
shared by more than 32 weights is repeated in each of their blocks, so the file holds the training
lattice exactly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from jaxtyping import Float16, Int8, UInt8

from jaxdistill._disk import create
from jaxdistill.errors import UserError
from jaxdistill.export.gguf_metadata import add_about, add_model, add_tokenizer
from jaxdistill.export.leaves import flat_leaves, group_count, take, take_float, take_half
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.gguf_layout import (
    KERNELS,
    NORMS,
    has_bias,
    kernel_shape,
    llama3_factors,
    norm_sizes,
    one_line,
    permute_rows,
    permuted_heads,
)
from jaxdistill.models.tokenizer import Tokenizer

BLOCK = 32
_ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    """One tensor to be written: its name, type, logical shape (rows first), and how to make it."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    *,
    name: str = "jaxdistill",
    description: str | None = None,
    base_model: str | None = None,
) -> None:
    """Write quantized parameters, configuration and tokenizer as one GGUF file.

    Nodes with ``kernel_q``/``kernel_scale`` (or ``embedding_q``/``embedding_scale``) are written
    from these, int4 as Q4_0 and int8 as Q8_0; float leaves as F32. The file appears whole or not at
    all. A sliding window is recorded, but llama.cpp attends over the whole context for these
    architectures.

    Args:
        path: the file to write; an existing one is replaced, missing parent folders are made.
        config: the model's shape.
        params: nested dict, layers stacked on axis 0, kernels ``[in, out]``.
        tokenizer: the model's tokenizer; GGUF files carry their own.
        name: what the file calls the model (``general.name``).
        description: what the model is and how it was measured (``general.description``).
        base_model: the hub name of the model it was made from (``general.base_model.0``).

    Raises:
        UserError: if a leaf is missing, unexpected, of another shape or bit width, if a group of
            weights that share a scale is not a multiple of 32, if GGUF cannot express the
            tokenizer, or if the file cannot be written.
    """
    if tokenizer is None:
        raise UserError("a GGUF file needs a tokenizer; give the tokenizer of the model's source")
    target = Path(path)
    if target.is_dir():
        raise UserError(f"{str(target)!r} is a directory; give the path of a .gguf file to write")
    arch = _ARCHITECTURE[config.model_type]
    tensors = _plan(config, arch, params)
    partial = target.with_name(f".jaxdistill.{os.getpid()}.part")
    writer = gguf.GGUFWriter(partial, arch)
    add_model(writer, config, name, _file_type(tensors))
    add_about(writer, description, base_model)
    add_tokenizer(writer, config, tokenizer)
    for t in tensors:
        _declare(writer, t)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.close(create(partial))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors:
            writer.write_tensor_data(t.make())
        writer.close()
        os.replace(partial, target)
    except OSError as e:
        raise UserError(f"cannot write {str(target)!r}: {one_line(e)}") from e
    finally:
        writer.close()
        with contextlib.suppress(OSError):  # gone, as it should be, or never made
            partial.unlink()


# ---------------------------------------------------------------------------- blocks


def q4_0_blocks(
    q: Int8[np.ndarray, "rows cols"], d: Float16[np.ndarray, "rows blocks"]
) -> UInt8[np.ndarray, "rows bytes"]:
    """Pack integers in [-8, 7] and one scale per 32 of them into Q4_0 bytes (18 per block)."""
    u = (q + np.int8(8)).view(np.uint8).reshape(*d.shape, 2, BLOCK // 2)
    packed = u[..., 0, :] | (u[..., 1, :] << np.uint8(4))
    return np.concatenate([_scale_bytes(d), packed], axis=-1).reshape(q.shape[0], -1)


def q8_0_blocks(
    q: Int8[np.ndarray, "rows cols"], d: Float16[np.ndarray, "rows blocks"]
) -> UInt8[np.ndarray, "rows bytes"]:
    """Pack 8-bit integers and one scale per 32 of them into Q8_0 bytes (34 per block)."""
    values = np.ascontiguousarray(q).view(np.uint8).reshape(*d.shape, BLOCK)
    return np.concatenate([_scale_bytes(d), values], axis=-1).reshape(q.shape[0], -1)


def _scale_bytes(d: Float16[np.ndarray, "rows blocks"]) -> UInt8[np.ndarray, "rows blocks 2"]:
    return np.ascontiguousarray(d, dtype="<f2").view(np.uint8).reshape(*d.shape, 2)


# ---------------------------------------------------------------------------- tensors


def _plan(config: ModelConfig, arch: str, params: Mapping[str, Any]) -> list[_Tensor]:
    """Return the tensors to write; every leaf is checked, and none is left over."""
    leaves = flat_leaves(params)
    count = config.num_layers
    table = (config.vocab_size, config.hidden_size)
    plan = _matrix(leaves, "embed_tokens", "embedding", ["token_embd"], table, None)
    plan += _vector(leaves, "norm/weight", ["output_norm.weight"], config.hidden_size, None)
    if not config.tie_embeddings:
        plan += _matrix(leaves, "lm_head", "kernel", ["output"], table, None)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "llama3":
        factors = llama3_factors(config.head_dim, config.rope_theta, config.rope_scaling)
        plan.append(
            _Tensor(
                name="rope_freqs.weight",
                kind=GGMLQuantizationType.F32,
                shape=factors.shape,
                make=lambda: factors,
            )
        )
    for path, tensor in KERNELS.items():
        wide, out = kernel_shape(config, path)
        heads = permuted_heads(config, arch, path)
        names = [f"blk.{i}.{tensor}" for i in range(count)]
        plan += _matrix(leaves, f"layers/{path}", "kernel", names, (out, wide), heads)
        if has_bias(config, path):
            biases = [f"{n}.bias" for n in names]
            plan += _vector(leaves, f"layers/{path}/bias", biases, out, heads)
    for path, size in norm_sizes(config).items():
        names = [f"blk.{i}.{NORMS[path]}.weight" for i in range(count)]
        plan += _vector(leaves, f"layers/{path}/weight", names, size, None)
    if leaves:
        raise UserError(
            f"parameter {min(leaves)!r} has no place in a GGUF {arch} file; give the parameters of "
            "the exported model alone (merge or drop it first)"
        )
    return plan


def _f32(x: np.ndarray, heads: int | None) -> np.ndarray:
    x = np.ascontiguousarray(x, dtype=np.float32)
    return x if heads is None else np.ascontiguousarray(permute_rows(x, heads))


def _vector(
    leaves: dict[str, np.ndarray], path: str, names: list[str], size: int, heads: int | None
) -> list[_Tensor]:
    """Return a norm's weights or a projection's biases, one tensor per name."""
    stacked = path.startswith("layers/")
    x = take_float(leaves, path, (len(names), size) if stacked else (size,))
    x = x if stacked else x[None]
    return [
        _Tensor(
            name=n, kind=GGMLQuantizationType.F32, shape=(size,), make=lambda i=i: _f32(x[i], heads)
        )
        for i, n in enumerate(names)
    ]


def _matrix(
    leaves: dict[str, np.ndarray],
    path: str,
    leaf: str,
    names: list[str],
    shape: tuple[int, int],
    heads: int | None,
) -> list[_Tensor]:
    """Return a projection, embedding table or head, one tensor of ``shape`` (rows, in) per name.

    ``leaf`` is ``kernel`` ([in, rows], scales [groups, rows]) or ``embedding`` ([rows, in], scales
    [rows, groups]).
    """
    rows, wide = shape
    turn = leaf == "kernel"
    lead = (len(names),) if path.startswith("layers/") else ()
    node, held = f"{path}/{leaf}", (*lead, *((wide, rows) if turn else shape))
    if f"{node}_q" not in leaves:
        x = take_float(leaves, node, held).reshape(len(names), *held[-2:])
        x = x.swapaxes(1, 2) if turn else x
        return [
            _Tensor(
                name=f"{n}.weight",
                kind=GGMLQuantizationType.F32,
                shape=shape,
                make=lambda i=i: _f32(x[i], heads),
            )
            for i, n in enumerate(names)
        ]
    q = take(leaves, f"{node}_q", held)
    kinds = {
        "int4": (GGMLQuantizationType.Q4_0, q4_0_blocks),
        "int8": (GGMLQuantizationType.Q8_0, q8_0_blocks),
    }
    if q.dtype.name not in kinds:
        why = " (Q4_1's float16 offset cannot hold z * s)" if q.dtype.name[0] == "u" else ""
        raise UserError(
            f"parameter {node + '_q'!r} has type {q.dtype.name}; accepted in GGUF: int4 (Q4_0) and "
            f"int8 (Q8_0){why}; quantize it symmetrically, or export to compressed-tensors or mlx"
        )
    kind, pack = kinds[q.dtype.name]
    d = _scales(leaves, f"{node}_scale", lead, shape, turn)
    q = q.reshape(len(names), *held[-2:])

    def make(i: int) -> np.ndarray:
        integers = (q[i].T if turn else q[i]).astype(np.int8)
        blocks = np.repeat(d[i], wide // BLOCK // d.shape[-1], axis=1)
        data = pack(integers, blocks)
        return data if heads is None else np.ascontiguousarray(permute_rows(data, heads))

    return [
        _Tensor(name=f"{n}.weight", kind=kind, shape=shape, make=lambda i=i: make(i))
        for i, n in enumerate(names)
    ]


def _scales(
    leaves: dict[str, np.ndarray],
    path: str,
    lead: tuple[int, ...],
    shape: tuple[int, int],
    turn: bool,
) -> Float16[np.ndarray, "layers rows groups"]:
    """Return a quantized node's scales, rows first; blocks of 32 must be able to hold them."""
    rows, wide = shape
    groups = group_count(leaves, path, len(lead) + 2, -2 if turn else -1)
    scale = take_half(leaves, path, (*lead, *((groups, rows) if turn else (rows, groups))))
    if wide % BLOCK:
        raise UserError(
            f"{path!r}: {wide} inputs do not divide into GGUF blocks of {BLOCK}; keep this weight "
            "in float or export to another format"
        )
    if groups < 1 or wide % groups or (wide // groups) % BLOCK:
        size = wide // max(groups, 1)
        raise UserError(
            f"{path!r}: groups of {size} inputs do not fit GGUF blocks; accepted: a multiple of "
            f"{BLOCK} that divides {wide}, or one scale per channel"
        )
    scale = scale.reshape(-1, *scale.shape[-2:])
    return scale.swapaxes(1, 2) if turn else scale


def _declare(writer: gguf.GGUFWriter, t: _Tensor) -> None:
    """Announce one tensor to the writer, by its shape in bytes where it is quantized."""
    block, size = gguf.GGML_QUANT_SIZES[t.kind]
    elements = int(np.prod(t.shape))
    if t.kind == GGMLQuantizationType.F32:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), elements * 4)
        return
    shape = (*t.shape[:-1], t.shape[-1] // block * size)
    total = elements // block * size
    writer.add_tensor_info(t.name, shape, np.dtype(np.uint8), total, raw_dtype=t.kind)


def _file_type(tensors: list[_Tensor]) -> LlamaFileType:
    """Return the type that most weights have, as GGUF states it."""
    sizes: dict[GGMLQuantizationType, int] = {}
    for t in tensors:
        sizes[t.kind] = sizes.get(t.kind, 0) + int(np.prod(t.shape))
    quantized = {k: n for k, n in sizes.items() if k != GGMLQuantizationType.F32}
    if not quantized:
        return LlamaFileType.ALL_F32
    most = max(quantized, key=lambda k: quantized[k])
    return (
        LlamaFileType.MOSTLY_Q4_0
        if most == GGMLQuantizationType.Q4_0
        else LlamaFileType.MOSTLY_Q8_0
    )
