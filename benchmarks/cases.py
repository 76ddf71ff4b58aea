"""The cases that ``python -m benchmarks`` knows."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Case
from benchmarks.training.shapes import CONFIGS

_OURS, _TORCH = "benchmarks.training.ours:step", "benchmarks.training.pytorch:step"


def training(name: str, **settings: Any) -> Case:
    """Return a training step beside PyTorch's, eager and compiled."""
    own: dict[str, dict[str, Any]] = {"torch.compile": {"compiled": True}}
    ours = {"jaxdistill": _OURS, "jaxdistill, unrolled": _OURS}
    config = CONFIGS[settings["shape"]]
    own["jaxdistill, unrolled"] = {"unroll": config.num_layers}
    if settings["work"] == "kd_qat":
        ours["jaxdistill, ov-freeze"] = _OURS
        own["jaxdistill, ov-freeze"] = {"freeze": True}
    tokens = settings["rows"] * settings["seq_len"]
    return Case(
        name=name,
        ours=ours,
        peers={"torch eager": _TORCH, "torch.compile": _TORCH},
        settings=settings,
        own=own,
        tokens=tokens,
    )


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
