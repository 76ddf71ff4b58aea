"""The signal analysis inside a run: what to freeze before it, and looks at it while it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console

from jaxdistill.kd.probe import make_probe
from jaxdistill.kd.recommend import recommend_freeze
from jaxdistill.kd.signal import by_projection, make_signal
from jaxdistill.kd.signal_sums import PROJECTIONS
from jaxdistill.mesh import place_batch
from jaxdistill.models.decoder import Params
from jaxdistill.models.hub import Model
from jaxdistill.quant.measure import flip_rate
from jaxdistill.quant.policy import (
    Policy,
    fake_quant_activations,
    fake_quant_params,
    quantize_params,
)
from jaxdistill.recipes.options import Training
from jaxdistill.train.loop import Look
from jaxdistill.train.run_directory import append_row

_TOKENS = 512  # of a look
_ANALYSED = 4096  # before a run
# A look costs a step and a teacher's forward pass on its tokens, about 1.4 steps' time for as many
# (benchmarks/signal_cost.py); looks may take this share of a run.
_STEPS_A_LOOK, _SHARE = 1.4, 0.04


def recommended(
    teacher: Model, student: Params, policy: Policy, data: Any, console: Console
) -> list[str]:
    """Return the patterns that the analysis of some training batches recommends to freeze."""
    measure = make_signal(
        teacher.config,
        transform=fake_quant_params(policy),
        activation=fake_quant_activations(policy.activations),
        remat="full",
    )
    number = max(1, _ANALYSED // data[0]["tokens"].size)
    with console.status("analysing what to freeze"):
        advice = recommend_freeze(
            measure(teacher.params, student, [data[i] for i in range(number)])
        )
    for reason in advice.reasons:
        console.print(f"freeze: {reason}", highlight=False)
    return list(advice.patterns)


def steps_between(o: Training) -> int:
    """Return the steps between looks that the options ask for; 0 for none."""
    if o.signal_every:
        return max(0, o.signal_every)
    share = min(1.0, _TOKENS / (o.batch_size * o.seq_len))
    return max(-(-o.steps // 8), round(_STEPS_A_LOOK * share / _SHARE))


def signal_looks(
    o: Training, teacher: Model, policy: Policy, stored: Params | None, held: Any, run: Path
) -> list[Look]:
    """Return the looks at gradients, SQNR, clipping and flips that the training loop shall take.

    Args:
        o: the options.
        teacher: the float model.
        policy: the student's.
        stored: the student before training; the first look counts flips from there. None in a
            resumed run, whose first look has no flips: it does not know the last look's integers.
        held: held-out batches; the first rows of the first one are looked at.
        run: ``signal.jsonl`` is written here, ``{"step", quantity: [L][7]}`` a line.
    """
    every = steps_between(o)
    if not every or every > o.steps:
        return []
    probe = make_probe(
        teacher.config,
        policy,
        transform=fake_quant_params(policy),
        activation=fake_quant_activations(policy.activations),
        dtype=jnp.dtype(o.dtype),
        remat=o.remat,
        chunk=o.chunk,
    )
    rows = max(1, min(o.batch_size, _TOKENS // o.seq_len))
    batch = {name: value[:rows] for name, value in held[0].items()}
    before = stored

    def look(step: int, params: Params) -> dict[str, float]:
        nonlocal before
        began = time.perf_counter()
        flat, arrays = probe(teacher.params, params, place_batch(batch))
        now = quantize_params(params, policy)
        if before is not None:
            flips = by_projection(flip_rate(before, now), teacher.config.num_layers)
            means = flips.mean(axis=0)
            flat |= {f"signal/{p}/flips": float(means[i]) for i, p in enumerate(PROJECTIONS)}
            arrays["flips"] = flips.tolist()
        before = now
        append_row(run / "signal.jsonl", {"step": step, "projections": PROJECTIONS} | arrays)
        return flat | {"signal/seconds": time.perf_counter() - began}

    return [Look(every, look, at_end=False)]
