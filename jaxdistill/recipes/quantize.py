"""KD-QAT: quantize a model to 4 bits and repair it by distillation from itself, with ov-freeze.

``distill`` with the model as its own teacher: a copy is post-training-quantized; what ov-freeze
says is snapped onto its lattice and frozen; the rest trains to match the float model; integers and
scales are stored, and evaluated beside teacher and PTQ on held-out text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxdistill.errors import UserError
from jaxdistill.recipes.distill import distill
from jaxdistill.recipes.options import Distill, Quantize, identity
from jaxdistill.recipes.run_report import Results


def quantize(
    o: Quantize, console: Console | None = None, *, known: Mapping[str, Any] | None = None
) -> Results:
    """Run the job; see ``recipes.distill.distill``.

    Returns:
        ``{"teacher", "ptq", "student"}``, each with its evaluation and ``bytes``.

    Raises:
        UserError: any input is wrong; nothing is written then.
    """
    if not Path(o.model).exists() and "," in o.model:
        raise UserError(
            f"--model {o.model} given; accepted: one model; several may teach in `jaxdistill "
            "distill`"
        )
    shared = {f.name: getattr(o, f.name) for f in dataclasses.fields(o) if f.name != "model"}
    return distill(Distill(teacher=o.model, **shared), console, known=known, said=identity(o))
