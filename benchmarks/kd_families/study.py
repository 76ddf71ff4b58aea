"""Every family of distillation on one task, at an equal budget of tokens, beside plain training.

The teacher is SmolLM2-135M-Instruct, its vocabulary cut to the tokens that the text holds (two
cores would else spend most of the time in the head); the student is four of its thirty layers; the
text is TinyStories. A cell trains one student by one family from one seed. Every finished cell is
one line of ``results/smollm2.jsonl``; a cell that has its line is not run again. ``tables.py``
makes the table.

    python -m benchmarks.kd_families.study [--minutes M]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxdistill as jd
from jaxdistill.evals.confidence import teacher_confidence
from jaxdistill.evals.perplexity import make_evaluator
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.rollout import make_rollout
from jaxdistill.kd.schedule import schedule_of
from jaxdistill.kd.sequence_level import teacher_text
from jaxdistill.kd.states import init_projections, tap_of
from jaxdistill.losses.loss import parse_loss
from jaxdistill.models.decoder import Output
from jaxdistill.models.generate import Sampling
from jaxdistill.models.hub import Model, load_model
from jaxdistill.recipes.demo import embedded_model
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows, split_rows
from jaxdistill.recipes.student_init import student_from
from jaxdistill.train.curriculum import CurriculumBatches
from jaxdistill.train.data import load_rows
from jaxdistill.train.encode import encode_rows
from jaxdistill.train.packing import Packed, batches
from jaxdistill.train.prompts import prompt_rows

HERE = Path(__file__).parent
DATA = HERE.parents[2] / "shared" / "data"
OUT = HERE / "results" / "smollm2.jsonl"
STEPS, ROWS, SEQ_LEN, PROMPT, RATE = 40, 4, 128, 32, 1e-3
SEEDS = (0, 1, 2)
CUT = ("cut:layers=4",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One way to train the student; what it does not name is as in the first row."""

    name: str
    loss: str = "forward_kl"
    student: tuple[str, ...] = CUT
    bits: int = 0
    teachers: int = 1
    mixture: str = "mean"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of kd_objective
    on_policy: float = 0.0
    text: str = "data"
    order: str = "none"


FAMILIES = [
    Family(name="cross-entropy", loss="ce"),
    Family(name="logits: forward KL"),
    Family(name="logits: forward KL + CE", loss="0.5*forward_kl+0.5*ce"),
    Family(name="on-policy: GKD, forward KL, half of the steps", on_policy=0.5),
    Family(name="sequence-level: the teacher's text", loss="ce", text="teacher"),
    Family(name="hidden states + forward KL", loss="forward_kl+hidden"),
    Family(name="multi-teacher, mean", teachers=2),
    Family(name="uncertainty: certain tokens", options={"token_weight": "certainty"}),
    Family(name="dynamic: TAID", loss="taid"),
    Family(name="cache: top 64 and tail", options={"top_k": 64}),
    Family(name="4 bits: cross-entropy", loss="ce", bits=4),
    Family(name="4 bits: forward KL", bits=4),
    Family(name="LoRA of rank 32: cross-entropy", loss="ce", student=(*CUT, "lora:rank=32")),
    Family(name="LoRA of rank 32: forward KL", student=(*CUT, "lora:rank=32")),
    Family(
        name="half of the MLP's width: cross-entropy",
        loss="ce",
        student=("cut:layers=4,intermediate=768",),
    ),
    Family(name="half of the MLP's width: forward KL", student=("cut:layers=4,intermediate=768",)),
    Family(name="task-specific: probability shift", options={"correction": "probability_shift"}),
    Family(name="attention maps + forward KL", loss="forward_kl+attention"),
    Family(name="relations + forward KL", loss="forward_kl+0.1*relations:heads=3"),
    Family(name="dynamic: easy rows first", order="teacher"),
    Family(
        name="on-policy: policy gradient",
        loss="policy_gradient",
        on_policy=1.0,
    ),
    Family(name="logits: reverse KL", loss="reverse_kl"),
    Family(name="logits: JSD", loss="jsd"),
    Family(name="on-policy: GKD, JSD, half of the steps", loss="jsd", on_policy=0.5),
    Family(name="logits: adaptive KL", loss="adaptive_kl"),
    Family(name="logits: Jeffreys", loss="jeffreys"),
    Family(name="logits: skew forward KL", loss="skew_forward_kl"),
    Family(name="logits: skew reverse KL", loss="skew_reverse_kl"),
    Family(name="logits: total variation", loss="total_variation"),
    Family(name="logits: CAKLD", loss="cakld"),
    Family(name="logits: forward KL, temperature 2", loss="forward_kl:temperature=2"),
    Family(name="dynamic: temperature 4 to 1", loss="forward_kl:temperature=4..1"),
    Family(name="uncertainty: uncertain tokens", options={"token_weight": "uncertainty"}),
    Family(name="multi-teacher, by confidence", teachers=2, mixture="confidence"),
    Family(name="multi-teacher, by agreement", teachers=2, mixture="agreement"),
    Family(name="task-specific: label mix", options={"correction": "label_mix:share=0.3"}),
    Family(name="4 bits: CAKLD", loss="cakld", bits=4),
    Family(name="4 bits: top 64 and tail", bits=4, options={"top_k": 64}),
]


def cut_vocabulary(model: Model, sources: list[Packed]) -> tuple[Model, list[Packed]]:
    """Return model and rows with the vocabulary that the rows hold, ids counted anew."""
    kept = np.unique(np.concatenate([p.tokens.reshape(-1) for p in sources] + [model.stop_ids]))
    table = model.params["embed_tokens"]["embedding"][kept]
    config = dataclasses.replace(
        model.config,
        vocab_size=len(kept),
        eos_token_id=tuple(int(np.searchsorted(kept, i)) for i in model.stop_ids),
    )
    params = model.params | {"embed_tokens": {"embedding": table}}
    rows = [
        dataclasses.replace(p, tokens=np.searchsorted(kept, p.tokens).astype(np.int32))
        for p in sources
    ]
    return dataclasses.replace(model, config=config, params=params, tokenizer=None), rows


def remembered(out: Any, *_: Any) -> Output:
    """Pass for an ``ApplyFn`` whose params are the hidden states and head that it would give."""
    return Output(out["hidden"], out["head"])


class Study:
    """Hold what the cells share: models, rows, and the teachers' hidden states of seen batches."""

    def __init__(self) -> None:
        full = load_model(embedded_model())
        source = str(DATA / "text" / "tinystories_cased.jsonl.gz")
        text, held = split_rows(load_rows(source), source)
        rows = [
            pack_rows(text, full, SEQ_LEN),
            pack_rows(held, full, SEQ_LEN, add_eos=False),
            prompt_rows(
                encode_rows(text, full.text_tokenizer()),
                seq_len=SEQ_LEN,
                prompt_length=PROMPT,
                pad_id=0,
            ),
        ]
        self.teacher, (self.packed, held_rows, self.prompts) = cut_vocabulary(full, rows)
        print("vocabulary", self.teacher.config.vocab_size, "rows", len(self.packed), flush=True)
        self.held = eval_batches_of(held_rows, 8, 8192)
        self.apply = jd.make_apply(self.teacher.config)
        self._hidden = jax.jit(
            lambda p, b: self.apply(p, b["tokens"], b["positions"], b["segment_ids"]).hidden
        )
        self._memory: dict[tuple[int, bytes], Any] = {}
        self._second: Any = None
        self._texts: dict[int, Packed] = {}
        self._difficulty: Any = None

    def hidden(self, which: int, batch: Any) -> Any:
        """Return a teacher's output on a batch, computed once."""
        params = self.teacher.params if which == 0 else self.second()
        key = which, batch["tokens"].tobytes()
        if key not in self._memory:
            self._memory[key] = np.asarray(self._hidden(params, batch))
        return {"hidden": self._memory[key], "head": params["embed_tokens"]["embedding"]}

    def judge(self, config: Any, params: Any) -> dict[str, float | int]:
        """Evaluate a student on held-out text, beside the teacher."""
        student = jd.make_apply(config)

        score, totals = jax.jit(lambda *x: kd_objective(student, remembered)(*x)[2]), {}
        for batch in self.held:
            for name, (total, count) in score(params, self.hidden(0, batch), batch).items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + float(total), before[1] + float(count))
        return {name: total / count for name, (total, count) in totals.items() if name != "loss"}

    def second(self) -> Any:
        """Return the second teacher: the first one after 40 steps of CE on the training text."""
        if self._second is None:
            tx = jd.freeze(jd.adamw(1e-4, STEPS))
            step = jd.make_step(kd_objective(self.apply, None), tx)
            state, data = (
                jd.init_state(self.teacher.params, tx),
                batches(self.packed, batch_size=ROWS, seed=99),
            )
            for i in range(STEPS):
                state, _ = step(state, None, data[i])
            self._second = state.params
        return self._second

    def rows(self, family: Family, seed: int) -> Any:
        """Return the training rows of a family."""
        if family.text == "teacher":
            if seed not in self._texts:
                used = self.prompts[seed * STEPS * ROWS : (seed + 1) * STEPS * ROWS]
                made = teacher_text(
                    self.apply,
                    self.teacher.params,
                    self.teacher.config,
                    used,
                    prompt_length=PROMPT,
                    how=Sampling(max_new_tokens=SEQ_LEN - PROMPT, temperature=1.0),
                    stop=self.teacher.stop_ids,
                    batch_size=16,
                    seed=seed,
                )
                self._texts[seed] = Packed(**made)
            return self._texts[seed]
        return self.prompts if family.on_policy else self.packed

    def data(self, family: Family, seed: int) -> Any:
        """Return ``data[i]``, the batch of step i."""
        rows = self.rows(family, seed)
        if family.order == "none":
            return batches(rows, batch_size=ROWS, seed=seed)
        if self._difficulty is None:
            score = jax.jit(lambda p, b: kd_objective(remembered, None)(p, None, b)[:2])
            found = []
            for i in range(len(rows)):
                row = rows[i : i + 1]
                params = {
                    "hidden": self._hidden(self.teacher.params, row),
                    "head": self.teacher.params["embed_tokens"]["embedding"],
                }
                total, count = score(params, row)
                found.append(float(total) / max(float(count), 1.0))
            self._difficulty = np.float64(found)
        return CurriculumBatches(
            rows, self._difficulty, batch_size=ROWS, seed=seed, rise=STEPS // 2
        )

    def run(self, family: Family, seed: int) -> dict[str, Any]:
        """Train one cell; return its line."""
        began = time.perf_counter()
        loss = parse_loss(family.loss)
        made = student_from(self.teacher, family.student, seed)
        config, params, transform = made.config, made.params, made.transform
        policy = None
        if family.bits:
            policy = jd.default_policy(jd.QuantSpec(bits=family.bits, group_size=32), tied=True)
            params, transform = jd.add_scales(params, policy), jd.fake_quant_params(policy)
        params = params | (
            {"projections": p}
            if (
                p := init_projections(
                    loss,
                    config.hidden_size,
                    config.hidden_size,
                    config.num_layers,
                    jax.random.key(seed),
                )
            )
            else {}
        )
        data = self.data(family, seed)
        if "cakld.confidence" in loss.moving():
            some = [data[i] for i in range(4)]
            loss = loss.with_argument(
                "cakld.confidence", teacher_confidence(self.apply, self.teacher.params, some)
            )
        tap, live = tap_of(loss), bool(tap_of(loss)) or family.on_policy > 0
        learner = jd.make_apply(config, transform=transform, tap=tap)
        guide = jd.make_apply(self.teacher.config, tap=tap) if live else remembered
        guides = guide if family.teachers == 1 else (guide,) * family.teachers
        objective = kd_objective(
            learner,
            guides if loss.needs_teacher else None,
            loss,
            mixture=family.mixture,
            **family.options,
        )
        schedule = schedule_of(loss, STEPS)
        rollout = None
        if family.on_policy:
            rollout = make_rollout(
                jd.make_apply(config),
                config,
                prompt_length=PROMPT,
                how=Sampling(max_new_tokens=SEQ_LEN - PROMPT, temperature=1.0),
                stop=self.teacher.stop_ids,
                share=family.on_policy,
                seed=seed,
                prepare=transform,
            )
        tx = jd.freeze(jd.adamw(RATE, STEPS), list(made.freeze))
        step = jd.make_step(objective, tx, rollout=rollout, schedule=schedule)
        state = jd.init_state(params, tx, schedule)
        losses = []
        for i in range(STEPS):
            batch = data[i]
            if not loss.needs_teacher:
                given = None
            elif live:
                given = self.teacher.params
            elif family.teachers == 1:
                given = self.hidden(0, batch)
            else:
                given = tuple(self.hidden(which, batch) for which in range(family.teachers))
            state, metrics = step(state, given, batch)
            total, count = (float(x) for x in metrics["loss"])
            losses.append(round(total / max(count, 1.0), 5))
        trained = {k: v for k, v in state.params.items() if k != "projections"}
        if transform:
            trained = jax.jit(transform)(trained)
        return {
            "family": family.name,
            "loss": family.loss,
            "seed": seed,
            "result": self.judge(config, trained),
            "losses": losses,
            "seconds": round(time.perf_counter() - began, 1),
        }


def write(line: dict[str, Any]) -> None:
    """Append one finished line."""
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("a") as f:
        f.write(json.dumps(line) + "\n")
    print(json.dumps({k: v for k, v in line.items() if k != "losses"}), flush=True)


def main() -> None:
    """Run the cells that have no line yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1e9, help="start no cell after that long")
    o = parser.parse_args()
    began = time.monotonic()
    done = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []
    finished = {(line["family"], line["seed"]) for line in done}
    study = Study()
    if ("teacher", 0) not in finished:
        alone = make_evaluator(kd_objective(study.apply, None))
        found = alone(study.teacher.params, None, study.held) | {"kl": 0.0, "agreement": 1.0}
        write({"family": "teacher", "loss": "", "seed": 0, "result": found})
        start = student_from(study.teacher, CUT, 0)
        found = study.judge(start.config, start.params)
        write({"family": "the cut student, untrained", "loss": "", "seed": 0, "result": found})
    for family in FAMILIES:
        for seed in SEEDS:
            if (family.name, seed) in finished or time.monotonic() - began > 60 * o.minutes:
                continue
            write(study.run(family, seed))


if __name__ == "__main__":
    main()
