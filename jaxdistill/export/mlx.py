"""Writing a quantized model for MLX: affine groups, as ``mlx-lm`` loads them.

``mlx.core.dequantize`` reads ``w = scales * u + biases`` with unsigned integers u, packed into
uint32 words, element i of a word at bit ``bits * i``. The stored lattice is that with ``biases =
-z * scales``, z = 8 of a symmetric 4-bit weight. A scale shared by more weights than MLX's largest
group is repeated in each. 2- and 3-bit integers are written in 4 bits, which changes no value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.export.leaves import FloatType, Weight, hf_weights, pack_words
from jaxdistill.models.config import ModelConfig, config_to_hf
from jaxdistill.models.hf_directory import Tensor, write_model_directory, write_weights
from jaxdistill.models.tokenizer import Tokenizer

GROUPS = (128, 64, 32)


def write_mlx(
    directory: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    *,
    dtype: FloatType = "float32",
    max_shard_bytes: int | float = 5e9,
    card: str | None = None,
) -> None:
    """Write a directory that ``mlx_lm.load`` opens; it appears whole or not at all.

    Every quantized weight stays packed, embedding tables too.

    Args:
        directory: where to write; absent, empty, or a former model directory.
        config: the model's shape.
        params: the stored form, as ``quant.policy.quantize_params`` returns it.
        tokenizer: its files are written beside the weights.
        dtype: type of scales, biases and float tensors, which is the one MLX computes in. In
            float32 the values are exact; in float16 the file holds the same lattice, and MLX rounds
            each value as it unpacks it, and runs faster.
        max_shard_bytes: start another file beyond this many bytes.
        card: the text of README.md.

    Raises:
        UserError: a leaf is missing, unexpected or of another shape or type, a group of weights
            that share a scale is not a multiple of 32, nothing is quantized, float16 cannot hold
            ``z * scales``, or the directory holds something else.
    """
    weights = hf_weights(config, params, "mlx")
    kind = np.dtype(dtype)
    tensors: list[Tensor] = []
    makers: dict[str, Callable[[], np.ndarray]] = {}
    modules: dict[str, tuple[int, int]] = {}  # group size and bits
    sizes: dict[tuple[int, int], int] = {}

    def add(name: str, dtype: np.dtype, shape: tuple[int, ...], make: Callable[[], np.ndarray]):
        tensors.append((name, dtype, shape))
        makers[name] = make

    for w in weights:
        if w.bits is None:
            add(w.tensor.name, kind, w.tensor.shape, w.values)
            continue
        rows, columns = w.tensor.shape
        group = _group(w)
        modules[w.module] = group, w.bits
        sizes[group, w.bits] = sizes.get((group, w.bits), 0) + rows * columns
        small = rows, columns // group
        words = rows, columns * w.bits // 32
        add(f"{w.module}.weight", np.dtype("<u4"), words, lambda w=w: pack_words(*_integers(w)))
        add(f"{w.module}.scales", kind, small, lambda w=w, g=group: _scales(w, g))
        add(f"{w.module}.biases", kind, small, lambda w=w, g=group: _biases(w, g, kind))
    if not modules:
        raise UserError("no weight is quantized; export to the format hf instead")
    usual = max(sizes, key=lambda k: sizes[k])
    quantization: dict[str, Any] = _entry(*usual)
    quantization |= {name: _entry(*spec) for name, spec in modules.items() if spec != usual}
    d = config_to_hf(config) | {"torch_dtype": dtype, "dtype": dtype}
    d |= {"quantization": quantization, "quantization_config": quantization}
    write_model_directory(
        directory,
        d,
        lambda part: write_weights(part, tensors, lambda n: makers[n](), max_shard_bytes),
        tokenizer,
        card,
    )


def _group(w: Weight) -> int:
    """Return the largest group of MLX's that the weights sharing a scale divide into."""
    found = next((g for g in GROUPS if w.group_size % g == 0), None)
    if found is None:
        raise UserError(
            f"{'/'.join(w.tensor.path)!r}: groups of {w.group_size} inputs do not fit MLX; "
            "accepted: a multiple of 32; keep this weight in float or export to compressed-tensors"
        )
    return found


def _entry(group: int, bits: int) -> dict[str, int]:
    return {"group_size": group, "bits": bits}


def _integers(w: Weight) -> tuple[np.ndarray, int]:
    return w.unsigned(), w.bits or 0


def _scales(w: Weight, group: int) -> np.ndarray:
    return np.repeat(w.scales(), w.group_size // group, axis=1)


def _biases(w: Weight, group: int, kind: np.dtype) -> np.ndarray:
    """Return ``-z * s``: at most 8 and 11 significant bits, exact in float32."""
    exact = -w.zeros().astype(np.float32) * w.scales().astype(np.float32)
    with np.errstate(over="ignore"):
        held = exact.astype(kind)
    if not np.array_equal(held.astype(np.float32), exact):
        raise UserError(
            f"{'/'.join(w.tensor.path)!r}: its zero points times its scales are not {kind.name} "
            "values; write this model in float32"
        )
    return np.repeat(held, w.group_size // group, axis=1)
