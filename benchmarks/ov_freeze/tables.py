"""The tables and figures of the study, from its results: ``NAME.md``, ``NAME_*.png``.

python -m benchmarks.ov_freeze.tables stories smollm2
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent / "results"
ORDER = ("none", "ov", "v", "o", "qk", "qkv", "mlp", "auto")
Line = dict[str, Any]


def read(name: str) -> tuple[list[Line], list[Line]]:
    """Return (baselines, cells)."""
    lines = [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
    return [x for x in lines if "baseline" in x], [x for x in lines if "lr" in x]


def value(line: Line, text: str, metric: str) -> float:
    """Return a cell's figure, infinite where its weights are not finite."""
    return line["result"][text][metric] if line["result"] else math.inf


def spread(values: list[float], digits: int = 4) -> str:
    """Return ``mean ± standard deviation``, the mean alone of one run, and ``-`` of none."""
    if not values:
        return "-"
    if not np.isfinite(values).all():
        return "not finite"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def chosen(cells: list[Line], **want: Any) -> list[Line]:
    """Return the cells with these settings."""
    return [c for c in cells if all(c[k] == v for k, v in want.items())]


def baseline_table(baselines: list[Line]) -> str:
    """Return teacher and post-training quantization, on both texts."""
    teacher = next(b for b in baselines if b["baseline"] == "teacher")["result"]
    rows = [["float", "", f"{teacher['in']['nll']:.4f}", "", f"{teacher['out']['nll']:.4f}", ""]]
    for line in baselines:
        if line["baseline"] != "teacher":
            r = line["result"]
            figures = [r[text][metric] for text in ("in", "out") for metric in ("nll", "kl")]
            rows.append([line["baseline"], line["group"], *(f"{x:.4f}" for x in figures)])
    heads = ["model", "group", "NLL, in domain", "KL", "NLL, out of domain", "KL"]
    return table(heads, rows)


def grid_table(cells: list[Line], show: Callable[[list[Line]], str]) -> str:
    """Return one row a freeze, one column a learning rate."""
    rates = sorted({c["lr"] for c in cells})
    rows = []
    for freeze in ORDER:
        if found := chosen(cells, freeze=freeze):
            name = freeze
            if freeze == "auto":
                patterns = found[0]["patterns"]
                name = f"auto: {patterns[0].removesuffix('/kernel') if patterns else 'nothing'}"
            rows.append([f"`{name}`", *(show(chosen(found, lr=lr)) for lr in rates)])
    return table(["frozen", *(f"{lr:g}" for lr in rates)], rows)


def trained_range(cells: list[Line], ptq: float) -> str:
    """Return, for each freeze, the rates at which every seed ended below PTQ."""
    rows = []
    for freeze in ORDER:
        found = chosen(cells, freeze=freeze)
        rates = sorted({c["lr"] for c in found})
        good = [lr for lr in rates if all(value(c, "in", "kl") < ptq for c in chosen(found, lr=lr))]
        if found:
            means = {
                lr: np.mean([value(c, "in", "kl") for c in chosen(found, lr=lr)]) for lr in rates
            }
            best = min(means, key=lambda lr: means[lr])
            named = ", ".join(f"{x:g}" for x in good) or "none"
            rows.append([f"`{freeze}`", named, f"{best:g}", f"{means[best]:.4f}"])
    return table(["frozen", "rates that train", "best rate", "KL there"], rows)


def _plot(path: Path, title: str, draw: Callable[[Any], None], **axes_options: Any) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4))
    draw(axes)
    axes.set(title=title, **axes_options)
    axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def figures(name: str, cells: list[Line], ptq: float, group: str) -> None:
    """Draw KL against rate, and gradient norm and KL over training with and without ov-freeze."""
    cells = chosen(cells, group=group, ce_weight=0.0, start="MSE")

    def by_rate(axes: Any) -> None:
        for freeze in ORDER:
            found = chosen(cells, freeze=freeze)
            rates = sorted({c["lr"] for c in found})
            runs = [[value(c, "in", "kl") for c in chosen(found, lr=lr)] for lr in rates]
            if rates:
                means = [np.mean(r) for r in runs]
                error = [np.std(r, ddof=1) if len(r) > 1 else 0 for r in runs]
                axes.errorbar(rates, means, error, marker="o", ms=3, capsize=2, label=freeze)
        axes.axhline(ptq, color="grey", ls="--", label="PTQ (MSE)")
        axes.set_xscale("log")
        axes.set_yscale("log")

    labels = {"xlabel": "peak learning rate", "ylabel": "held-out KL (nats a token)"}
    _plot(HERE / f"{name}_rates.png", f"{name}: in domain, group {group}", by_rate, **labels)

    def curve(metric: str) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            colours = plt.get_cmap("viridis")
            rates = sorted({c["lr"] for c in cells})
            for i, lr in enumerate(rates):
                for freeze, style in (("none", "-"), ("ov", "--")):
                    found = chosen(cells, freeze=freeze, lr=lr)
                    if found:
                        mean = np.mean([c[metric] for c in found], axis=0)
                        axes.plot(
                            np.arange(1, len(mean) + 1),
                            mean,
                            style,
                            color=colours(i / max(1, len(rates) - 1)),
                            lw=1,
                            label=f"{lr:g}, {freeze}",
                        )
            axes.set_yscale("log")

        return draw

    for metric, what in (("grad_norm", "global gradient norm"), ("kl", "training KL")):
        title = f"{name}: {what}; dashed: ov-freeze"
        _plot(HERE / f"{name}_{metric}.png", title, curve(metric), xlabel="step", ylabel=what)


def gradient_table(cells: list[Line]) -> str:
    """Return the median and largest gradient norm over the second half of training."""

    def show(found: list[Line]) -> str:
        halves = [c["grad_norm"][len(c["grad_norm"]) // 2 :] for c in found]
        if not halves or not np.isfinite(halves).all():
            return "-" if not halves else "not finite"
        return f"{np.median(halves):.2f} (to {np.max(halves):.2f})"

    return grid_table([c for c in cells if c["freeze"] in ("none", "ov")], show)


def report(name: str) -> str:
    """Return the Markdown of one study, and draw its figures."""
    baselines, cells = read(name)
    parts = [f"# {name}: tables\n", "## Without training\n", baseline_table(baselines)]
    for group in ("channel", "32"):
        ptq = next(
            b["result"]["in"]["kl"]
            for b in baselines
            if b["baseline"] == "MSE" and b["group"] == group
        )
        plain = chosen(cells, group=group, ce_weight=0.0, start="MSE")
        if not plain:
            continue
        parts += [f"## Group {group}: held-out KL to the teacher, in domain, by peak rate\n"]
        parts += [grid_table(plain, lambda c: spread([value(x, "in", "kl") for x in c]))]
        parts += ["Out of domain:\n"]
        parts += [grid_table(plain, lambda c: spread([value(x, "out", "kl") for x in c]))]
        parts += ["NLL, in domain:\n"]
        parts += [grid_table(plain, lambda c: spread([value(x, "in", "nll") for x in c]))]
        parts += [f"Rates at which every seed ends below PTQ (MSE, KL {ptq:.4f}):\n"]
        parts += [trained_range(plain, ptq)]
        parts += ["Gradient norm in the second half of training, median (and largest):\n"]
        parts += [gradient_table(plain)]
        mixed = chosen(cells, group=group, ce_weight=0.5)
        if mixed:
            parts += ["With cross-entropy as half of the loss; KL in domain, then NLL in domain:\n"]
            parts += [grid_table(mixed, lambda c: spread([value(x, "in", "kl") for x in c]))]
            parts += [grid_table(mixed, lambda c: spread([value(x, "in", "nll") for x in c]))]
        others = [c for c in chosen(cells, group=group, ce_weight=0.0) if c["start"] != "MSE"]
        if others:
            parts += ["From other starts (MSE by p = 3; GPTQ on absmax ranges), one seed:\n"]
            rows = [
                [
                    f"{c['start']}, `{c['freeze']}`, {c['lr']:g}",
                    *(f"{value(c, text, m):.4f}" for text in ("in", "out") for m in ("kl", "nll")),
                ]
                for c in others
            ]
            heads = ["start, frozen, rate", "KL, in domain", "NLL", "KL, out of domain", "NLL"]
            parts += [table(heads, rows)]
        if group == "channel":
            figures(name, cells, ptq, group)
    return "\n".join(parts)


if __name__ == "__main__":
    for study in sys.argv[1:]:
        text = report(study)
        (HERE / f"{study}.md").write_text(text)
        print(text)
