"""What a student starts from: its teacher, cut smaller, or the teacher with LoRA adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxdistill.errors import UserError
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.cut import cut_layers, cut_width
from jaxdistill.models.decoder import Params, Transform
from jaxdistill.models.hub import Model
from jaxdistill.models.lora import LORA_FREEZE, add_lora, merge_lora
from jaxdistill.quant.policy import dequantize_params

ACCEPTED = "cut:layers=N or A/B/C,intermediate=N,heads=N,hidden=N and lora:rank=N,alpha=X"
_KEYS = {"cut": ("layers", "intermediate", "heads", "hidden"), "lora": ("rank", "alpha")}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Student:
    """Hold a student as training starts from it.

    Attributes:
        config: its shape.
        params: its float masters, adapters among them.
        transform: what makes kernels of them, before any fake quantization; None for nothing.
        freeze: patterns for ``kd.freeze`` beside the user's own.
    """

    config: ModelConfig
    params: Params
    transform: Transform | None = None
    freeze: tuple[str, ...] = ()


def student_from(model: Model, specs: Sequence[str], seed: int = 0) -> Student:
    """Make a student of a model by specs, in their order; without any it is the model itself.

    Args:
        model: the teacher, usually; a quantized one gives its float values.
        specs: ``cut:layers=10,intermediate=768``, ``cut:layers=0/4/9``, ``lora:rank=8,alpha=16``.
            Adapters come last, once.
        seed: of the adapters.

    Raises:
        UserError: a spec is none of these, or asks for what the model does not have.
    """
    config, params = model.config, jax.jit(dequantize_params)(model.params)
    student = Student(config=config, params=params)
    for spec in specs:
        kind, options = _read(spec)
        if student.transform is not None:
            raise UserError(f"{spec!r} given after lora; accepted: lora last, and once; reorder")
        config, params = student.config, student.params
        if kind == "lora":
            params = add_lora(params, **options, rng=jax.random.key(seed))
            student = Student(
                config=config, params=params, transform=merge_lora, freeze=(LORA_FREEZE,)
            )
            continue
        if "layers" in options:
            config, params = cut_layers(config, params, options.pop("layers"))
        config, params = cut_width(config, params, **options) if options else (config, params)
        student = Student(config=config, params=params)
    return student


def _read(spec: str) -> tuple[str, dict[str, Any]]:
    """Return the kind and the options of one spec."""
    kind, _, rest = spec.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")] if rest else []
    names = [name for name, _, _ in pairs]
    unknown = kind not in _KEYS or any(name not in _KEYS[kind] for name in names)
    needed = {"lora": "rank" in names, "cut": bool(names)}
    if unknown or len(set(names)) < len(names) or not needed[kind]:
        raise UserError(f"student init {spec!r} given; accepted: {ACCEPTED}; correct it")
    try:
        return kind, {name: _value(name, text) for name, _, text in pairs}
    except ValueError:
        raise UserError(
            f"student init {spec!r} holds a value that is no number; accepted: {ACCEPTED}"
        ) from None


def _value(name: str, text: str) -> Any:
    if name == "alpha":
        return float(text)
    if name == "layers" and "/" in text:
        return [int(part) for part in text.split("/")]
    return int(text)
