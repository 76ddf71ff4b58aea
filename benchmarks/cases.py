"""The cases that ``python -m benchmarks`` knows."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.harness import Case
from benchmarks.smollm2 import SMOLLM2
from benchmarks.training.shapes import SHAPES
from jaxdistill.evals.cost import training_flops
from jaxdistill.kd.freeze import OV_PATTERN

_OURS, _TORCH = "benchmarks.training.ours:step", "benchmarks.training.pytorch:step"


def training(name: str, **settings: Any) -> Case:
    """Return a training step beside PyTorch's, eager and compiled, with our allocator and without.

    All of ours have ``keep_pages``, as the command line has.
    """
    ours: dict[str, dict[str, Any]] = {"jaxdistill": {}, "jaxdistill, unrolled": {"unroll": 0}}
    if settings["work"] == "kd_qat":
        ours["jaxdistill, unrolled, ov-freeze"] = {"unroll": 0, "freeze": True}
        ours["jaxdistill, unrolled, KD in float"] = {"unroll": 0, "work": "kd"}
    peers: dict[str, dict[str, Any]] = {
        "torch eager": {},
        "torch.compile": {"compiled": True},
        "torch eager, pages kept": {"keep": True},
        "torch.compile, pages kept": {"compiled": True, "keep": True},
    }
    own = ours | peers
    return Case(
        name=name,
        ours=dict.fromkeys(ours, _OURS),
        peers=dict.fromkeys(peers, _TORCH),
        settings=settings,
        own=own,
        tokens=settings["rows"] * settings["seq_len"],
        flops={variant: flops(**settings | chosen) for variant, chosen in own.items()},
    )


def flops(
    *, shape: str, work: str, rows: int, seq_len: int, freeze: bool = False, **_: Any
) -> float:
    """Return a step's model FLOPs, less the gradients of frozen kernels, which are not made."""
    config = dataclasses.replace(SMOLLM2, **SHAPES[shape])
    teacher = None if work == "ce" else config
    frozen = OV_PATTERN if freeze else None
    return rows * seq_len * training_flops(config, seq_len, teacher=teacher, frozen=frozen)["model"]


def cases(quick: bool) -> dict[str, Case]:
    """Return the cases by name, of the size for a quick look or the full one."""
    size = (
        {"shape": "tiny", "rows": 4, "seq_len": 256}
        if quick
        else {"shape": "smollm2", "rows": 4, "seq_len": 256}
    )
    made = [
        training("ce", work="ce", **size),
        training("kd", work="kd", **size),
        training("kd-bf16", work="kd", dtype="bfloat16", **size),
        training("kd-qat-channel", work="kd_qat", **size),
        training("kd-qat-group32", work="kd_qat", group=32, **size),
    ]
    return {case.name: case for case in made}
