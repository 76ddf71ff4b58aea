"""What do the looks at a training student's signal cost? SmolLM2-135M, KD-QAT, 2 CPU cores.

Trains some steps with a look now and then, the shipped job itself, and compares the time of looks
(after the first, which compiles) with that of steps. Writes ``results/signal_cost.md``.

    python -m benchmarks.signal_cost
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from pathlib import Path

from jaxdistill.recipes.demo import embedded_model, write_text
from jaxdistill.recipes.quantize import Quantize, quantize
from jaxdistill.recipes.signal_looks import steps_between
from jaxdistill.train.run_directory import read_metrics

OUT = Path("runs/signal_cost")


def main() -> None:
    """Run the job and write the table."""
    shutil.rmtree(OUT, ignore_errors=True)
    train, _ = write_text(OUT / "text")
    lines = [
        "# The cost of looks at the signal\n",
        "SmolLM2-135M-Instruct, 4-bit per channel, no freeze, 128 tokens a row, 2 CPU cores, "
        "float32. A look: gradients of the distillation loss, SQNR, RMS, clipping and flips of "
        "every projection on 512 held-out tokens. Medians; the share is of a run at the default "
        "`--signal-every` for 400 steps.\n",
        "| rows a step | step, s | look, s | looks, in steps | steps between looks | share |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rows in (4,):
        job = Quantize(
            model=embedded_model(),
            data=str(train),
            out=OUT / str(rows),
            freeze="none",
            steps=7,
            signal_every=2,
            batch_size=rows,
            seq_len=128,
            eval_tokens=1024,
            checkpoint_every=-1,
        )
        quantize(job)
        metrics = read_metrics(job.out)
        step = statistics.median(row["seconds"] for row in metrics[1:])
        looks = [row["signal/seconds"] for row in metrics if "signal/seconds" in row][1:]
        look = statistics.median(looks)
        usual = dataclasses.replace(job, steps=400, signal_every=0)
        every = steps_between(usual)
        lines.append(
            f"| {rows} | {step:.2f} | {look:.2f} | {look / step:.2f} | {every} | "
            f"{look / (every * step):.1%} |"
        )
        print(lines[-1], flush=True)
    (Path(__file__).parent / "results" / "signal_cost.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
