"""Which error should the range search lessen? PTQ of SmolLM2-135M by the exponent of the error.

The search takes the clip of least ``sum |w_hat - w|^p``. At p = 2 it clips the few large weights
that the model depends on; GPTQ's p = 2.4 spares more of them. Evaluated on Python's documentation
(every 8th topic, 4,096 tokens), without any training. Writes ``results/ranges.md``.

    python benchmarks/ranges.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jaxdistill as jd
from jaxdistill.recipes.demo import embedded_model, write_text
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows
from jaxdistill.train.data import load_rows


def main() -> None:
    """Evaluate every exponent and write the table."""
    teacher = jd.load_model(embedded_model())
    with tempfile.TemporaryDirectory() as folder:
        rows = load_rows(str(write_text(Path(folder))[1]))
    held = eval_batches_of(pack_rows(rows, teacher, 128, add_eos=False), 8, 4096)
    objective = jd.kd_objective(teacher.apply_fn(), jd.make_apply(teacher.config))
    evaluate = jd.make_evaluator(objective)
    lines = [
        "# PTQ by the exponent of the range search\n",
        "SmolLM2-135M-Instruct, 4-bit, held-out Python documentation, no training.\n",
        "| group | ranges | NLL | KL to teacher |\n| --- | --- | ---: | ---: |",
    ]
    for group_size in (None, 32):
        for norm in (None, 2.0, 2.4, 3.0, 4.0):
            how = "absmax" if norm is None else "mse"
            spec = jd.QuantSpec(bits=4, group_size=group_size, ranges=how, norm=norm or 2.4)
            policy = jd.default_policy(spec, tied=True)
            stored = jd.quantize_params(jd.add_scales(teacher.params, policy), policy)
            found = evaluate(stored, teacher.params, held)
            name = "absmax" if norm is None else f"grid, p = {norm}"
            group = group_size or "channel"
            lines.append(f"| {group} | {name} | {found['nll']:.4f} | {found['kl']:.4f} |")
            print(lines[-1], flush=True)
    (Path(__file__).parent / "results" / "ranges.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
