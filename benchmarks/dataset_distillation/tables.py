"""Make the tables of ``results`` from what the studies stored.

python -m benchmarks.dataset_distillation.tables
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dataset_distillation.study import METHODS, stored

RESULTS = Path(__file__).parent / "results"
TITLES = {
    "ag_news": "AG News, four classes, SmolLM2's features",
    "sst2": "SST-2, two classes, SmolLM2's features",
    "digits": "scikit-learn's digits, ten classes, 8x8 pixels",
}


def percent(values: Iterable[float]) -> str:
    """Return mean and deviation in percent."""
    found = 100 * np.asarray(list(values))
    spread = f" ± {found.std(ddof=1):.1f}" if len(found) > 1 else ""
    return f"{found.mean():.1f}{spread}"


def rows_of(cells: dict[str, Any], start: str, network: str, what: str) -> list[list[float]]:
    """Return the accuracies of each cell of a method, one a network."""
    picked = [v for k, v in cells.items() if k.rpartition("-")[0] == start and what in v]
    return [cell[what][network] for cell in picked]


def selection_table(cells: dict[str, Any], name: str) -> str:
    """Return a problem's table: methods by examples a class, for each kind of network."""
    full = cells[f"{name}-full"]["accuracies"]
    numbers = sorted(
        {int(k.split("-")[1]) for k in cells if k.startswith(f"{name}-") and "full" not in k}
    )
    lines = [f"## {TITLES[name]}", ""]
    for network in full:
        lines += [f"Trained: {network}. Full data: {percent(full[network])} %.", ""]
        heads = " | ".join(f"{n} a class | of full" for n in numbers)
        lines += [f"| method | {heads} |", "| --- |" + " ---: | ---: |" * len(numbers)]
        for method in METHODS:
            for what, said in (("accuracies", method), ("as_text", f"{method}, nearest real text")):
                parts, any_ = [], False
                for n in numbers:
                    found = rows_of(cells, f"{name}-{n}-{method}", network, what)
                    any_ |= bool(found)
                    flat = [x for cell in found for x in cell]
                    kept = f"{100 * np.mean(flat) / np.mean(full[network]):.1f} %" if flat else ""
                    parts += [percent(np.mean(c) for c in found) if flat else "", kept]
                if any_:
                    lines.append(f"| {said} | {' | '.join(parts)} |")
        lines.append("")
    return "\n".join(lines)


def slices_table(cells: dict[str, Any]) -> str:
    """Return the accuracy on named rare cases with and without their quota."""
    lines = []
    for name in TITLES:
        quota = [k for k in cells if k.startswith(f"{name}-") and k.endswith("-quota")]
        if not quota:
            continue
        full = cells[f"{name}-full"]["slices"]
        for network in full:
            for slice_, whole in full[network].items():
                lines += [
                    f"Slice `{slice_}` of {name}, {network}, 5 a class: full data's accuracy on it "
                    f"{100 * whole:.1f} %.",
                    "",
                ]
                lines += [
                    "| set | on the slice | retention | on all |",
                    "| --- | ---: | ---: | ---: |",
                ]
                for method in ("random", "meta-gradient"):
                    for kind, said in (("", "without"), ("-quota", "with")):
                        seeds = [
                            cells[k]
                            for s in range(3)
                            if (k := f"{name}-5-{method}-{s}{kind}") in cells
                        ]
                        recall = [cell["slices"][network][slice_] for cell in seeds]
                        accuracy = [np.mean(cell["accuracies"][network]) for cell in seeds]
                        kept = 100 * np.mean(recall) / whole
                        lines.append(
                            f"| {method}, {said} quota | {percent(recall)} | {kept:.1f} % | "
                            f"{percent(accuracy)} |"
                        )
                lines.append("")
    return "\n".join(["## Rare cases kept by quota", "", *lines])


def text_table(found: dict[str, Any]) -> str:
    """Return embeddings beside text."""
    full = np.mean(found["full"]["accuracies"])
    lines = ["## Embeddings and text: AG News, a small transformer, 5 a class", ""]
    lines += [f"Full data: {percent(found['full']['accuracies'])} %.", ""]
    lines += ["| set | accuracy | of full |", "| --- | ---: | ---: |"]
    names = dict.fromkeys(k.rpartition("-")[0] for k in found if k != "full")
    for name in names:
        seeds = [np.mean(v["accuracies"]) for k, v in found.items() if k.rpartition("-")[0] == name]
        lines.append(f"| {name} | {percent(seeds)} | {100 * np.mean(seeds) / full:.1f} % |")
    lines += ["", "What the first examples of seed 0 became:", ""]
    for name in names:
        texts = found.get(f"{name}-0", {}).get("texts", [])[:2]
        lines += [f"- {name}: `{' '.join(text.split())[:160]}`" for text in texts]
    return "\n".join([*lines, ""])


def language_table(found: dict[str, Any]) -> str:
    """Return distillation of a language model on real and on condensed rows."""
    lines = ["## Language model: eight rows of 64 tokens, 20 steps, stories260K's students", ""]
    for student in dict.fromkeys(k.rpartition("-")[0] for k in found):
        seeds = [v for k, v in found.items() if k.rpartition("-")[0] == student]
        lines += [f"Student: {student}, {len(seeds)} seeds.", ""]
        lines += ["| trained on | KL to the teacher | NLL |", "| --- | ---: | ---: |"]
        for name in (k for k in seeds[0] if k != "seconds"):
            cells = []
            for what in ("kl", "nll"):
                values = np.asarray([seed[name][what] for seed in seeds])
                spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.4f}{spread}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Write ``results/tables.md``."""
    cells = stored()
    parts = ["# Data set distillation: tables", ""]
    parts += [selection_table(cells, name) for name in TITLES if f"{name}-full" in cells]
    parts.append(slices_table(cells))
    for name, make in (("text_level", text_table), ("language", language_table)):
        file = RESULTS / f"{name}.json"
        if file.is_file():
            parts.append(make(json.loads(file.read_text())))
    (RESULTS / "tables.md").write_text("\n".join(parts).rstrip() + "\n")


if __name__ == "__main__":
    main()
