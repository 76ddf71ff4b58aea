"""Tables of results, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

_COLUMNS = (
    ("nll", "NLL", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("kl", "KL to teacher", "{:.4f}"),
    ("agreement", "agreement", "{:.2%}"),
    ("bytes", "MB", "{:.1f}"),
)


def _cells(result: Mapping[str, float | int]) -> list[str]:
    cells = []
    for name, _, form in _COLUMNS:
        value = result.get(name)
        scaled = value / 1e6 if name == "bytes" and value is not None else value
        cells.append("" if scaled is None else form.format(scaled))
    return cells


def result_table(results: Mapping[str, Mapping[str, float | int]], title: str = "") -> Table:
    """Lay evaluations out as a terminal table, one row a model."""
    table = Table("model", title=title or None, title_justify="left")
    for _, head, _ in _COLUMNS:
        table.add_column(head, justify="right")
    for name, result in results.items():
        table.add_row(name, *_cells(result))
    return table


def markdown_table(results: Mapping[str, Mapping[str, float | int]]) -> str:
    """Lay evaluations out as a Markdown table, one row a model."""
    heads = ["model", *(head for _, head, _ in _COLUMNS)]
    lines = [heads, ["---"] + ["---:"] * len(_COLUMNS)]
    lines += [[name, *_cells(result)] for name, result in results.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


_CHOICES = (
    ("acc", "accuracy", "{:.1%}"),
    ("acc_norm", "acc_norm", "{:.1%}"),
    ("bits_per_byte", "bits/byte", "{:.3f}"),
    ("items", "items", "{}"),
    ("teacher_acc", "teacher", "{:.1%}"),
    ("retention", "kept", "{:.1%}"),
)


def choices_table(choices: Mapping[str, Mapping[str, Any]], mean: Mapping[str, Any]) -> Table:
    """Lay multiple-choice metrics out, one row a file, and their mean where there are several.

    Columns: accuracy with its standard error, the same by log-likelihood a byte, bits a byte of the
    right choice, questions; beside a teacher its accuracy and the retention, the share kept of it.
    """
    rows = dict(choices) | ({"mean": mean} if len(choices) > 1 else {})
    columns = [column for column in _CHOICES if any(column[0] in row for row in rows.values())]
    table = Table()
    table.add_column("choices", overflow="fold")  # a narrow terminal shall not cut the names
    for _, head, _ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for name, row in rows.items():
        found = {key: (form, row.get(key)) for key, _, form in columns}
        cells = {k: "" if x is None else form.format(x) for k, (form, x) in found.items()}
        if "acc_stderr" in row:
            cells["acc"] += f" ±{row['acc_stderr']:.1%}"
        table.add_row(name, *cells.values(), end_section=name == list(choices)[-1])
    return table


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out what networks reach that were trained on several sets, see ``evaluate-set``.

    One row a training set and architecture: its size, accuracy with its deviation over seeds, the
    share kept of full data's, and the accuracy on each named slice.
    """
    slices = list(dict.fromkeys(name for row in rows for name in row["slices"]))
    table = Table("trained on", "architecture")
    for head in ("examples", "accuracy", "kept", *slices):
        table.add_column(head, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        kept = row.get("retention")
        table.add_row(
            row["name"],
            row["architecture"],
            f"{row['examples']:,}",
            f"{row['mean']:.1%} ±{row['std']:.1%}",
            "" if kept is None else f"{kept:.1%}",
            *("" if s not in row["slices"] else f"{row['slices'][s]:.1%}" for s in slices),
            end_section=rows[min(i + 1, len(rows) - 1)]["architecture"] != row["architecture"],
        )
    return table


def plan_table(report: Mapping[str, Any]) -> Table:
    """Lay out what ``recipes.plan`` returns as a terminal table."""
    title = f"{report['model']} on {report['devices']} x {report['device']} ({report['mesh']})"
    table = Table("a device", title=title, title_justify="left")
    table.add_column("GiB", justify="right")
    for name, value in report["bytes"].items():
        table.add_row(name, f"{value / 2**30:,.2f}")
    table.add_row("memory", f"{report['memory'] / 2**30:,.0f}")
    table.add_row("fits", "yes" if report["fits"] else "no")
    table.add_section()
    table.add_row("PFLOP a step (model)", f"{report['flops']['model'] / 1e15:,.2f}")
    table.add_row(f"tokens/s at {report['mfu']:.0%} MFU", f"{report['tokens_per_second']:,.0f}")
    table.add_row("hours", f"{report['hours']:,.1f}")
    table.add_row("device hours", f"{report['device_hours']:,.1f}")
    if report["cost"] is not None:
        table.add_row("cost", f"{report['cost']:,.0f}")
    return table
