"""The cases that ``python -m benchmarks`` knows."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.harness import Case
from benchmarks.smollm2 import SMOLLM2
from benchmarks.training.shapes import SHAPES
from jaxdistill.evals.cost import forward_flops, training_flops
from jaxdistill.paths import OV_PATTERN

_GENERATION = "benchmarks.generation"
_OURS, _TORCH = "benchmarks.training.ours:step", "benchmarks.training.pytorch:step"


def training(name: str, **settings: Any) -> Case:
    """Return a training step beside PyTorch's, eager and compiled, with our allocator and without.

    All of ours have ``keep_pages``, as the command line has; ``remat`` is the minimal one.
    """
    ours: dict[str, dict[str, Any]] = {
        "jaxdistill": {},
        "jaxdistill, unrolled": {"unroll": 0},
        "jaxdistill, remat": {"remat": "minimal"},
    }
    if settings["shape"] == "1b":  # of what fits beside a teacher, and of what an accelerator has
        ours = {
            "jaxdistill, remat": {"remat": "minimal", "chunk": 2048},
            "jaxdistill, remat, cudnn": {"remat": "minimal", "chunk": 2048, "attention": "cudnn"},
            "jaxdistill, full remat, cudnn": {"remat": "full", "chunk": 2048, "attention": "cudnn"},
        }
    elif settings["work"] == "kd_qat":
        ours["jaxdistill, unrolled, ov-freeze"] = {"unroll": 0, "freeze": True}
        ours["jaxdistill, unrolled, KD in float"] = {"unroll": 0, "work": "kd"}
        ours["jaxdistill, remat, ov-freeze"] = {"remat": "minimal", "freeze": True}
    peers: dict[str, dict[str, Any]] = {
        "torch eager": {},
        "torch.compile": {"compiled": True},
        "torch eager, pages kept": {"keep": True},
        "torch.compile, pages kept": {"compiled": True, "keep": True},
    }
    own, counted = ours | peers, settings["work"] != "on_policy"  # it also samples
    return Case(
        name=name,
        ours=dict.fromkeys(ours, _OURS),
        peers=dict.fromkeys(peers, _TORCH),
        settings=settings,
        own=own,
        tokens=settings["rows"] * settings["seq_len"],
        flops={v: flops(**settings | chosen) for v, chosen in own.items()} if counted else {},
    )


def decoding(name: str, **settings: Any) -> Case:
    """Return greedy generation by every form of the weights, beside transformers and llama.cpp."""
    ours = {f"jaxdistill, {w}": {"weights": w} for w in ("float", "bfloat16", "int8", "packed")}
    ours["jaxdistill, packed, groups of 32"] = {"weights": "packed", "group": 32}
    peers = {f"transformers, {w}": {"weights": w} for w in ("float", "bfloat16")}
    where = dict.fromkeys(peers, f"{_GENERATION}.pytorch:decode")
    if settings["rows"] == 1:
        peers["llama.cpp, Q4_0"] = {"weights": "packed"}
        where["llama.cpp, Q4_0"] = f"{_GENERATION}.pytorch:llama_cpp"
    return Case(
        name=name,
        ours=dict.fromkeys(ours, f"{_GENERATION}.ours:decode"),
        peers=where,
        settings=settings,
        own=ours | peers,
        tokens=settings["rows"] * settings["new"],
    )


def scoring(name: str, **settings: Any) -> Case:
    """Return the evaluation of a batch beside transformers'."""
    variants = {"jaxdistill": "ours", "transformers": "pytorch"}
    where = {v: f"{_GENERATION}.{module}:score" for v, module in variants.items()}
    config = dataclasses.replace(SMOLLM2, **SHAPES[settings["shape"]])
    tokens = settings["rows"] * settings["seq_len"]
    forward = tokens * forward_flops(config, settings["seq_len"])
    return Case(
        name=name,
        ours={"jaxdistill": where["jaxdistill"]},
        peers={"transformers": where["transformers"]},
        settings=settings,
        tokens=tokens,
        flops=dict.fromkeys(variants, forward),
    )


def flops(
    *, shape: str, work: str, rows: int, seq_len: int, freeze: bool = False, **_: Any
) -> float:
    """Return a step's model FLOPs, less the gradients of frozen kernels, which are not made."""
    config = dataclasses.replace(SMOLLM2, **SHAPES[shape])
    teacher = None if work in ("ce", "cache") else config
    frozen = OV_PATTERN if freeze else None
    return rows * seq_len * training_flops(config, seq_len, teacher=teacher, frozen=frozen)["model"]


SIZES: dict[str, dict[str, Any]] = {
    "quick": {"shape": "tiny", "rows": 4, "seq_len": 256},
    "full": {"shape": "smollm2", "rows": 4, "seq_len": 256},
    "large": {"shape": "1b", "rows": 8, "seq_len": 2048},
}


def cases(name: str) -> dict[str, Case]:
    """Return the cases of a size by name; the large ones want an accelerator of 80 GB."""
    size = SIZES[name]
    if name == "large":
        half = size | {"dtype": "bfloat16"}
        made = [
            training("kd-bf16", work="kd", **half),
            training("kd-qat-channel", work="kd_qat", **half),
            training("kd-qat-group32", work="kd_qat", group=32, **half),
            decoding("decode", shape=size["shape"], rows=1, prompt=32, new=64),
            decoding("prefill", shape=size["shape"], rows=1, prompt=2048, new=1),
        ]
        return {case.name: case for case in made}
    made = [
        training("ce", work="ce", **size),
        training("kd", work="kd", **size),
        training("kd-bf16", work="kd", dtype="bfloat16", **size),
        training("kd-qat-channel", work="kd_qat", **size),
        training("kd-qat-group32", work="kd_qat", group=32, **size),
        training("kd-cache", work="cache", **size),
        training("on-policy", work="on_policy", **size),
        scoring("evaluation", **size),
        decoding("decode", shape=size["shape"], rows=1, prompt=32, new=64),
        decoding("decode-8-rows", shape=size["shape"], rows=8, prompt=32, new=64),
        decoding("prefill", shape=size["shape"], rows=1, prompt=512, new=1),
    ]
    return {case.name: case for case in made}
