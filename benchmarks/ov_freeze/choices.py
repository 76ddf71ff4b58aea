"""How much multiple-choice accuracy do four bits cost, before and after training?

Scores the float model, post-training quantization, and the students that ``study.py --save`` kept,
on the first questions of each set. Writes ``results/choices.md``.

    python -m benchmarks.ov_freeze.choices --students DIR [--limit 100]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jaxdistill as jd
from benchmarks.ov_freeze.study import DATA, HERE, policy_of, studies
from benchmarks.ov_freeze.tables import table
from jaxdistill.evals.choices import choices_name, load_choices
from jaxdistill.recipes.evaluate import choices_result, score_files

SETS = ("arc_easy_train", "piqa_valid_a", "winogrande_val_a", "openbookqa_dev")


def main() -> None:
    """Score every model and write the table as far as it goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    o = parser.parse_args()
    study, _ = studies("smollm2")
    teacher = study.teacher
    files = [DATA / "mc" / f"{name}.jsonl.gz" for name in SETS]
    questions = {choices_name(f): load_choices(f, o.limit) for f in files}

    def ptq(start: str) -> jd.Model:
        policy = policy_of(study, "channel", start)
        stored = jd.quantize_params(jd.add_scales(teacher.params, policy), policy)
        return dataclasses.replace(teacher, params=stored)

    models = {"float": lambda: teacher}
    models |= {
        path.name.replace("channel-", "KD-QAT, "): lambda path=path: jd.load_model(path)
        for path in sorted(o.students.iterdir())
    }
    models |= {"PTQ, RTN": lambda: ptq("RTN"), "PTQ, MSE": lambda: ptq("MSE")}
    rows, raw = [], {}
    heads = ["4-bit per channel", *questions, "mean acc", "of float", "mean acc_norm"]
    for name, make in models.items():
        found = raw[name] = choices_result(score_files({"student": make()}, questions))
        means, scored = found["choices_mean"], found["choices"]
        whole = raw["float"]["choices_mean"]["acc"]
        rows.append(
            [name, *(f"{100 * scored[q]['acc']:.1f}" for q in questions)]
            + [f"{100 * means['acc']:.1f}", f"{means['acc'] / whole:.1%}"]
            + [f"{100 * means['acc_norm']:.1f}"]
        )
        one, mean = 50 / o.limit**0.5, 45 / (o.limit * len(SETS)) ** 0.5
        text = (
            f"# Multiple choice: SmolLM2-135M-Instruct\n\nacc in percent, the first {o.limit} "
            f"questions of each set: one set's standard error is about {one:.0f} points, the "
            f"mean's about {mean:.1f}.\n\n"
        )
        (HERE / "results" / "choices.md").write_text(text + table(heads, rows))
        (HERE / "results" / "choices.json").write_text(json.dumps(raw, indent=1) + "\n")
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
