"""Writing a quantized model in compressed-tensors' ``pack-quantized`` form.

``transformers`` (with the package ``compressed-tensors``) and vLLM open it. A linear layer of
``[out, in]`` becomes ``weight_packed`` int32 ``[out, in * bits / 32]`` (element i of a word at bit
``bits * i``, value ``q + 2^(bits-1)``), ``weight_scale`` float16 ``[out, groups]``,
``weight_shape`` int64, and if asymmetric ``weight_zero_point``, packed along ``out``. 2- and 3-bit
integers are written in 4 bits, which changes no value.

Embedding tables are written as the float values of their lattice: readers pack linear layers only,
and a tied head is the table itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.export.leaves import FloatType, Weight, hf_weights, pack_words
from jaxdistill.models.config import ModelConfig, config_to_hf
from jaxdistill.models.hf_directory import Tensor, write_model_directory, write_weights
from jaxdistill.models.tokenizer import Tokenizer


def write_compressed_tensors(
    directory: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    *,
    dtype: FloatType = "float32",
    pack_head: bool = True,
    max_shard_bytes: int | float = 5e9,
    card: str | None = None,
) -> None:
    """Write a directory of packed integers and float16 scales; it appears whole or not at all.

    Args:
        directory: where to write; absent, empty, or a former model directory.
        config: the model's shape.
        params: the stored form, as ``quant.policy.quantize_params`` returns it.
        tokenizer: its files are written beside the weights.
        dtype: type of the float tensors (tables, norms, biases), and the one that readers compute
            in unless told otherwise. An 8-bit table's values need up to 19 significant bits, so
            float32 alone holds them exactly; float16 halves them.
        pack_head: whether an untied quantized head is packed too, or written as float values, which
            every version of every reader opens.
        max_shard_bytes: start another file beyond this many bytes.
        card: the text of README.md.

    Raises:
        UserError: a leaf is missing, unexpected or of another shape or type, nothing is quantized,
            or the directory holds something else.
    """
    weights = hf_weights(config, params, "compressed-tensors")
    packed = [w for w in weights if _is_linear(w) and w.bits is not None]
    packed = [w for w in packed if pack_head or w.module != "lm_head"]
    if not packed:
        raise UserError("no linear layer is quantized; export to the format hf instead")
    tensors: list[Tensor] = []
    makers: dict[str, Callable[[], np.ndarray]] = {}
    names = {w.tensor.name for w in packed}
    for w in weights:
        if w.tensor.name in names:
            parts = _packed_parts(w)
        else:
            parts = [(w.tensor.name, np.dtype(dtype), w.tensor.shape, w.values)]
        tensors += [part[:3] for part in parts]
        makers |= {part[0]: part[3] for part in parts}
    d = config_to_hf(config) | {
        "torch_dtype": dtype,
        "dtype": dtype,
        "quantization_config": _quantization_config(weights, packed),
    }
    write_model_directory(
        directory,
        d,
        lambda part: write_weights(part, tensors, lambda n: makers[n](), max_shard_bytes),
        tokenizer,
        card,
    )


def _is_linear(w: Weight) -> bool:
    return w.tensor.path[-1] == "kernel"


def _packed_parts(
    w: Weight,
) -> list[tuple[str, np.dtype, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Return name, type, shape and maker of the tensors that one packed linear layer becomes."""
    rows, columns = w.tensor.shape
    bits = w.bits or 0
    int32, each = np.dtype("<i4"), 32 // bits
    parts = [
        (
            f"{w.module}.weight_packed",
            int32,
            (rows, -(-columns // each)),
            lambda: pack_words(w.unsigned(), bits).view(int32),
        ),
        (f"{w.module}.weight_scale", np.dtype("<f2"), (rows, w.groups), w.scales),
        (
            f"{w.module}.weight_shape",
            np.dtype("<i8"),
            (2,),
            lambda: np.array([rows, columns], "<i8"),
        ),
    ]
    if w.zero is not None:
        parts.append(
            (
                f"{w.module}.weight_zero_point",
                int32,
                (-(-rows // each), w.groups),
                lambda: pack_words(np.ascontiguousarray(w.zeros().T), bits).view(int32).T,
            )
        )
    return parts


def _quantization_config(weights: list[Weight], packed: list[Weight]) -> dict[str, Any]:
    """Return config.json's ``quantization_config``: a config group for each kind of layer."""
    kinds: dict[tuple[int, int, bool], list[str]] = {}
    for w in packed:
        size = -1 if w.groups == 1 else w.group_size
        kinds.setdefault((w.bits or 0, size, w.zero is None), []).append(w.module)
    groups = {}
    for i, ((bits, size, symmetric), modules) in enumerate(kinds.items()):
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else _patterns(modules),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if size == -1 else "group",
                "group_size": None if size == -1 else size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    chosen = {w.module for w in packed}
    left = [w.module for w in weights if _is_linear(w) and w.module not in chosen]
    if "lm_head" not in chosen:
        left.append("lm_head")  # a tied head is a linear layer to every reader
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _patterns(left),
        "kv_cache_scheme": None,
    }


def _patterns(modules: list[str]) -> list[str]:
    """Return targets that match just these modules, all layers of a projection by one regex."""
    projections = {re.sub(r"layers\.\d+\.", "layers.*.", m): None for m in modules}
    return [
        "re:" + re.escape(p).replace(r"\*", r"\d+") + "$" if "*" in p else p for p in projections
    ]
