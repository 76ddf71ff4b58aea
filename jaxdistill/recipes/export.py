"""Export a run's student for other programs, from its stored integers and scales."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax

from jaxdistill.export.gguf import write_gguf
from jaxdistill.models.hf import save_hf
from jaxdistill.models.quantized import load_quantized
from jaxdistill.quant.policy import dequantize_params
from jaxdistill.recipes.quantize import finished_student


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Export a run's student: GGUF for llama.cpp, or a float HF directory."""

    run: Path
    """Run directory of a finished `jaxdistill quantize`."""
    format: Literal["gguf", "hf"]
    """gguf: Q4_0 and Q8_0 blocks of the stored integers. hf: their values, float32 safetensors."""
    out: Path
    """File (gguf) or directory (hf) to write."""


def export(o: Export) -> Path:
    """Write the export and return its path."""
    config, params, tokenizer = load_quantized(finished_student(o.run))
    assert tokenizer is not None  # no run is made without one
    if o.format == "gguf":
        write_gguf(o.out, config, params, tokenizer, name=o.run.name)
    else:
        save_hf(o.out, config, jax.jit(dequantize_params)(params), tokenizer)
    return o.out
