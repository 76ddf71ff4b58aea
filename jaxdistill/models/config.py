"""The shape of a Llama-family decoder, read from and written to the HF ``config.json``."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable
from typing import Any

from jaxdistill.errors import UserError

MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_whole(name: str, value: Any, least: int = 1, most: int = MAX_SIZE) -> None:
    """Raise ``UserError`` unless the value is a whole number from ``least`` to ``most``."""
    if not _is(numbers.Integral, value) or not least <= value <= most:
        raise UserError(
            f"the model's {name} is {value!r}; accepted: a whole number from {least} to {most}; "
            "correct its config.json, or fetch it again"
        )


def _check_ids(*ids: Any) -> None:
    for token in ids:
        if token is not None:
            _check_whole("bos_token_id or eos_token_id", token, least=-1)


def _real(name: str, value: Any, least: float = 0.0) -> float:
    """Return a number; raise ``UserError`` unless it is finite and above ``least``."""
    if not _is(numbers.Real, value) or not least < value <= 1e30:
        raise UserError(
            f"the model's {name} is {value!r}; accepted: a number above {least:g}; correct its "
            "config.json, or fetch it again"
        )
    return float(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Hold how rotary frequencies are stretched for a longer context.

    ``linear`` divides every frequency by ``factor``. ``llama3`` divides the low ones by ``factor``,
    keeps the high ones, and blends between (Llama 3.1 model card; ``transformers``' ``llama3``).
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise UserError(
                f"rope scaling {self.rope_type!r} is not supported; accepted: default, linear, "
                "llama3; give another model"
            )
        if self.rope_type == "llama3" and None in (
            self.low_freq_factor,
            self.high_freq_factor,
            self.original_max_position_embeddings,
        ):
            raise UserError(
                "rope scaling 'llama3' needs low_freq_factor, high_freq_factor and "
                "original_max_position_embeddings; add them to config.json"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            if getattr(self, name) is not None:
                _real(f"rope scaling {name}", getattr(self, name))
        if self.original_max_position_embeddings is not None:
            _check_whole("original_max_position_embeddings", self.original_max_position_embeddings)
        if self.low_freq_factor is not None and self.low_freq_factor == self.high_freq_factor:
            raise UserError(
                f"rope scaling has low_freq_factor and high_freq_factor {self.low_freq_factor}; "
                "accepted: a higher high_freq_factor; correct config.json"
            )


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Describe one decoder of the Llama family.

    Attributes:
        qkv_bias: biases on the query, key and value projections (Qwen2; Llama ``attention_bias``).
        o_bias: bias on the output projection (Llama ``attention_bias``).
        qk_norm: RMS norm over each head of queries and keys before RoPE (Qwen3).
        sliding_window: number of positions a query may look back on, itself included; None for all.

    Raises:
        UserError: the family is not known, a size is no whole number from 1 to ``MAX_SIZE`` (layers
            to ``MAX_LAYERS``), a rate is not finite, or the heads do not fit together.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise UserError(
                f"model type {self.model_type!r} is not supported; accepted: "
                f"{', '.join(MODEL_TYPES)}; give a model of one of these families"
            )
        _check_whole("num_layers", self.num_layers, most=MAX_LAYERS)
        for name in _SIZES:
            _check_whole(name, getattr(self, name))
        if self.sliding_window is not None:
            _check_whole("sliding_window", self.sliding_window)
        eos = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        _check_ids(self.bos_token_id, *eos)
        _real("rope_theta", self.rope_theta)
        _real("rms_norm_eps", self.rms_norm_eps, least=-1e-30)
        if self.head_dim % 2:
            raise UserError(
                f"the model's head_dim is {self.head_dim}; accepted: an even number, for rotary "
                "embeddings; correct its config.json"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} attention heads do not divide into {self.num_kv_heads} "
                "key/value heads; fix num_key_value_heads in config.json"
            )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return every token id that ends a text."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id


def with_stop_ids(config: ModelConfig, ids: Iterable[int]) -> ModelConfig:
    """Add ids to those that end a text, after the config's own."""
    ids = tuple(ids)
    if set(ids) <= set(config.eos_token_ids):
        return config
    union = tuple(dict.fromkeys((*config.eos_token_ids, *ids)))
    return dataclasses.replace(config, eos_token_id=union if union[1:] else union[0])


def _rope(d: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return (theta, scaling) from either spelling: ``rope_parameters``, or ``rope_scaling``."""
    rope = d.get("rope_scaling") or d.get("rope_parameters") or {}  # HF's precedence
    if not isinstance(rope, dict):
        raise UserError(f"rope scaling {rope!r} given; accepted: an object; correct config.json")
    theta = _real("rope_theta", rope.get("rope_theta") or d.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    part = rope.get("partial_rotary_factor") or d.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        raise UserError(
            f"partial_rotary_factor {part} is not supported; accepted: 1 (whole heads rotated)"
        )
    if kind == "default":
        return theta, None
    low, high, original = (
        rope.get(k)
        for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if original is not None:
        _check_whole("original_max_position_embeddings", original)
    if not isinstance(kind, str):
        raise UserError(f"rope type {kind!r} given; accepted: a name; correct config.json")
    return theta, RopeScaling(
        rope_type=kind,
        factor=_real("rope scaling factor", rope.get("factor", 1.0)),
        low_freq_factor=None if low is None else _real("low_freq_factor", low),
        high_freq_factor=None if high is None else _real("high_freq_factor", high),
        original_max_position_embeddings=original,
    )


def _window(d: dict[str, Any], kind: str, layers: int) -> int | None:
    """Return the sliding window that all layers have, or None; ``transformers``' defaults."""
    if kind == "llama":
        return None
    window = d.get("sliding_window", 4096)
    if kind == "mistral" or window is None:
        return window
    if not d.get("use_sliding_window", False):
        return None
    kinds = d.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise UserError(f"layer_types {kinds!r} given; accepted: a list; correct config.json")
    first = d.get("max_window_layers", 28)
    _check_whole("max_window_layers", first, least=0)
    full = kinds.count("full_attention") if kinds else min(first, layers)
    if 0 < full < layers:
        raise UserError(
            f"a sliding window on {layers - full} of {layers} layers is not supported; accepted: "
            "on all or none; set use_sliding_window to false in config.json for full attention"
        )
    return window if full == 0 else None


def config_from_hf(d: dict[str, Any]) -> ModelConfig:
    """Read an HF ``config.json`` (as a dict); raise ``UserError`` naming what is not supported."""
    kind = d.get("model_type", "")
    if kind not in MODEL_TYPES:
        raise UserError(
            f"model type {kind!r} is not supported; accepted: {', '.join(MODEL_TYPES)}; give a "
            "model of one of these families"
        )
    try:
        vocab, width, heads = d["vocab_size"], d["hidden_size"], d["num_attention_heads"]
        ffn, layers = d["intermediate_size"], d["num_hidden_layers"]
    except KeyError as e:
        raise UserError(f"config.json lacks {e}; give the model's full HF config.json") from None
    kv_heads = d.get("num_key_value_heads") or heads
    positions = d.get("max_position_embeddings", 2048)
    _check_whole("num_hidden_layers", layers, most=MAX_LAYERS)
    for name, value in (
        ("vocab_size", vocab),
        ("hidden_size", width),
        ("intermediate_size", ffn),
        ("num_attention_heads", heads),
        ("num_key_value_heads", kv_heads),
        ("max_position_embeddings", positions),
    ):
        _check_whole(name, value)
    if d.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"activation {d['hidden_act']!r} is not supported; accepted: silu")
    theta, scaling = _rope(d)
    # Only these two families read the key; Qwen2 always has biases on queries, keys and values.
    attention_bias = kind in ("llama", "qwen3") and bool(d.get("attention_bias", False))
    head_dim = d.get("head_dim") or (128 if kind == "qwen3" else width // heads)
    _check_whole("head_dim", head_dim)
    if (window := _window(d, kind, layers)) is not None:
        _check_whole("sliding_window", window)
    bos, eos = d.get("bos_token_id"), d.get("eos_token_id")
    _check_ids(bos, *(eos if isinstance(eos, list) else [eos]))
    return ModelConfig(
        model_type=kind,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ffn,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_real("rms_norm_eps", d.get("rms_norm_eps", 1e-6), least=-1e-30),
        tie_embeddings=bool(d.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or attention_bias,
        o_bias=kind != "qwen2" and attention_bias,
        mlp_bias=kind == "llama" and bool(d.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        sliding_window=window,
        bos_token_id=bos,
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
    )


def _check_family(c: ModelConfig) -> None:
    """Raise ``UserError`` if a config.json of this model type cannot say what the config says."""
    biases = c.qkv_bias, c.o_bias, c.mlp_bias
    both = c.qkv_bias == c.o_bias
    fits = {
        "llama": both and not c.qk_norm and c.sliding_window is None,
        "mistral": not any(biases) and not c.qk_norm,
        "qwen2": biases == (True, False, False) and not c.qk_norm,
        "qwen3": both and not c.mlp_bias and c.qk_norm,
    }
    if not fits[c.model_type]:
        raise UserError(
            f"no {c.model_type} config.json has qkv_bias={c.qkv_bias}, o_bias={c.o_bias}, "
            f"mlp_bias={c.mlp_bias}, qk_norm={c.qk_norm} and sliding_window={c.sliding_window} "
            "together; give another model_type"
        )


def config_to_hf(c: ModelConfig) -> dict[str, Any]:
    """Write the HF ``config.json`` (as a dict) that ``transformers`` opens, old and new spelling.

    Raises:
        UserError: the model type's family has no such model, as Mistral with biases.
    """
    _check_family(c)
    rope: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_type": "default"}
    if c.rope_scaling is not None:
        rope |= {k: v for k, v in dataclasses.asdict(c.rope_scaling).items() if v is not None}
    d: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[c.model_type]],
        "model_type": c.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": c.rope_theta,
        "rope_parameters": rope,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": list(c.eos_token_id)
        if isinstance(c.eos_token_id, tuple)
        else c.eos_token_id,
        "torch_dtype": "float32",
    }
    if c.rope_scaling is not None:
        d["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if c.model_type in ("llama", "qwen3"):
        d["attention_bias"] = c.qkv_bias
    if c.model_type == "llama":
        d["mlp_bias"] = c.mlp_bias
    if c.model_type in ("qwen2", "qwen3"):
        d |= {"use_sliding_window": c.sliding_window is not None, "max_window_layers": 0}
    if c.model_type != "llama":
        d["sliding_window"] = c.sliding_window
    return d
