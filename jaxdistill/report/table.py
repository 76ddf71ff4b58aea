"""Tables of results, for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

Rows = tuple[list[str], list[list[str]]]  # heads, and the rows below them
_COLUMNS = (
    ("nll", "NLL", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("kl", "KL to teacher", "{:.4f}"),
    ("agreement", "agreement", "{:.2%}"),
    ("bytes", "MB", "{:.1f}"),
)


def _cells(result: Mapping[str, Any]) -> list[str]:
    intervals = dict(result.get("intervals", {}))
    if None not in intervals.get("nll", [None]):
        intervals["perplexity"] = [math.exp(min(x, 700.0)) for x in intervals["nll"]]
    cells = []
    for name, _, form in _COLUMNS:
        value = result.get(name)
        scaled = value / 1e6 if name == "bytes" and value is not None else value
        cell = "" if scaled is None else form.format(scaled)
        if cell and None not in intervals.get(name, [None]):
            cell += " ({} to {})".format(*map(form.format, intervals[name]))
        cells.append(cell)
    return cells


def _difference_cells(found: Mapping[str, Sequence[float | None]]) -> list[str]:
    cells = []
    for name, _, form in _COLUMNS:
        signed = form.replace("{:", "{:+")
        values = ["-" if x is None else signed.format(x) for x in found.get(name, ())]
        cells.append("{} ({} to {})".format(*values) if values else "")
    return cells


def result_table(results: Mapping[str, Mapping[str, Any]], title: str = "") -> Table:
    """Lay evaluations out as a terminal table: a row a model, then paired differences."""
    heads, rows = result_rows(results)
    return _shown((heads, [[c.replace(" (", "\n(") for c in row] for row in rows]), title)


def result_rows(results: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Return evaluations as heads and rows of text, intervals with them.

    One row a model; then one for each pair that was compared on the same rows of text.
    """
    heads = ["model", *(head for _, head, _ in _COLUMNS)]
    rows = [[name, *_cells(result)] for name, result in results.items()]
    for name, result in results.items():
        for other, found in result.get("against", {}).items():
            if name == "student" or "student" not in results or other == "teacher":
                rows.append([f"{name} less {other}", *_difference_cells(found)])
    return heads, rows


def markdown_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay evaluations out as a Markdown table, see ``result_rows``."""
    return _markdown(result_rows(results))


def _markdown(rows: Rows) -> str:
    heads, found = rows
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *found]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _shown(rows: Rows, title: str = "") -> Table:
    """Return rows for the terminal, numbers to the right."""
    heads, found = rows
    table = Table(heads[0], title=title or None, title_justify="left")
    for head in heads[1:]:
        table.add_column(head, justify="right")
    for row in found:
        table.add_row(*map(escape, row))
    return table


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


def slice_rows(reports: Mapping[str, Mapping[str, Any]], by: str) -> Rows:
    """Return slices as heads and rows: what each model does, and what compares them.

    Args:
        reports: ``SliceReport.plain`` by name.
        by: the metric shown.
    """
    models = list(dict.fromkeys(m for r in reports.values() for m in r["metrics"]))
    derived = list(dict.fromkeys(d for r in reports.values() for d in r["derived"]))
    heads = ["slice", "items", *(f"{m} {by}" for m in models)]
    rows = []
    for name, report in reports.items():
        shown = [report["metrics"].get(m, {}).get(by) for m in models]
        shown += [report["derived"].get(d) for d in derived]
        known = [x is not None and None not in x for x in shown]
        cells = [
            "{:.3f} ({:.3f} to {:.3f})".format(*x) if k and x is not None else ""
            for x, k in zip(shown, known, strict=True)
        ]
        rows.append([name, str(report["items"]), *cells])
    return [*heads, *(name.replace("_", " ") for name in derived)], rows


def slices_table(reports: Mapping[str, Mapping[str, Any]], by: str, title: str = "") -> Table:
    """Lay slices out for the terminal, see ``slice_rows``."""
    return _shown(slice_rows(reports, by), title)


def slices_markdown(reports: Mapping[str, Mapping[str, Any]], by: str) -> str:
    """Lay the same out as Markdown."""
    heads, rows = slice_rows(reports, by)
    return _markdown(
        (heads, [[" ".join(c.replace("|", "\\|").split()) for c in row] for row in rows])
    )


def cascade_rows(report: Mapping[str, Any]) -> Rows:
    """Return what ``recipes.cascade`` returns as rows: each tier alone, and the cascade."""
    unit = "" if report["unit"] == "given" else f", {report['unit']}"
    rows = [
        [
            f"{name} alone",
            "{:.1%} ({:.1%} to {:.1%})".format(tier["accuracy"], *tier["interval"]),
            f"{tier['cost']:.4g}",
            "",
        ]
        for name, tier in report["alone"].items()
    ]
    if (there := report["test"]) is not None:
        low, high = there["interval"]
        each = zip(report["alone"], there["shares"], strict=True)
        shares = ", ".join(f"{name} {share:.1%}" for name, share in each)
        accuracy = f"{there['accuracy']:.1%} ({low:.1%} to {high:.1%})"
        rows.append(["cascade", accuracy, f"{there['cost']:.4g}", shares])
    return ["test questions", "accuracy", f"cost{unit}", "answered by"], rows


def cascade_table(report: Mapping[str, Any]) -> Table:
    """Lay the same out for the terminal."""
    return _shown(cascade_rows(report))


def cascade_sentence(report: Mapping[str, Any]) -> str:
    """Say what the thresholds of ``recipes.cascade`` promise, or that there are none."""
    target, drop, sure = report["target_accuracy"], report["max_drop"], report["confidence"]
    tiers = list(report["alone"])
    if report["thresholds"] is None:
        best = max(tier["accuracy"] for tier in report["alone"].values())
        wanted = f"{target:.1%}" if drop is None else f"a drop of at most {drop:.1%}"
        said = (
            f"No threshold was found that keeps {wanted} with confidence {sure:.0%}, from the "
            f"careful side on; the best tier alone has {best:.1%} on the test questions. Give more "
        )
        if drop is None:
            return said + (
                "questions, a lower --target-accuracy, or a person (--costs with three numbers)."
            )
        least = math.ceil(math.log(1 - sure) / math.log(1 - drop))
        there = report["questions"]["calibration"]
        return said + f"questions ({there} chose, {least} is the least), or a greater --max-drop."
    parts = [
        f"the {tiers[i]} answers "
        + ("nothing" if t is None else f"where it is at least {t:.2f} sure")
        for i, t in enumerate(report["thresholds"])
    ]
    kept = "the accuracy on such questions is at "
    kept += f"least {target:.1%}" if drop is None else f"most {drop:.1%} below the {tiers[-1]}'s"
    said = "; ".join(parts)
    said = f"{said[0].upper()}{said[1:]}; the rest goes to the {tiers[-1]}."
    return f"{said} With confidence {sure:.0%} {kept}."


def cost_rows(report: Mapping[str, Any]) -> Rows:
    """Return what ``recipes.cost`` returns as rows: training once, and answering all requests."""

    def row(name: str, use: Mapping[str, Any], ms: str) -> list[str]:
        known = [use["flops"] / 1e15, use["bytes"] / 1e12, *(use[k] for k in _COSTS)]
        return [name, *("" if x is None else f"{x:,.4g}" for x in known), ms]

    heads = ["", "PFLOP", "TB read", "device hours", "kWh", "price", "ms a request"]
    answers = report["answers"].items()
    return heads, [
        row("training, once", report["training"], ""),
        *(row(name, use, f"{1e3 * use['seconds_a_request']:,.3g}") for name, use in answers),
    ]


def cost_table(report: Mapping[str, Any]) -> Table:
    """Lay the same out for the terminal."""
    student = report["student"]
    frozen = {"": "all but adapters frozen", "none": "nothing frozen"}.get(
        student["freeze"], f"frozen: {student['freeze']}"
    )
    title = f"{report['requests']:,.0f} requests on {report['device']}"
    return _shown(cost_rows(report), f"{title}; student: {student['weights']}, {frozen}")


_COSTS = ("device_hours", "kwh", "price")


def cost_sentence(report: Mapping[str, Any]) -> str:
    """Say what the cascade of ``recipes.cost`` saves, and when training has paid for itself."""
    large = [name for name, fits in report["fits"].items() if not fits]
    if large:
        return f"The {large[0]} does not fit into one {report['device']}: these figures are void."
    if report["pays_after"] is None:
        return "The cascade takes no less than the teacher alone: its student answers too little."
    said = f"The cascade takes {report['saved']:.1%} fewer device hours than the teacher alone"
    if not report["training"]["flops"]:
        return said + "."
    return said + f", and has saved those of training after {report['pays_after']:,.0f} requests."


def plan_table(report: Mapping[str, Any]) -> Table:
    """Lay out what ``recipes.plan`` returns as a terminal table."""
    title = f"{report['model']} on {report['devices']} x {report['device']} ({report['mesh']})"
    table = Table("a device", title=title, title_justify="left")
    table.add_column("GiB", justify="right")
    table.caption = f"{report['params'] / 1e9:,.2f} B parameters"
    for name, value in report["bytes"].items():
        table.add_row(name, f"{value / 2**30:,.2f}")
    table.add_row("memory", f"{report['memory'] / 2**30:,.0f}")
    table.add_row("fits", "yes" if report["fits"] else "no")
    table.add_section()
    table.add_row("PFLOP a step (model)", f"{report['flops']['model'] / 1e15:,.2f}")
    table.add_row("GB sent a step", f"{sum(report['sent'].values()) / 1e9:,.2f}")
    if not report["fits"]:
        table.add_row("tokens/s", "none: it does not fit")
        return table
    table.add_row(f"tokens/s at {report['mfu']:.0%} MFU", f"{report['tokens_per_second']:,.0f}")
    table.add_row("hours", f"{report['hours']:,.1f}")
    table.add_row("device hours", f"{report['device_hours']:,.1f}")
    if report["cost"] is not None:
        table.add_row("cost", f"{report['cost']:,.0f}")
    return table
