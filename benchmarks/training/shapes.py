"""The models whose steps are timed."""

from __future__ import annotations

import dataclasses

from benchmarks.smollm2 import SMOLLM2
from jaxdistill.evals.cost import training_flops
from jaxdistill.kd.freeze import OV_PATTERN

CONFIGS = {
    "smollm2": SMOLLM2,
    "tiny": dataclasses.replace(
        SMOLLM2,
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=688,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
    ),
    "1b": dataclasses.replace(
        SMOLLM2,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
    ),
}


def flops(shape: str, work: str, rows: int, seq_len: int, *, freeze: bool = False) -> float:
    """Return a step's model FLOPs, less the gradients of frozen kernels, which are not made."""
    config = CONFIGS[shape]
    teacher = None if work == "ce" else config
    frozen = OV_PATTERN if freeze else None
    return rows * seq_len * training_flops(config, seq_len, teacher=teacher, frozen=frozen)["model"]
