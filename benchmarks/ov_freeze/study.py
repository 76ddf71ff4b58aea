"""Does ov-freeze stabilise 4-bit distillation? The grid of the study, one cell after the other.

A cell trains one 4-bit student from its float teacher and evaluates it on held-out text of the
training domain and of another one. Every finished cell is one line of ``results/NAME.jsonl``; a
cell that has its line is not run again, so a study that was cut off goes on. ``tables.py`` makes
the tables and figures.

    python -m benchmarks.ov_freeze.study stories     # the whole grid, 260,032 parameters
    python -m benchmarks.ov_freeze.study smollm2     # the part of it that two cores reach
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxdistill as jd
from benchmarks.stories260k import load_stories
from jaxdistill.kd.recommend import recommend_freeze
from jaxdistill.kd.signal import make_signal
from jaxdistill.recipes.calibrate import calibrated
from jaxdistill.recipes.demo import embedded_model
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows, split_rows
from jaxdistill.train.data import load_rows
from jaxdistill.train.packing import batches

HERE = Path(__file__).parent
DATA = HERE.parents[2] / "shared" / "data"
FREEZES = {
    "none": [],
    "v": [r"/v_proj/kernel"],
    "o": [r"/o_proj/kernel"],
    "ov": [jd.OV_PATTERN],
    "qk": [r"/(q|k)_proj/kernel"],
    "qkv": [r"/(q|k|v)_proj/kernel"],
    "mlp": [r"/mlp/\w+/kernel"],
}
STARTS = ("RTN", "MSE", "GPTQ-MSE", "GPTQ", "p=3")
RATES = (1e-5, 1e-4, 5e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One trained student."""

    group: str  # "channel" or "32"
    freeze: str
    lr: float
    seed: int = 0
    ce_weight: float = 0.0
    start: str = "MSE"  # what the student is before training: of STARTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A model, its texts, and how long a cell trains."""

    teacher: jd.Model
    train: str
    other: str
    steps: int
    rows: int
    seq_len: int = 128
    eval_tokens: int = 8192


def studies(name: str) -> tuple[Study, list[Cell]]:
    """Return the study and its cells, the most telling first."""
    if name == "stories":
        study = Study(
            teacher=load_stories(DATA / "models" / "stories260K"),
            train=str(DATA / "text" / "tinystories_cased.jsonl.gz"),
            other=str(DATA / "text" / "tinyshakespeare.jsonl.gz"),
            steps=100,
            rows=4,
        )
        points = [(lr, seed) for lr in (*RATES, 2e-3, 1e-2) for seed in range(3)]
        plans = [("channel", f, 0.0) for f in (*FREEZES, "auto")]
        plans += [("channel", f, 0.5) for f in ("none", "ov")]
        plans += [("32", f, 0.0) for f in ("none", "ov", "auto", "v", "o", "qk", "qkv", "mlp")]
        plans += [("32", f, 0.5) for f in ("none", "ov")]
        return study, [
            Cell(group=g, freeze=f, ce_weight=ce, lr=lr, seed=seed)
            for g, f, ce in plans
            for lr, seed in points
        ]
    study = Study(
        teacher=jd.load_model(embedded_model()),
        train=str(DATA / "text" / "c4_en_train_mini.jsonl.gz"),
        other=str(DATA / "text" / "wikitext2_valid.jsonl.gz"),
        steps=24,
        rows=4,
        eval_tokens=4096,
    )
    both = ("none", "ov")
    cells = [Cell(group="channel", freeze=f, lr=lr) for lr in (1e-4, 5e-4, 2e-3) for f in both]
    cells += [Cell(group="channel", freeze="ov", lr=5e-4, start=x) for x in ("GPTQ", "p=3")]
    cells += [Cell(group="channel", freeze=f, lr=1e-5) for f in both]
    cells += [Cell(group="channel", freeze=f, lr=5e-4, seed=s) for s in (1, 2) for f in both]
    cells += [Cell(group="channel", freeze=f, lr=5e-4) for f in ("o", "v", "mlp", "qk", "qkv")]
    cells += [Cell(group="32", freeze=f, lr=5e-4) for f in (*both, "auto")]
    cells += [Cell(group="channel", freeze=f, lr=5e-4, ce_weight=0.5) for f in both]
    cells += [Cell(group="channel", freeze="auto", lr=5e-4)]
    return study, cells


def policy_of(study: Study, group: str, start: str = "MSE") -> jd.Policy:
    """Return the 4-bit policy; a kernel whose inputs 32 does not divide is per channel.

    RTN rounds to absmax ranges, MSE to those of least error (exponent 2.4), p=3 with exponent 3;
    GPTQ is on absmax ranges, GPTQ-MSE on those of MSE.
    """
    spec = jd.QuantSpec(
        bits=4,
        group_size=None if group == "channel" else 32,
        ranges="absmax" if start in ("RTN", "GPTQ") else "mse",
        norm=3.0 if start == "p=3" else 2.4,
    )
    policy = jd.default_policy(spec, tied=True)
    if study.teacher.config.intermediate_size % 32:
        channel = dataclasses.replace(spec, group_size=None)
        policy = jd.Policy(rules=((r"down_proj/kernel", channel), *policy.rules))
    return policy


def _groups(cells: list[Cell], vectorised: bool) -> Iterator[list[Cell]]:
    """Yield the cells that run together: for a small model all rates and seeds of one plan."""
    left = list(cells)
    while left:
        plan = dataclasses.replace(left[0], lr=0.0, seed=0)
        same = [c for c in left if dataclasses.replace(c, lr=0.0, seed=0) == plan]
        chosen = same if vectorised else left[:1]
        yield chosen
        left = [c for c in left if c not in chosen]


class Runner:
    """Run cells of one study; holds what they share."""

    def __init__(self, study: Study, out: Path, save: Path | None) -> None:
        self.study, self.out, self.save = study, out, save
        t = study.teacher
        rows, held = split_rows(load_rows(study.train), study.train)
        self.packed = pack_rows(rows, t, study.seq_len)
        self.held = {
            name: eval_batches_of(
                pack_rows(text, t, study.seq_len, add_eos=False), 8, study.eval_tokens
            )
            for name, text in (("in", held), ("out", load_rows(study.other)))
        }
        self.float_apply = jd.make_apply(t.config)
        self.judge_stored = jd.make_evaluator(jd.kd_objective(t.apply_fn(), self.float_apply))

    def judge(self, stored: Any) -> dict[str, dict[str, float | int]]:
        """Evaluate a stored student on both texts."""
        params = self.study.teacher.params
        return {name: self.judge_stored(stored, params, on) for name, on in self.held.items()}

    def baselines(self, done: set[tuple[str, str]]) -> None:
        """Evaluate the teacher and post-training quantization alone, but for those done."""
        t = self.study.teacher
        if ("teacher", "") not in done:
            alone = jd.make_evaluator(jd.kd_objective(self.float_apply, None))
            found = {name: alone(t.params, None, on) for name, on in self.held.items()}
            write(self.out, {"baseline": "teacher", "group": "", "result": found})
        for start in STARTS:
            for group in ("channel", "32"):
                if (start, group) not in done:
                    policy = policy_of(self.study, group, start)
                    result = self.judge(jd.quantize_params(self.start(start, policy), policy))
                    write(self.out, {"baseline": start, "group": group, "result": result})

    def start(self, name: str, policy: jd.Policy) -> Any:
        """Return the post-training-quantized params that training starts from."""
        t = self.study.teacher
        if not name.startswith("GPTQ"):
            return jd.add_scales(t.params, policy)
        data = batches(self.packed, batch_size=8, seed=0)
        return calibrated(t, policy, [data[i] for i in range(16)], "gptq")

    def patterns(self, cell: Cell, scaled: Any, policy: jd.Policy) -> list[str]:
        """Return what a cell freezes; ``auto`` asks the signal analysis."""
        if cell.freeze != "auto":
            return FREEZES[cell.freeze]
        t = self.study.teacher
        data = batches(self.packed, batch_size=self.study.rows, seed=0)
        measure = make_signal(t.config, transform=jd.fake_quant_params(policy))
        found = recommend_freeze(measure(t.params, scaled, [data[0], data[1]]))
        print("auto:", found.patterns, flush=True)
        return list(found.patterns)

    def run(self, cells: list[Cell]) -> None:
        """Train the cells of one plan side by side and write their lines."""
        study, first, began = self.study, cells[0], time.perf_counter()
        t, policy = study.teacher, policy_of(study, first.group, first.start)
        student = self.start(first.start, policy)
        patterns = self.patterns(first, student, policy)
        for pattern in patterns:
            student = jd.snap(student, policy, pattern)
        forward = jd.make_apply(t.config, transform=jd.fake_quant_params(policy))
        weights = {"forward_kl": 1 - first.ce_weight, "ce": first.ce_weight}
        loss = "+".join(f"{weight}*{term}" for term, weight in weights.items() if weight)
        objective = jd.kd_objective(forward, self.float_apply, loss)

        def optimizer(lr):
            return jd.freeze(jd.adamw(lr, study.steps), patterns)

        order = [batches(self.packed, batch_size=study.rows, seed=c.seed) for c in cells]
        curves: list[list[dict[str, float]]] = [[] for _ in cells]
        if len(cells) == 1:
            step = jd.make_step(objective, optimizer(first.lr))
            state = jd.init_state(student, optimizer(first.lr))
        else:
            rates = jnp.asarray([c.lr for c in cells])
            state = jd.init_state(student, optimizer(1.0))
            state = jax.tree.map(lambda x: jnp.stack([x] * len(cells)), state)
            one = jax.vmap(
                lambda s, lr, batch: jd.make_step(objective, optimizer(lr))(s, t.params, batch)
            )
            jitted = jax.jit(one, donate_argnums=0)

            def step(state, _, batch):
                return jitted(state, rates, batch)

        for i in range(study.steps):
            given = [data[i] for data in order]
            batch = given[0] if len(cells) == 1 else jax.tree.map(lambda *x: np.stack(x), *given)
            state, metrics = step(state, t.params, batch)
            for n, curve in enumerate(curves):
                pair = {k: [float(np.ravel(x)[n]) for x in v] for k, v in metrics.items()}
                curve.append({k: s / max(c, 1.0) for k, (s, c) in pair.items()})
        trained = time.perf_counter() - began
        for n, cell in enumerate(cells):
            params = state.params
            if len(cells) > 1:
                params = jax.tree.map(lambda x: x[n], params)  # noqa: B023
            sound = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))
            stored = jd.quantize_params(params, policy) if sound else None
            line = dataclasses.asdict(cell) | {
                "patterns": patterns,
                "result": self.judge(stored) if sound else None,
                "grad_norm": [round(row["grad_norm"], 5) for row in curves[n]],
                "kl": [round(row["kl"], 5) for row in curves[n]],
                "seconds": round(trained / len(cells), 1),
            }
            write(self.out, line)
            if (
                self.save
                and sound
                and cell.seed == 0
                and not cell.ce_weight
                and cell.freeze in ("none", "ov")
            ):
                self._keep(cell, stored, policy)

    def _keep(self, cell: Cell, stored: Any, policy: jd.Policy) -> None:
        from jaxdistill.models.quantized import save_quantized

        t, name = self.study.teacher, f"{cell.group}-{cell.freeze}-{cell.start}-{cell.lr:g}"
        self.save.mkdir(parents=True, exist_ok=True)
        save_quantized(self.save / name, t.config, stored, t.tokenizer, policy)


def write(path: Path, line: dict[str, Any]) -> None:
    """Append one finished line."""
    with path.open("a") as f:
        f.write(json.dumps(line) + "\n")
    shown = {k: v for k, v in line.items() if k not in ("grad_norm", "kl", "patterns")}
    print(json.dumps(shown), flush=True)


def main() -> None:
    """Run the cells that have no line yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("stories", "smollm2"))
    parser.add_argument("--save", type=Path, help="directory for students without freeze and ov")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no cell after that long")
    o = parser.parse_args()
    began = time.monotonic()
    study, cells = studies(o.name)
    out = HERE / "results" / f"{o.name}.jsonl"
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    keys = [f.name for f in dataclasses.fields(Cell)]
    finished = {Cell(**{k: line[k] for k in keys}) for line in done if "lr" in line}
    cells = [c for c in cells if c not in finished]
    runner = Runner(study, out, o.save)
    for group in _groups(cells, vectorised=o.name == "stories"):
        if time.monotonic() - began > 60 * o.minutes:
            break
        runner.run(group)
    runner.baselines({(line["baseline"], line["group"]) for line in done if "baseline" in line})


if __name__ == "__main__":
    main()
