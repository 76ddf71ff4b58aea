"""What do checkpoints cost a run, and what does going on from one? Ratios of a training step.

    python -m benchmarks.faults.save_cost [--model stories]

SmolLM2-135M by default, KD-QAT at 4 bits, few steps: its state is 1.6 GB. Nothing else should run.
Writes ``results/save_cost.md``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path

import jax
from rich.console import Console

from benchmarks.faults.campaign import RESULTS
from jaxdistill.kd.freeze import ov_freeze
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.models.hub import load_model
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params
from jaxdistill.recipes.demo import embedded_model, write_text
from jaxdistill.recipes.prepare import pack_rows
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.data import load_rows
from jaxdistill.train.loop import train
from jaxdistill.train.manifest import damage
from jaxdistill.train.packing import batches
from jaxdistill.train.run_directory import RunDirectory

OUT = Path("runs/save_cost")


def main() -> None:
    """Train with and without checkpoints, restore, and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2", help="smollm2, or a model's path")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    o = parser.parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    text, _ = write_text(OUT / "text")
    model = load_model(embedded_model() if o.model == "smollm2" else o.model).floats()
    policy = default_policy(QuantSpec(bits=4), tied=model.config.tie_embeddings)
    rows = pack_rows(load_rows(str(text)), model, o.seq_len)
    data = batches(rows, batch_size=o.rows, seed=0)
    transform = fake_quant_params(policy)
    apply = model.apply_fn()
    objective = kd_objective(lambda p, *a: apply(transform(p), *a), apply)
    tx = ov_freeze(adamw(1e-4, o.steps))
    step = make_step(objective, tx)
    params = add_scales(model.params, policy)
    quiet = Console(quiet=True)

    def fresh():
        return init_state(params, tx)

    def seconds(every: int) -> float:
        """Return the time of a step, the compiling one and the last one's wait for its save out."""
        marks: list[float] = []

        def timed(state, teacher, batch):
            marks.append(time.perf_counter())
            return step(state, teacher, batch)

        with RunDirectory(OUT / f"every{every}", {}, resume=False) as run:
            train(
                timed,
                fresh(),
                model.params,
                data,
                steps=o.steps,
                run=run,
                fingerprint="x",
                checkpoint_every=every,
                console=quiet,
            )
        return (marks[-1] - marks[1]) / (len(marks) - 2)

    jax.block_until_ready(step(fresh(), model.params, data[0])[0])
    intervals = [0, 2, 4, 0, 4, 2, 0]
    times: dict[int, list[float]] = {}
    for i, every in enumerate(intervals):
        shutil.rmtree(OUT / f"every{every}", ignore_errors=True)
        times.setdefault(every, []).append(seconds(every))
        print(i, every, times[every][-1], flush=True)
    plain = statistics.median(times[0])
    state = fresh()
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 2**20
    with Checkpoints(OUT / "every2" / "checkpoints") as checkpoints:
        last = checkpoints.latest
        began = time.perf_counter()
        assert damage(checkpoints.directory / str(last)) is None
        checked = time.perf_counter() - began
        began = time.perf_counter()
        jax.block_until_ready(checkpoints.restore(state, "x"))
        restored = time.perf_counter() - began
    blocked = []
    with Checkpoints(OUT / "blocked") as checkpoints:
        for i in range(3):
            began = time.perf_counter()
            checkpoints.save(i + 1, state, "x")
            mid = time.perf_counter()
            checkpoints.settle()
            blocked.append((mid - began, time.perf_counter() - mid))
    lines = [
        "# What saving costs\n",
        f"{Path(model.source).name}, 4 bits, ov-freeze, {o.rows} x {o.seq_len} tokens a step; a "
        f"state of {size:,.0f} MiB; {os.cpu_count()} {jax.devices()[0].platform.upper()} cores; "
        f"load at the end {os.getloadavg()[0]:.1f}. A step takes {plain:.2f} s without "
        "checkpoints; all else in such steps.\n",
        "| | in steps |",
        "| --- | ---: |",
    ]
    for every in (4, 2):
        ratio = statistics.median(times[every]) / plain
        lines.append(f"| a step, with a checkpoint every {every} | {ratio:.2f} |")
    lines += [
        f"| a step without, slowest run by fastest | {max(times[0]) / min(times[0]):.2f} |",
        f"| a save: training waits | {statistics.median(b[0] for b in blocked) / plain:.2f} |",
        f"| a save: goes on beside it | {statistics.median(b[1] for b in blocked) / plain:.2f} |",
        f"| to go on: checking the manifest | {checked / plain:.2f} |",
        f"| to go on: reading the state | {restored / plain:.2f} |",
    ]
    (RESULTS / "save_cost.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
