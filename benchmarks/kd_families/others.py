"""Two families that need a task of their own: rationales, and a student with another tokenizer.

Rationales: grade-school sums (GSM8K), the four-layer student of ``study.py``; answers alone against
answers and rationales, at the same number of tokens, judged by the NLL of held-out answers.

Cross-tokenizer: the student reads TinyStories by a BPE of 2,000 tokens made on the training text;
its layers are the teacher's, its new embeddings the mean of the teacher's for the same characters;
judged by nats a character of held-out text.

    python -m benchmarks.kd_families.others
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import jaxdistill as jd
from benchmarks.kd_families.study import (
    CUT,
    DATA,
    HERE,
    RATE,
    ROWS,
    SEEDS,
    SEQ_LEN,
    STEPS,
    cut_vocabulary,
)
from jaxdistill.evals.perplexity import make_evaluator
from jaxdistill.models.hub import Model, load_model
from jaxdistill.recipes.demo import embedded_model
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows, split_rows
from jaxdistill.recipes.student_init import student_from
from jaxdistill.train.data import load_rows
from jaxdistill.train.packing import batches
from jaxdistill.train.pairing import pair_rows
from jaxdistill.train.rationale import ANSWER, rationale_rows

OUT = HERE / "results" / "others.jsonl"


def train(config: Any, params: Any, objective: Any, teacher_params: Any, data: Any) -> Any:
    """Train a student for the study's number of steps; return its params."""
    tx = jd.freeze(jd.adamw(RATE, STEPS))
    step, state = jd.make_step(objective, tx), jd.init_state(params, tx)
    for i in range(STEPS):
        state, _ = step(state, teacher_params, data[i])
    return state.params


def sums() -> Any:
    """Yield (family, run of a seed) for the rationales."""
    full = load_model(embedded_model())
    source = str(DATA / "instruct" / "gsm8k_train.jsonl.gz")
    text, held = split_rows(load_rows(source).select(range(2000)), source)
    split = [
        {
            "instruction": row["instruction"],
            "rationale": row["output"].rsplit("\n", 1)[0],
            "output": row["final"],
        }
        for row in text
    ]

    def answers(rows: Any) -> list[dict[str, str]]:
        return [
            {"instruction": ANSWER + row["instruction"], "output": row["final"]} for row in rows
        ]

    layouts = {
        "answers alone": pack_rows(answers(text), full, SEQ_LEN, "completion"),
        "answers and rationales, weight 0.5": pack_rows(
            rationale_rows(split, 0.5), full, SEQ_LEN, "completion"
        ),
        "answers and rationales, weight 1": pack_rows(
            rationale_rows(split, 1.0), full, SEQ_LEN, "completion"
        ),
    }
    asked = answers(held.select(range(100)))
    judged = pack_rows(asked, full, SEQ_LEN, "completion", packing="none")
    teacher, rows = cut_vocabulary(full, [*layouts.values(), judged])
    held_batches = eval_batches_of(rows[-1], 8)
    student = student_from(teacher, CUT, 0)
    apply = jd.make_apply(student.config)
    judge = make_evaluator(jd.kd_objective(apply, None))
    for name, packed in zip(layouts, rows, strict=False):

        def run(seed: int, packed: Any = packed) -> dict[str, Any]:
            data = batches(packed, batch_size=ROWS, seed=seed)
            objective = jd.kd_objective(apply, None)
            done = train(student.config, student.params, objective, None, data)
            return judge(done, None, held_batches)

        yield f"rationales: {name}", run


def new_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 2,000 tokens made on the texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def crossed() -> Any:
    """Yield (family, run of a seed) for the other tokenizer."""
    full = load_model(embedded_model())
    source = str(DATA / "text" / "tinystories_cased.jsonl.gz")
    text, held = split_rows(load_rows(source), source)
    tokenizer = new_tokenizer(list(text["text"]))
    theirs = full.text_tokenizer()
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    ids = [theirs(piece, add_special_tokens=False)["input_ids"] or [0] for piece in pieces]
    old = np.asarray(full.params["embed_tokens"]["embedding"])
    table = np.stack([old[np.array(x)].mean(axis=0) for x in ids]).astype(np.float32)
    cut = student_from(full, CUT, 0)
    config = dataclasses.replace(cut.config, vocab_size=len(tokenizer), eos_token_id=0)
    params = cut.params | {"embed_tokens": {"embedding": jnp.asarray(table)}}
    student = Model(config=config, params=params, tokenizer=tokenizer, source="student")

    paired = pair_rows(text, tokenizer, theirs, SEQ_LEN)
    teacher, (rows, _) = cut_vocabulary(full, [paired.teacher, pack_rows(text, full, SEQ_LEN)])
    paired = dataclasses.replace(paired, teacher=rows)
    held_rows = pack_rows(held, student, SEQ_LEN, add_eos=False)
    held_batches = eval_batches_of(held_rows, 8, 8192)
    # Characters of the targets that are judged: nats a character do not depend on the tokenizer.
    length = np.array([len(piece) for piece in pieces])
    characters = sum(int(length[b["tokens"][b["loss_mask"]]].sum()) for b in held_batches)
    apply, guide = jd.make_apply(config), jd.make_apply(teacher.config)
    judge = make_evaluator(jd.kd_objective(apply, None))
    for loss in ("ce", "0.5*uld+ce", "0.5*uld:align=index+ce", "span_likelihood+ce"):

        def run(seed: int, loss: str = loss) -> dict[str, Any]:
            data = batches(paired, batch_size=ROWS, seed=seed)
            objective = (
                jd.kd_objective(apply, None)
                if loss == "ce"
                else jd.cross_tokenizer_objective(apply, guide, loss)
            )
            given = None if loss == "ce" else teacher.params
            done = train(config, params, objective, given, data)
            found = judge(done, None, held_batches)
            return found | {"per_character": found["nll"] * found["tokens"] / characters}

        yield f"another tokenizer: {loss}", run


def write_table(lines: list[dict[str, Any]]) -> None:
    """Write means and standard deviations over seeds."""
    table = ["| family | seeds | NLL of targets | nats a character |", "|---|---:|---:|---:|"]
    for family in dict.fromkeys(line["family"] for line in lines):
        rows = [line["result"] for line in lines if line["family"] == family]
        cells = []
        for key in ("nll", "per_character"):
            values = np.array([row[key] for row in rows if key in row])
            spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}" if len(values) else "")
        table.append(f"| {family} | {len(rows)} | {' | '.join(cells)} |")
    Path(OUT).with_suffix(".md").write_text("\n".join(table) + "\n")


def main() -> None:
    """Run what has no line yet; write the table after each."""
    lines = [json.loads(x) for x in OUT.read_text().splitlines()] if OUT.exists() else []
    finished = {(line["family"], line["seed"]) for line in lines}
    for runs in (sums, crossed):
        for family, run in runs():
            for seed in SEEDS:
                if (family, seed) in finished:
                    continue
                lines.append({"family": family, "seed": seed, "result": run(seed)})
                with OUT.open("a") as f:
                    f.write(json.dumps(lines[-1]) + "\n")
                print(lines[-1], flush=True)
                write_table(lines)


if __name__ == "__main__":
    main()
