"""What does calibration give? Post-training quantization of SmolLM2-135M to 4 bits, no training.

Rounding to nearest, GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978), calibrated on Python's
documentation and evaluated on topics held out of it (every 8th). Seconds are of the method alone,
compilation included; CPU seconds count what this process used, whatever else the machine did.
Writes ``results/ptq.md``, row by row.

    python benchmarks/ptq.py
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import jax

import jaxdistill as jd
from jaxdistill.recipes.calibrate import calibrated
from jaxdistill.recipes.demo import embedded_model, write_text
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows
from jaxdistill.train.data import load_rows

SEQ_LEN, ROWS, EVAL_TOKENS = 512, 16, 8192
CASES = (
    ("rounding to nearest", "absmax", {}),
    ("rounding to nearest", "mse", {}),
    ("GPTQ", "absmax", {"method": "gptq"}),
    ("AWQ", "mse", {"method": "awq"}),
)


def main() -> None:
    """Quantize in every way, evaluate, and write the table."""
    teacher = jd.load_model(embedded_model())
    with tempfile.TemporaryDirectory() as folder:
        packed, held_out = (
            pack_rows(load_rows(str(path)), teacher, SEQ_LEN, add_eos=False)
            for path in write_text(Path(folder))
        )
    apart = len(packed) // ROWS  # rows from all over the text
    text = [packed[slice(i * apart, (i + 4) * apart, apart)] for i in range(0, ROWS, 4)]
    held = eval_batches_of(held_out, 4, EVAL_TOKENS)
    apply = jd.make_apply(teacher.config, transform=jd.dequantize_params)
    evaluate = jd.make_evaluator(jd.kd_objective(apply, jd.make_apply(teacher.config)))
    head = [
        "# Post-training quantization with and without calibration\n",
        f"SmolLM2-135M-Instruct, 4-bit, no training. Calibrated on {ROWS} x {SEQ_LEN} tokens of "
        f"Python's documentation, evaluated on {EVAL_TOKENS} tokens of topics held out of it. "
        f"Seconds on {os.cpu_count()} cores that were shared with other work.\n",
        "| group | method | ranges | NLL | KL to teacher | agreement | seconds | CPU seconds |\n"
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows: dict[int | None, list[str]] = {None: [], 32: []}
    for name, ranges, options in CASES:
        for group_size, written in rows.items():
            spec = jd.QuantSpec(bits=4, group_size=group_size, ranges=ranges)
            policy = jd.default_policy(spec, tied=True)
            wall, cpu = time.perf_counter(), time.process_time()
            params = (
                calibrated(teacher, policy, text, **options)
                if options
                else jd.add_scales(teacher.params, policy)
            )
            jax.block_until_ready(params)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            found = evaluate(jd.quantize_params(params, policy), teacher.params, held)
            written.append(
                f"| {group_size or 'channel'} | {name} | {ranges} | {found['nll']:.4f} | "
                f"{found['kl']:.4f} | {found['agreement']:.1%} | {wall:.0f} | {cpu:.0f} |"
            )
            print(written[-1], flush=True)
            table = "\n".join([*head, *rows[None], *rows[32]]) + "\n"
            (Path(__file__).parent / "results" / "ptq.md").write_text(table)


if __name__ == "__main__":
    main()
