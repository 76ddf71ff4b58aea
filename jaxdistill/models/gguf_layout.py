"""What a GGUF file and the params tree have in common: names, shapes, row order, rotary factors.

Shared by the reader (``models/gguf.py``) and the writer (``export/gguf.py``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from jaxdistill.errors import UserError
from jaxdistill.models.config import MAX_SIZE, ModelConfig, RopeScaling
from jaxdistill.models.gguf_file import AGAIN, GGUFFile

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # a Mistral file says "llama"
PERMUTED = ("llama",)  # architectures whose query and key rows are reordered

# Parameter path under `layers` -> tensor name after `blk.N.`.
KERNELS = {
    "self_attn/q_proj": "attn_q",
    "self_attn/k_proj": "attn_k",
    "self_attn/v_proj": "attn_v",
    "self_attn/o_proj": "attn_output",
    "mlp/gate_proj": "ffn_gate",
    "mlp/up_proj": "ffn_up",
    "mlp/down_proj": "ffn_down",
}
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn/q_norm": "attn_q_norm",
    "self_attn/k_norm": "attn_k_norm",
}


def kernel_shape(config: ModelConfig, path: str) -> tuple[int, int]:
    """Return (in, out) of a layer's projection, e.g. ``self_attn/q_proj``."""
    width, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn/q_proj": (width, q),
        "self_attn/k_proj": (width, kv),
        "self_attn/v_proj": (width, kv),
        "self_attn/o_proj": (q, width),
        "mlp/gate_proj": (width, ffn),
        "mlp/up_proj": (width, ffn),
        "mlp/down_proj": (ffn, width),
    }[path]


def has_bias(config: ModelConfig, path: str) -> bool:
    """Tell whether a layer's projection carries a bias."""
    if path.startswith("mlp/"):
        return config.mlp_bias
    return config.o_bias if path == "self_attn/o_proj" else config.qkv_bias


def norm_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the width of each norm of a layer, by parameter path."""
    sizes = {"input_layernorm": config.hidden_size, "post_attention_layernorm": config.hidden_size}
    if config.qk_norm:
        sizes |= {"self_attn/q_norm": config.head_dim, "self_attn/k_norm": config.head_dim}
    return sizes


def permuted_heads(config: ModelConfig, architecture: str, path: str) -> int | None:
    """Return how many heads' rows the file reorders in a projection, or None for none."""
    if architecture not in PERMUTED:
        return None
    return {"self_attn/q_proj": config.num_heads, "self_attn/k_proj": config.num_kv_heads}.get(path)


def permute_rows(x: Shaped[np.ndarray, "out *rest"], heads: int) -> Shaped[np.ndarray, "out *rest"]:
    """Reorder output rows from HF's half-split rotary layout to GGUF's interleaved one."""
    halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def unpermute_rows(
    x: Shaped[np.ndarray, "out *rest"], heads: int
) -> Shaped[np.ndarray, "out *rest"]:
    """Undo ``permute_rows``."""
    pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def llama3_factors(head_dim: int, theta: float, scaling: RopeScaling) -> Float[np.ndarray, " half"]:
    """Return what divides each rotary frequency under ``llama3`` scaling, in float32.

    With wavelength ``l = 2*pi*theta**(2i/head_dim)`` and original context ``n``: 1 where ``l <
    n/high``, ``factor`` where ``l > n/low``, and ``1/((1-s)/factor + s)`` with ``s = (n/l -
    low)/(high - low)`` between (llama.cpp stores exactly this as ``rope_freqs.weight``).
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    assert low is not None and high is not None and context is not None  # held by RopeScaling
    powers = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    wavelength = np.float32(2 * math.pi) * np.float32(theta) ** powers
    s = np.clip((context / wavelength - low) / (high - low), 0, 1).astype(np.float32)
    factors = 1 / ((1 - s) / np.float32(scaling.factor) + s)
    return factors.astype(np.float32)


def recover_llama3(
    factors: Float[np.ndarray, " half"], head_dim: int, theta: float
) -> RopeScaling | None:
    """Find the ``llama3`` scaling whose factors these are; None when all of them are one.

    The factors fix ``factor`` (the largest) and ``s``, which is linear in the inverse wavelength;
    of low, high and the context only their two ratios show, so low is 1, as in every released
    model, or the next integer that makes the context a whole number.

    Raises:
        UserError: if no such scaling gives these factors.
    """
    if np.all(factors == 1):
        return None
    factor = decimal(float(factors.max()))

    def fits(low: float, high: float, context: int) -> RopeScaling | None:
        scaling = RopeScaling(
            rope_type="llama3",
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position_embeddings=context,
        )
        with np.errstate(over="ignore"):
            ours = llama3_factors(head_dim, theta, scaling)
        return scaling if np.allclose(ours, factors, rtol=2e-5, atol=0) else None

    if np.all(np.isfinite(factors)) and np.all(factors >= 1):
        if (released := fits(1.0, 4.0, 8192)) is not None:
            return released
        slope, offset = _line_through(factors, factor, head_dim, theta)
        if 0 < slope < MAX_SIZE and -1e6 < offset < 0:
            ratio = round(1 - 1 / offset, 2)
            for low in range(1, 9):
                context = round(min(slope * low * (ratio - 1), MAX_SIZE))
                if ratio > 1 and context and (found := fits(float(low), low * ratio, context)):
                    return found
    raise UserError(
        "the llama3 rope scaling cannot be recovered from the GGUF file's rope_freqs.weight; give "
        "the model's HF directory instead"
    )


def _line_through(
    factors: Float[np.ndarray, " half"], factor: float, head_dim: int, theta: float
) -> tuple[float, float]:
    """Return slope and offset of ``s`` over the inverse wavelength, 0 where no line is there."""
    between = (factors > 1.0001) & (factors < 0.9999 * factor)
    inverse = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    if between.sum() < 2 or inverse[between].min() < 1e-30:
        return 0.0, 0.0
    s = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(inverse[between], s[between], 1)
    return float(slope), float(offset)


def decimal(x: float) -> float:
    """Return the shortest decimal that a stored float32 stands for (1e-05, not 9.9999997e-06)."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(x)))


def gguf_field(
    file: GGUFFile, key: str, accept: type | tuple[type, ...], default: Any = None
) -> Any:
    """Return one metadata value as a Python object, or ``default`` when the file lacks it.

    Raises:
        UserError: if the value cannot be decoded or is not of the accepted type.
    """
    try:
        value = file.value(key)
        if value is not None and not isinstance(value, accept):
            raise TypeError(f"type {type(value).__name__}")
    except (ValueError, TypeError) as e:
        raise UserError(f"GGUF metadata {key!r} is damaged ({one_line(e)}); {AGAIN}") from e
    return default if value is None else value


def one_line(error: BaseException) -> str:
    """Return an exception's message as one short line, or its type's name when it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
