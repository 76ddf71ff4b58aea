"""Export a run's student for other programs, from its stored integers and scales."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from jaxdistill.errors import UserError
from jaxdistill.export.compressed_tensors import write_compressed_tensors
from jaxdistill.export.formats import Format, check_format
from jaxdistill.export.gguf import write_gguf
from jaxdistill.export.mlx import write_mlx
from jaxdistill.export.model_card import description, model_card, read_run
from jaxdistill.models.hf import save_hf
from jaxdistill.models.hub import load_config, load_model
from jaxdistill.models.quantized import load_policy
from jaxdistill.quant.policy import dequantize_params
from jaxdistill.recipes.run_report import finished_student


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Export a run's student: for llama.cpp, transformers and vLLM, MLX, or as a float model."""

    run: Path
    """Run directory of a finished `jaxdistill quantize`."""
    format: Format
    """gguf: llama.cpp, Q4_0 and Q8_0 blocks of the stored integers. compressed-tensors:
    transformers and vLLM, packed integers. mlx: mlx-lm, packed integers. hf: their values in float,
    for any program."""
    out: Path
    """File (gguf) or directory to write; a directory carries tokenizer and model card too."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of a directory's float tensors: float32 is exact; float16 is smaller, and rounds."""
    float_head: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Leave an untied head unpacked in compressed-tensors, for programs that cannot read it so."""


def export(o: Export) -> Path:
    """Write the export and return its path.

    Raises:
        UserError: the run has no finished student, the format cannot hold it, or ``out`` holds
            something else; nothing is written then.
    """
    if o.format == "gguf" and o.dtype != "float32":
        raise UserError(
            f"--dtype {o.dtype} given; accepted with --format gguf: float32, the type that its "
            "float tensors have"
        )
    if o.format != "compressed-tensors" and o.float_head:
        raise UserError(
            f"--float-head given with --format {o.format}; accepted: with compressed-tensors"
        )
    student = finished_student(o.run)
    config = load_config(student)
    check_format(o.format, config, load_policy(student), pack_head=not o.float_head)
    model = load_model(student)
    config, params, tokenizer = model.config, model.params, model.text_tokenizer()
    facts = read_run(o.run)
    if o.format == "gguf":
        said = description(facts, config, params)
        name, base = facts.name, facts.base_model
        write_gguf(o.out, config, params, tokenizer, name=name, description=said, base_model=base)
        return o.out
    at = f"./{o.out.resolve().name}"
    card = model_card(
        facts, config, params, o.format, dtype=o.dtype, float_head=o.float_head, at=at
    )
    if o.format == "compressed-tensors":
        head = not o.float_head
        write_compressed_tensors(
            o.out, config, params, tokenizer, dtype=o.dtype, pack_head=head, card=card
        )
    elif o.format == "mlx":
        write_mlx(o.out, config, params, tokenizer, dtype=o.dtype, card=card)
    else:
        values = jax.jit(dequantize_params)(params)
        save_hf(o.out, config, values, tokenizer, dtype=o.dtype, card=card)
    return o.out
