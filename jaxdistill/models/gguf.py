"""Reading a GGUF file: configuration, float32 parameters in the HF layout, and tokenizer.

Llama-architecture files keep the rows of the query and key projections in an order that suits
interleaved rotary pairs; they are put back into HF's ``rotate_half`` order here. Quantized tensors
of every type that the ``gguf`` package knows are dequantized to float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxdistill.errors import UserError
from jaxdistill.models.config import ModelConfig, RopeScaling
from jaxdistill.models.gguf_file import AGAIN, GGUFFile, GGUFTensor
from jaxdistill.models.gguf_layout import (
    ARCHITECTURES,
    KERNELS,
    NORMS,
    decimal,
    gguf_field,
    has_bias,
    kernel_shape,
    norm_sizes,
    permuted_heads,
    recover_llama3,
    unpermute_rows,
)
from jaxdistill.models.gguf_tokenizer import tokenizer_from_gguf
from jaxdistill.models.tokenizer import Tokenizer


def read_gguf_config(path: str | Path) -> ModelConfig:
    """Read a GGUF model's configuration alone; raises as ``read_gguf`` does."""
    return _config(GGUFFile(path))[0]


def read_gguf(path: str | Path) -> tuple[ModelConfig, dict[str, Any], Tokenizer]:
    """Read a GGUF model: its configuration, its parameters in float32, and its tokenizer.

    Architectures llama (Mistral and SmolLM2 among them), qwen2 and qwen3. Parameters are numpy
    arrays, layers stacked on axis 0, kernels ``[in, out]``; the head is absent when it is tied.

    Raises:
        UserError: in one line, if the file is missing, cut off, not a GGUF file, of another
            architecture, or lacks a tensor, or if a tensor or its shape is not as expected.
    """
    file = GGUFFile(path)
    if gguf_field(file, "split.count", int, 0) > 1:
        raise UserError(
            f"{str(path)!r} is one part of a split GGUF; merge the parts first with "
            "llama-gguf-split --merge"
        )
    config, architecture = _config(file)
    plan = _plan(config, architecture, file.tensors)  # all is checked before anything is read
    tokenizer = tokenizer_from_gguf(file)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{str(path)!r} has {len(tokenizer)} tokens but {config.vocab_size} embedding rows; "
            f"{AGAIN}"
        )
    params: dict[str, Any] = {}
    for target, parts, heads in plan:
        *parents, leaf = target.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        arrays = (_dense(file, t, heads) for t in parts)
        if parents[0] == "layers":
            node[leaf] = _stack(arrays, len(parts), transpose=leaf == "kernel")
        else:
            (array,) = arrays
            node[leaf] = np.array(array.T if leaf == "kernel" else array, order="C")
    return config, params, tokenizer


# ---------------------------------------------------------------------------- configuration


def _config(file: GGUFFile) -> tuple[ModelConfig, str]:
    """Return the configuration and the architecture's GGUF name."""
    tensors = file.tensors
    arch = gguf_field(file, "general.architecture", str)
    if arch not in ARCHITECTURES:
        raise UserError(
            f"GGUF architecture {arch!r} is not supported; accepted: {', '.join(ARCHITECTURES)}"
        )

    def count(name: str, default: int | None = None) -> int:
        value = gguf_field(file, f"{arch}.{name}", int, default)
        if value is None or value < 1:
            raise UserError(
                f"GGUF metadata {arch}.{name} is {value}; accepted: a positive integer; {AGAIN}"
            )
        return value

    def real(name: str, default: float) -> float:
        value = decimal(gguf_field(file, f"{arch}.{name}", float, default))
        if not 0 <= value < math.inf:
            raise UserError(f"GGUF metadata {arch}.{name} is {value}; accepted: from 0; {AGAIN}")
        return value

    if gguf_field(file, f"{arch}.expert_count", int, 0):
        raise UserError("a mixture-of-experts GGUF is not supported; give a dense model")
    heads, width = count("attention.head_count"), count("embedding_length")
    head_dim = count("attention.key_length", count("rope.dimension_count", width // heads))
    rotated = count("rope.dimension_count", head_dim)
    if rotated != head_dim or count("attention.value_length", head_dim) != head_dim or head_dim % 2:
        raise UserError(
            f"GGUF head sizes are not supported (key {head_dim}, value "
            f"{count('attention.value_length', head_dim)}, rotated {rotated}); accepted: one even "
            "size for all three"
        )
    table = tensors.get("token_embd.weight")
    if table is None:
        raise UserError(f"the GGUF file lacks the tensor 'token_embd.weight'; {AGAIN}")
    theta = real("rope.freq_base", 10000.0)
    window = gguf_field(file, f"{arch}.attention.sliding_window", int, 0) or None
    eos = [
        gguf_field(file, f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")
    ]
    eos = list(dict.fromkeys(i for i in eos if i is not None))
    config = ModelConfig(
        model_type="mistral" if arch == "llama" and window else arch,
        vocab_size=table.shape[0],
        hidden_size=width,
        intermediate_size=count("feed_forward_length"),
        num_layers=count("block_count"),
        num_heads=heads,
        num_kv_heads=count("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=count("context_length", 2048),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, arch, head_dim, theta),
        rms_norm_eps=real("attention.layer_norm_rms_epsilon", 1e-5),
        tie_embeddings="output.weight" not in tensors,
        qkv_bias=arch == "qwen2" or "blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_down.bias" in tensors,
        qk_norm=arch == "qwen3",
        sliding_window=window,
        bos_token_id=gguf_field(file, "tokenizer.ggml.bos_token_id", int),
        eos_token_id=tuple(eos) if len(eos) > 1 else next(iter(eos), None),
    )
    return config, arch


def _rope_scaling(file: GGUFFile, arch: str, head_dim: int, theta: float) -> RopeScaling | None:
    """Return the rotary scaling: ``linear`` from the metadata, ``llama3`` from ``rope_freqs``."""
    kind = gguf_field(file, f"{arch}.rope.scaling.type", str, "none")
    factor = gguf_field(file, f"{arch}.rope.scaling.factor", float)
    older = gguf_field(file, f"{arch}.rope.scale_linear", float)
    if factor is None and older is not None:
        kind, factor = "linear", older
    linear = None
    if kind == "linear":
        linear = RopeScaling(rope_type="linear", factor=decimal(1.0 if factor is None else factor))
    elif kind != "none":
        raise UserError(
            f"GGUF rope scaling {kind!r} is not supported; accepted: none, linear, llama3"
        )
    factors = file.tensors.get("rope_freqs.weight")
    if factors is None:
        return linear
    if factors.shape != (head_dim // 2,) or linear is not None:
        raise UserError(
            "GGUF rope_freqs.weight does not fit the model's rotary embedding; accepted: "
            f"{head_dim // 2} llama3 factors and no linear scaling"
        )
    return recover_llama3(file.read(factors), head_dim, theta)


# ---------------------------------------------------------------------------- tensors


def _plan(
    config: ModelConfig, arch: str, tensors: dict[str, GGUFTensor]
) -> list[tuple[str, list[GGUFTensor], int | None]]:
    """Return (parameter path, its tensors by layer, reordered heads), names and shapes checked."""
    known = {"rope_freqs.weight"}

    def take(name: str, *shape: int) -> GGUFTensor:
        if name not in tensors:
            raise UserError(f"the GGUF file lacks the tensor {name!r}; {AGAIN}")
        given = tensors[name].shape
        if given != shape:
            raise UserError(f"GGUF tensor {name!r} has shape {given}; accepted: {shape}; {AGAIN}")
        known.add(name)
        return tensors[name]

    def layers(suffix: str, *shape: int) -> list[GGUFTensor]:
        return [take(f"blk.{i}.{suffix}", *shape) for i in range(config.num_layers)]

    table = (config.vocab_size, config.hidden_size)
    plan: list[tuple[str, list[GGUFTensor], int | None]] = [
        ("embed_tokens/embedding", [take("token_embd.weight", *table)], None),
        ("norm/weight", [take("output_norm.weight", config.hidden_size)], None),
    ]
    if not config.tie_embeddings:
        plan.append(("lm_head/kernel", [take("output.weight", *table)], None))
    for path, name in KERNELS.items():
        rows_in, rows_out = kernel_shape(config, path)
        heads = permuted_heads(config, arch, path)
        plan.append((f"layers/{path}/kernel", layers(f"{name}.weight", rows_out, rows_in), heads))
        if has_bias(config, path):
            plan.append((f"layers/{path}/bias", layers(f"{name}.bias", rows_out), heads))
    for path, size in norm_sizes(config).items():
        plan.append((f"layers/{path}/weight", layers(f"{NORMS[path]}.weight", size), None))
    if unknown := sorted(tensors.keys() - known):
        raise UserError(
            f"GGUF tensor {unknown[0]!r} is not part of a {arch} model as this library knows it; "
            f"accepted architectures: {', '.join(ARCHITECTURES)}"
        )
    return plan


def _dense(file: GGUFFile, tensor: GGUFTensor, heads: int | None) -> Float[np.ndarray, "out *rest"]:
    """Return one tensor in float32, its rows in HF's order."""
    x = file.read(tensor)
    return x if heads is None else unpermute_rows(x, heads)


def _stack(
    arrays: Iterator[Float[np.ndarray, "out *rest"]], layers: int, *, transpose: bool
) -> Float[np.ndarray, "layers *rest"]:
    """Stack the layers' arrays on axis 0, kernels turned to [in, out], a layer at a time."""
    first = next(arrays)
    out = np.empty((layers, *(reversed(first.shape) if transpose else first.shape)), np.float32)
    out[0] = first.T if transpose else first
    for i, array in enumerate(arrays, 1):
        out[i] = array.T if transpose else array
    return out
