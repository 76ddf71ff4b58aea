"""Does distillation on common text lose a rare slice, is it named, and does ``--mix`` keep it?

SmolLM2-135M-Instruct is quantized to 2 bits in groups of 32 and repaired on TinyStories, twice:
on the stories alone, and with worked sums of GSM8K mixed in. Held out are stories and other sums,
whose column ``kind`` tells the slices. Writes ``results/rare_slices.md``.

    python -m benchmarks.rare_slices
"""

from __future__ import annotations

import gzip
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxdistill._memory import keep_pages
from jaxdistill.recipes.demo import embedded_model
from jaxdistill.recipes.quantize import Quantize, quantize
from jaxdistill.report.table import slices_markdown

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"
STEPS, RATE, HELD = 24, 0.2, (10, 10)  # texts held out: stories, sums


def read(name: str, start: int, stop: int | None) -> list[dict[str, Any]]:
    """Return rows of a file of the shared data."""
    with gzip.open(DATA / name, "rt") as file:
        return [json.loads(line) for line in itertools.islice(file, start, stop)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write rows as JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(start: int, stop: int) -> list[dict[str, Any]]:
    """Return worked sums as plain text."""
    rows = read("instruct/gsm8k_train.jsonl.gz", start, stop)
    return [{"text": f"{r['instruction']}\n{r['output']}", "kind": "sum"} for r in rows]


def main() -> None:
    """Run both jobs and write the table."""
    keep_pages()
    stories = [row | {"kind": "story"} for row in read("text/tinystories_cased.jsonl.gz", 0, None)]
    lines = [
        "# A rare slice, lost and kept\n",
        f"SmolLM2-135M-Instruct, 2 bits in groups of 32, {STEPS} steps of 4 x 128 tokens, "
        f"ov-freeze, on {jax.devices()[0].device_kind}. NLL in nats a token of {HELD[0]} stories "
        f"and {HELD[1]} sums that were held out; 95 % intervals over texts.\n",
    ]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        data = write(where / "stories.jsonl", stories[HELD[0] :])
        held = write(where / "held.jsonl", stories[: HELD[0]] + sums(0, HELD[1]))
        rare = write(where / "sums.jsonl", sums(HELD[1], HELD[1] + 400))
        for name, mix in (("stories alone", ()), (f"with --mix sums:{RATE}", (f"{rare}:{RATE}",))):
            began, out = time.perf_counter(), where / name.replace(" ", "-")
            quantize(
                Quantize(
                    model=embedded_model(),
                    data=data,
                    eval_data=held,
                    out=out,
                    bits=2,
                    group_size=32,
                    steps=STEPS,
                    batch_size=4,
                    seq_len=128,
                    lr=3e-4,
                    slice=("kind",),
                    mix=mix,
                    eval_every=STEPS,
                    signal_every=-1,
                    checkpoint_every=-1,
                    remat="minimal",
                ),
                Console(stderr=True),
            )
            minutes = (time.perf_counter() - began) / 60
            report = json.loads((out / "slices.json").read_text())
            said = [x for x in (out / "README.md").read_text().splitlines() if "lost most" in x]
            lines += [f"## {name} ({minutes:.1f} minutes)\n", slices_markdown(report, "nll")]
            lines += [said[0] + "\n" if said else "No slice surely lost more than the others.\n"]
    (HERE / "results" / "rare_slices.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
