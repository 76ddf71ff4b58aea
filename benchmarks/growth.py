"""What does each cost grow with, and how fast?

One axis at a time, the rest as in ``BASE``: the KD-QAT step's time, its arithmetic and XLA's
temporaries against rows, tokens of a row, vocabulary, depth, and the group size; compile time
against depth, of scanned and of unrolled layers; a checkpoint's save and restore against
parameters; a meta-gradient against the inner steps K. Each cost's exponent is fitted to the upper
half of the sizes, where what is fixed no longer counts. Writes ``results/growth.md`` and ``.png``.

    python -m benchmarks.growth [AXIS ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

from benchmarks.cases import flops
from benchmarks.meta_gradient.problems import meta_gradient, mlp
from benchmarks.smollm2 import SMOLLM2
from benchmarks.training import ours
from benchmarks.training.shapes import SHAPES
from jaxdistill._memory import keep_pages
from jaxdistill.models.decoder import init_params
from jaxdistill.train.checkpoint import Checkpoints

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
BASE = {"shape": "tiny", "work": "kd_qat", "rows": 2, "seq_len": 128}
ROUNDS = 5
Costs = dict[str, float]
Place = tuple[str, int]  # an axis and a size on it
Timed = dict[str, float | Callable[[], Any]]  # costs; in the place of a time, what takes it


def step(**changed: Any) -> Timed:
    """Return a KD-QAT step's costs; ``layers`` and ``vocabulary`` change the model."""
    model = {"layers": "num_layers", "vocabulary": "vocab_size"}
    SHAPES["grown"] = SHAPES["tiny"] | {model[k]: v for k, v in changed.items() if k in model}
    settings = BASE | {"shape": "grown"} | {k: v for k, v in changed.items() if k not in model}
    began = time.perf_counter()
    go, facts = ours.step(**settings)
    compiled = time.perf_counter() - began
    return {
        "ms": go,
        "GFLOP": flops(**settings) / 1e9,
        "temporaries, MiB": facts["temporaries_mib"],
        "compile, s": compiled,
    }


def saved(layers: int) -> Timed:
    """Return what a checkpoint of a decoder of that depth costs."""
    config = dataclasses.replace(SMOLLM2, **SHAPES["tiny"] | {"num_layers": layers})
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    size = sum(x.nbytes for x in jax.tree.leaves(params))

    def save() -> None:
        with tempfile.TemporaryDirectory() as here, Checkpoints(Path(here)) as kept:
            kept.save(1, {"params": params}, "growth")
            kept.settle()

    there = tempfile.TemporaryDirectory()
    with Checkpoints(Path(there.name)) as kept:
        kept.save(1, {"params": params}, "growth")
        kept.settle()

    def restore() -> None:
        with Checkpoints(Path(there.name)) as kept:
            jax.block_until_ready(kept.restore({"params": params}, "growth"))

    return {"save, ms": save, "restore, ms": restore, "MiB": size / 2**20}


def unrolled_training(steps: int) -> Timed:
    """Return a meta-gradient's costs through that many inner steps, two levels of checkpoints."""
    problem = mlp()
    compiled = meta_gradient(problem, steps, "both, 2 levels")
    given = (problem.inputs, problem.params, problem.targets, problem.real)
    return {
        "ms": lambda: jax.block_until_ready(compiled(*given)),
        "inner steps": steps,
        "temporaries, MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def measured(found: Mapping[Place, Timed]) -> dict[Place, Costs]:
    """Return costs with medians of rounds in the place of what is to be timed.

    One round of every size in turn: where the machine's own rate moves, it moves for all.
    """
    jobs = [(place, name, go) for place, costs in found.items() for name, go in costs.items()]
    jobs = [(place, name, go) for place, name, go in jobs if callable(go)]
    times: dict[tuple[Place, str], list[float]] = {(place, name): [] for place, name, _ in jobs}
    for number in range(1 + ROUNDS):
        for place, name, go in jobs:
            began = time.perf_counter()
            go()
            if number:
                times[place, name].append(1e3 * (time.perf_counter() - began))
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        place: {name: medians.get((place, name), cost) for name, cost in costs.items()}
        for place, costs in found.items()
    }


# axis -> (sizes, how to measure one, the cost that the time is held against)
AXES: dict[str, tuple[Sequence[int], Callable[[int], Timed], str]] = {
    "rows": ((1, 2, 4, 8, 16, 32), lambda n: step(rows=n), "GFLOP"),
    "tokens of a row": ((64, 128, 256, 512, 1024, 2048), lambda n: step(seq_len=n), "GFLOP"),
    "vocabulary": (
        (8192, 16384, 32768, 65536, 131072, 262144),
        lambda n: step(vocabulary=n),
        "GFLOP",
    ),
    "layers, scanned": ((2, 4, 8, 16, 32), lambda n: step(layers=n), "GFLOP"),
    "layers, unrolled": ((2, 4, 8, 16, 32), lambda n: step(layers=n, unroll=0), "GFLOP"),
    "group size": ((8, 16, 32, 64), lambda n: step(group=n), "GFLOP"),
    "checkpointed layers": ((8, 16, 32, 64, 128), saved, "MiB"),
    "inner steps K": ((16, 32, 64, 128, 256, 512), unrolled_training, "inner steps"),
}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return b of ``cost ~ size^b``, by least squares of logarithms over the upper half."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(costs[half:]), 1)[0])


def table(found: Mapping[str, Mapping[str, Costs]]) -> str:
    """Return every axis as markdown, its exponents below its sizes."""
    lines = [
        "# What each cost grows with\n",
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}. One axis "
        f"at a time; else the tiny shape, {BASE['rows']} rows of {BASE['seq_len']} tokens, KD-QAT "
        f"per channel, layers scanned. Medians of {ROUNDS} rounds of all sizes in turn. The "
        "exponent is fitted to the upper half of the sizes; of the arithmetic it says what the "
        "time may grow with.\n",
        "![](growth.png)",
    ]
    for axis, by_size in found.items():
        names = list(next(iter(by_size.values())))
        lines += [f"\n## {axis}\n", f"| {axis} | {' | '.join(names)} |"]
        lines.append("| ---: |" + " ---: |" * len(names))
        for size, costs in by_size.items():
            lines.append(f"| {int(size):,} | {' | '.join(f'{costs[n]:,.4g}' for n in names)} |")
        sizes = [float(size) for size in by_size]
        fitted = [exponent(sizes, [c[n] for c in by_size.values()]) for n in names]
        lines.append(f"| exponent | {' | '.join(f'{b:.2f}' for b in fitted)} |")
    return "\n".join(lines) + "\n"


def draw(found: Mapping[str, Mapping[str, Costs]], path: Path) -> None:
    """Plot time and what it is held against, each over its value at the largest size."""
    figure, axes = plt.subplots(2, 4, figsize=(16, 7), constrained_layout=True)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, (name, by_size) in zip(axes.flat, found.items(), strict=False):
        sizes = [float(size) for size in by_size]
        held = AXES[name][2]
        for cost in next(iter(by_size.values())):
            values = np.asarray([c[cost] for c in by_size.values()])
            style = "--" if cost == held else "-"
            label = f"{cost}: {exponent(sizes, list(values)):.2f}"
            axis.loglog(sizes, values / values[-1], style, marker=".", label=label)
        axis.set(xlabel=name, ylabel="over that of the largest size")
        axis.set_xticks(sizes, [f"{int(size):,}" for size in sizes], rotation=30)
        axis.minorticks_off()
        axis.legend(title="exponents", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure the axes that were asked for, by default all, and write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("axes", nargs="*", help=f"of {', '.join(AXES)}")
    given = parser.parse_args()
    if unknown := [axis for axis in given.axes if axis not in AXES]:
        parser.error(f"no axis {unknown[0]!r}; accepted: {', '.join(AXES)}")
    keep_pages()
    where = RESULTS / "growth.json"
    kept = json.loads(where.read_text()) if where.is_file() else {}
    # Axes of one kind are compared with each other: they share their rounds.
    for _, kind in itertools.groupby(given.axes or AXES, lambda axis: axis.split(",")[0]):
        places = [(axis, size) for axis in kind for size in AXES[axis][0]]
        found = measured({place: AXES[place[0]][1](place[1]) for place in places})
        gc.collect()
        kept |= {axis: {} for axis, _ in places}
        for (axis, size), costs in found.items():
            kept[axis][str(size)] = costs
            print(axis, size, costs, flush=True)
        where.write_text(json.dumps(kept, indent=1) + "\n")
        ordered = {name: kept[name] for name in AXES if name in kept}
        where.with_suffix(".md").write_text(table(ordered))
        draw(ordered, where.with_suffix(".png"))


if __name__ == "__main__":
    main()
