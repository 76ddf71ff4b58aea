"""The training loop: steps, guarded metrics, progress, evaluation and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jaxdistill.errors import UserError
from jaxdistill.kd.objective import Metrics
from jaxdistill.mesh import place_batch
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.run_directory import RunDirectory


class Look(NamedTuple):
    """Say what is looked at every few steps: ``take(step, params) -> metrics``, logged with them.

    Attributes:
        every: steps between looks; 0 for none.
        take: the look.
        at_end: look after the last step too, whatever its number.
    """

    every: int
    take: Callable[[int, Any], Mapping[str, float | int]]
    at_end: bool = True


def check_finite(step: int, values: Mapping[str, float | int], kept: int | None) -> None:
    """Raise ``UserError`` where loss or gradient is NaN or infinite, naming what was kept."""
    if all(math.isfinite(values[name]) for name in ("loss", "grad_norm")):
        return
    last = "no checkpoint was saved yet" if kept is None else f"checkpoint {kept} is kept"
    raise UserError(
        f"loss {values['loss']}, gradient norm {values['grad_norm']} at step {step}; {last}; lower "
        "--lr or look at the data, then start again in another --out"
    )


def train(
    step: Callable[..., tuple[Any, Metrics]],
    state: Any,
    teacher_params: Any,
    data: Any,
    *,
    steps: int,
    run: RunDirectory,
    fingerprint: str,
    resume: bool = False,
    checkpoint_every: int = 0,
    keep: int = 2,
    looks: Sequence[Look] = (),
    console: Console | None = None,
    name: str = "train",
) -> Any:
    """Run ``steps`` updates and return the last state.

    A state is saved only after the step that made it had a finite loss and gradient, so the last
    checkpoint is always a good one.

    Args:
        step: the jitted ``(state, teacher_params, batch) -> (state, metrics)``; a metric is a
            number, or a pair of sum and count.
        state: the first state; donated. It has a ``step``.
        teacher_params: passed through.
        data: ``data[i]`` is the batch of step i.
        steps: updates in all, those before a resume included.
        run: where metrics and checkpoints go.
        fingerprint: of the data, kept with each checkpoint.
        resume: go on from the last checkpoint, where there is one.
        checkpoint_every: steps between checkpoints; 0 saves none.
        keep: checkpoints kept.
        looks: see ``Look``.
        console: where progress is shown.
        name: of the work, beside its progress.
    """
    with Checkpoints(run.checkpoints, keep=keep) as checkpoints, _progress(console) as progress:
        if resume and checkpoints.latest is not None:
            state = checkpoints.restore(state, fingerprint)
        first = int(state.step)
        run.rewind(first)
        task = progress.add_task(name, total=steps, completed=first, loss="", rate="")
        for i in range(first, steps):
            began = time.perf_counter()
            batch = data[i]
            state, metrics = step(state, teacher_params, place_batch(batch))
            values = {metric: _value(of) for metric, of in metrics.items()}
            seconds = time.perf_counter() - began
            check_finite(i + 1, values, checkpoints.latest)
            unit, count = ("tokens", batch["tokens"].size) if "tokens" in batch else ("steps", 1)
            speed = count / seconds
            values |= {f"{unit}_per_second": speed, "seconds": seconds}
            done = i + 1
            for every, take, at_end in looks:
                if every and (done % every == 0 or (at_end and done == steps)):
                    values |= take(done, state.params)
            run.log(done, values)
            if checkpoint_every and (done % checkpoint_every == 0 or done == steps):
                checkpoints.save(done, state, fingerprint)
            rate = f"{speed:,.{1 if speed < 100 else 0}f} {unit}/s"
            progress.update(task, advance=1, loss=f"loss {values['loss']:.4f}", rate=rate)
    return state


def _value(metric: Any) -> float:
    """Return a metric as one number: itself, or the mean of a sum and a count."""
    if isinstance(metric, tuple):
        total, count = metric
        return float(total) / (float(count) or 1.0)
    return float(metric)


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )
