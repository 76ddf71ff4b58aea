"""Does KD-QAT repair 4-bit per-channel SmolLM2-135M, with ov-freeze and without?

GSM8K questions and answers as chat, 80 steps of 4 x 128 tokens, peak rate 1e-4, MSE ranges; every
20th row is held out, 16,384 tokens of it evaluated. Writes ``results/kd_qat_reference.md`` and a
picture beside it.

    python benchmarks/kd_qat_reference.py [--data gsm8k_train.jsonl.gz] [--loss-on all] [--out DIR]
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from jaxdistill.evals.perplexity import recovered
from jaxdistill.recipes.demo import embedded_model, peak_mib
from jaxdistill.recipes.quantize import Quantize, quantize
from jaxdistill.report.plots import draw_training
from jaxdistill.report.table import markdown_table
from jaxdistill.report.theme import write_pictures
from jaxdistill.train.run_directory import read_metrics

HERE = Path(__file__).parent
GSM8K = HERE.parent.parent / "shared" / "data" / "instruct" / "gsm8k_train.jsonl.gz"


def main() -> None:
    """Run both jobs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(GSM8K))
    parser.add_argument("--loss-on", default="all", choices=("all", "completion"))
    parser.add_argument("--out", default="runs/reference", type=Path)
    parser.add_argument("--steps", default=80, type=int)
    parser.add_argument("--name", default="kd_qat_reference")
    o = parser.parse_args()
    shutil.rmtree(o.out, ignore_errors=True)
    results, runs, known, lines = {}, {}, None, []
    for label, freeze in (("KD-QAT + ov-freeze", "ov"), ("KD-QAT", "none")):
        began = time.perf_counter()
        out = o.out / freeze
        found = quantize(
            Quantize(
                model=embedded_model(),
                data=o.data,
                out=out,
                freeze=freeze,
                steps=o.steps,
                batch_size=4,
                seq_len=128,
                lr=1e-4,
                loss_on=o.loss_on,
                eval_tokens=16384,
                checkpoint_every=-1,
            ),
            known=known,
        )
        known = {"teacher": found["teacher"], "ptq": found["ptq"]}
        results |= known | {label: found["student"]}
        runs[label] = read_metrics(out)
        shares = [
            recovered(found["ptq"][k], found["student"][k], 0 if k == "kl" else found["teacher"][k])
            for k in ("kl", "nll")
        ]
        lines.append(
            f"{label}: {shares[0]:.1%} of PTQ's KL and {shares[1]:.1%} of its NLL gap recovered; "
            f"{time.perf_counter() - began:.0f} s in all, "
            f"{sorted(r['seconds'] for r in runs[label])[o.steps // 2]:.2f} s a step (median).\n"
        )
    text = f"# KD-QAT of SmolLM2-135M-Instruct, 4-bit per channel\n\n{Path(o.data).name}, loss on "
    text += f"{o.loss_on} tokens, {o.steps} steps of 4 x 128 tokens, 2 CPU cores, float32.\n\n"
    text += markdown_table(results) + "\n" + "\n".join(lines) + f"\nPeak memory {peak_mib()} MiB.\n"
    (HERE / "results" / f"{o.name}.md").write_text(text)
    write_pictures(HERE / "results" / o.name, draw_training(runs, results))
    print(text)


if __name__ == "__main__":
    main()
