"""Make the table of ``study.py``'s lines: the mean and the spread over seeds, beside plain CE.

python -m benchmarks.kd_families.tables
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.kd_families.study import FAMILIES, OUT, RATE, ROWS, SEQ_LEN, STEPS

# Families of a student of another kind have a cross-entropy row of their own.
_BASELINES = ("4 bits", "LoRA of rank 32", "half of the MLP's width")


def baseline_of(name: str) -> str:
    """Return the row of plain training that a family is compared with."""
    kind = next((b for b in _BASELINES if name.startswith(b)), None)
    return f"{kind}: cross-entropy" if kind else "cross-entropy"


def main() -> None:
    """Write ``README``'s table into ``results/smollm2.md``."""
    found: dict[str, list[dict]] = defaultdict(list)
    for line in OUT.read_text().splitlines():
        row = json.loads(line)
        found[row["family"]].append(row)

    def column(name: str, key: str) -> np.ndarray:
        by_seed = sorted(found[name], key=lambda row: row["seed"])
        return np.array([row["result"][key] for row in by_seed])

    def cell(name: str, key: str, form: str = ".3f", scale: float = 1.0) -> str:
        values = scale * column(name, key)
        spread = f" ± {values.std(ddof=1):{form}}" if len(values) > 1 else ""
        return f"{values.mean():{form}}{spread}"

    lines = [
        f"{STEPS} steps of {ROWS} x {SEQ_LEN} tokens, AdamW at {RATE:g}; mean and standard "
        "deviation over seeds. NLL and KL to the teacher in nats a token, agreement of the "
        "likeliest token, on held-out stories. Better than CE: seeds in which the NLL, and the KL, "
        "is below that of cross-entropy with the same student and seed.\n",
        "| family | objective | seeds | NLL | KL to teacher | agreement % | better than CE |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in ("teacher", "the cut student, untrained", *(f.name for f in FAMILIES)):
        if name not in found:
            continue
        base, beats = baseline_of(name), ""
        if found[name][0]["loss"] and name != base and base in found:
            n = min(len(found[name]), len(found[base]))
            wins = [
                int((column(name, key)[:n] < column(base, key)[:n]).sum()) for key in ("nll", "kl")
            ]
            beats = f"{wins[0]}, {wins[1]} of {n}"
        lines.append(
            f"| {name} | {found[name][0]['loss']} | {len(found[name])} | {cell(name, 'nll')} | "
            f"{cell(name, 'kl')} | {cell(name, 'agreement', '.1f', 100)} | {beats} |"
        )
    path = Path(OUT).with_suffix(".md")
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
