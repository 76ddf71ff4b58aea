"""The before-and-after table, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping

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
