"""The training loop: steps, guarded metrics, progress, evaluation and checkpoints."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from jaxdistill._progress import ItemProgress
from jaxdistill.kd.objective import Metrics
from jaxdistill.mesh import place_batch
from jaxdistill.train.checkpoint import Checkpoints, recover
from jaxdistill.train.guard import Guard, Watch
from jaxdistill.train.preemption import StopRequest
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
    guard: Guard = Guard(),  # noqa: B008  frozen
    looks: Sequence[Look] = (),
    console: Console | None = None,
    name: str = "train",
) -> Any:
    """Run ``steps`` updates and return the last state.

    A state is saved only after the step that made it passed the guard, so the last checkpoint is
    always a good one.

    Args:
        step: the jitted ``(state, teacher_params, batch) -> (state, metrics)``; a metric is a
            number, or a pair of sum and count.
        state: the first state; donated. It has a ``step``.
        teacher_params: passed through.
        data: ``data[i]`` is the batch of step i, or with n batches left out of step i - n.
        steps: updates in all, those before a resume included.
        run: where metrics and checkpoints go.
        fingerprint: of the data, kept with each checkpoint.
        resume: go on from the last checkpoint, where there is one.
        checkpoint_every: steps between checkpoints; 0 saves none.
        keep: checkpoints kept.
        guard: what is done about NaN and spikes. A rollback needs a checkpoint of this call, or
            the one that it resumed from.
        looks: see ``Look``.
        console: where progress is shown.
        name: of the work, beside its progress.

    Raises:
        Stopped: SIGTERM or SIGINT came; the state of the step under way then was saved, where
            checkpoints are.
        UserError: a bad loss, or a disk that cannot be written.
    """
    console = console or Console(stderr=True)
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    last = recover(run.checkpoints, say) if resume else None
    with (
        StopRequest() as stop,
        Checkpoints(run.checkpoints, keep=keep) as checkpoints,
        ItemProgress(console, fields=("loss", "rate")) as progress,
    ):
        watch, done, oldest, before = Watch(guard, run), int(state.step), int(state.step), 0
        if last is not None:
            state = checkpoints.restore(state, fingerprint)
            done, oldest, before = last, last - 1, checkpoints.skipped(last)
        watch.take_up(done, before)
        task = progress.add_task(name, total=steps, completed=done, loss="", rate="")
        while done < steps:
            began = time.perf_counter()
            batch = place_batch(data[done + watch.skipped])
            state, metrics = step(state, teacher_params, batch)
            values = _values(metrics)
            seconds = time.perf_counter() - began
            done += 1
            if problem := watch.problem(values):
                checkpoints.settle()
                kept = checkpoints.latest
                say(watch.go_back(done, problem, kept, within=(kept or 0) > oldest))
                assert kept is not None  # said by go_back
                state = checkpoints.restore(state, fingerprint)
                done = kept
                watch.take_up(done, checkpoints.skipped(done))
                progress.update(task, completed=done)
                continue
            if "loss" not in values:  # a batch without a target says nothing
                values = {}
            unit, count = ("tokens", batch["tokens"].size) if "tokens" in batch else ("steps", 1)
            speed = count / seconds
            values |= {f"{unit}_per_second": speed, "seconds": seconds}
            for every, take, at_end in looks:
                if every and (done % every == 0 or (at_end and done == steps)):
                    values |= take(done, state.params)
            run.log(done, values)
            last, stopping = done == steps, stop.asked()
            if checkpoint_every and (done % checkpoint_every == 0 or last or stopping):
                saved = {"skipped": watch.skipped, "wait": last or stopping}
                checkpoints.save(done, state, fingerprint, **saved)
            if stopping:
                kept = (
                    f"checkpoint {done} is saved" if checkpoint_every else "no checkpoint is kept"
                )
                raise stop.stopped(f" after step {done}; {kept}; go on with --resume")
            rate = f"{speed:,.{1 if speed < 100 else 0}f} {unit}/s"
            progress.update(task, advance=1, loss=_loss_text(values), rate=rate)
    return state


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return each metric as one number: itself, or the mean of a sum and a count if that is > 0."""
    means = {k: v if isinstance(v, tuple) else (v, 1.0) for k, v in metrics.items()}
    numbers = {k: (float(total), float(count)) for k, (total, count) in means.items()}
    return {k: total / count for k, (total, count) in numbers.items() if count}


def _loss_text(values: Mapping[str, float | int]) -> str:
    return f"loss {values['loss']:.4f}" if "loss" in values else "no target"
