"""What a pilot says when it is done: five lines of advice, pilot.json, and one page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from jaxdistill._disk import write_whole
from jaxdistill.evals.slices import SliceReport, slice_power, slice_warning
from jaxdistill.models.json_text import parse_json, read_object
from jaxdistill.recipes.run_report import BY, facts_of, surely
from jaxdistill.report.run_page import RunPage, run_page
from jaxdistill.report.table import (
    cascade_sentence,
    cascade_table,
    cost_sentence,
    cost_table,
    result_table,
    slices_table,
)
from jaxdistill.train.run_directory import read_metrics, write_json


def report_pilot(
    out: Path,
    report: dict[str, Any],
    command: Sequence[str],
    following: Sequence[str],
    console: Console,
) -> dict[str, Any]:
    """Write pilot.json and index.html, show tables and advice; return the report with ``advice``.

    Args:
        out: the pilot's directory, with its run in ``run``.
        report: see ``recipes.pilot.pilot``.
        command: what makes the pilot again.
        following: the command that is advised next.
        console: where tables and advice go.
    """
    run = out / "run"
    slices = read_object(run / "slices.json") if (run / "slices.json").is_file() else {}
    found = {name: SliceReport.from_plain(plain) for name, plain in slices.items()}
    warning = slice_warning(found, BY)
    report |= {"advice": advice_of(report, warning, slices, following)}
    write_json(out / "pilot.json", report)
    known, pilot = read_object(run / "config.json"), read_object(out / "config.json")
    seconds = report["seconds"]
    page = RunPage(
        title=f"Pilot: {Path(pilot['options']['model']).name} at {pilot['options']['bits']} bits",
        facts=[*facts_of(known["options"]), f"{seconds['all'] / 60:.1f} minutes"],
        advice=report["advice"],
        results=report["results"],
        metrics={"student": read_metrics(run)},
        slices=slices,
        slices_by=BY,
        samples=_list(run / "samples.json"),
        cascade=report["cascade"],
        cost=report["cost"],
        notes={
            "Cascade": (_MADE if report["made_questions"] else "")
            + f"Costs are milliseconds a request on {report['cost']['device']}, see below.",
            "Cost": _TRAINING,
        },
        links={
            "The run: every curve and number of it": "run/index.html",
            **({"What to freeze, and why": "analysis/index.html"} if report["analysis"] else {}),
        },
        command=command,
        options=pilot["options"],
        environment=pilot["environment"],
    )
    write_whole(out / "index.html", run_page(page))
    _show(out, report, slices, console)
    return report


_MADE = (
    "No questions were given, so these were made of the held-out text: which of four passages "
    "follows? They show how the two models differ, not how your users ask, and the promise holds "
    "for other passages of these texts only; give --questions. "
)
_TRAINING = "Training is the longer one that is advised above, not the pilot's own."


def advice_of(
    report: Mapping[str, Any],
    slice_warning: str | None,
    slices: Mapping[str, Any],
    following: Sequence[str],
) -> list[str]:
    """Return five lines: training, freezing, rare cases, the cascade, cost and what next.

    Args:
        report: see ``recipes.pilot.pilot``.
        slice_warning: what names the slice that lost most, if one did.
        slices: ``SliceReport.plain`` of those watched.
        following: the command that comes next.
    """
    results, guarded = report["results"], report["cascade"]
    teacher, ptq, student = (results[name] for name in ("teacher", "ptq", "student"))
    rounding = f"rounding takes perplexity from {teacher['perplexity']:.2f} to "
    rounding += f"{ptq['perplexity']:.2f}"
    change = surely(student, "ptq", "kl")
    if not report["trained"]:
        first = f"No training needed: {rounding}, within 1 %."
    elif change == 0:
        first = (
            f"Rounding alone is not surely good enough ({rounding}), and whether training helps "
            f"cannot be told from so few rows: KL {ptq['kl']:.3f} to {student['kl']:.3f}. Give "
            "more --eval-tokens, or more --steps."
        )
    elif change > 0:
        first = (
            f"Training is needed ({rounding}), and this one did not help: KL {ptq['kl']:.3f} to "
            f"{student['kl']:.3f}. Lower --lr, or give more text."
        )
    else:
        back = student["gap_recovered"]["kl"][0]
        first = (
            f"Training is needed and helps: {rounding}; {report['steps']} steps brought it to "
            f"{student['perplexity']:.2f}, {back:.0%} of the KL to the teacher recovered."
        )
    if report["analysis"] is None:
        second = "Nothing was trained, so nothing has to be frozen."
    else:
        said = report["analysis"]["recommendation"]
        names = " and ".join(said["projections"])
        # Of a freeze the first reason says what, the next ones why; of none the first says why.
        why = said["reasons"][1 if names and len(said["reasons"]) > 1 else 0]
        second = f"Freeze {names}" if names else "Freeze nothing, by the analysis of this model"
        second += f": {why.removeprefix(f'{names}: ')}."
    power = slice_power({n: SliceReport.from_plain(s) for n, s in slices.items()}, BY)
    if slice_warning:
        third = f"Mind the rare cases: {slice_warning}."
    elif slices:
        third = "No watched slice surely lost more than the others"
        third += f", but some are {power} and more --eval-tokens." if power else "."
    else:
        third = "No slice was watched: name your rare cases with --slice."
    fifth = f"{cost_sentence(report['cost'])} The weights are "
    fifth += f"{teacher['bytes'] / 1e6:,.0f} MB before and {student['bytes'] / 1e6:,.0f} after. "
    fifth += f"Next: {shlex.join(following)}"
    fourth = cascade_sentence(guarded)
    fewer, low, high = guarded["student_lost"]
    if low <= 0:
        both = " and ".join(
            f"{guarded['alone'][name]['accuracy']:.1%}" for name in ("student", "teacher")
        )
        fourth += f" On the test questions student and teacher have {both} right"
        fourth += (
            ", the student surely more."
            if high < 0
            else f", and cannot be told apart: {fewer:+.1%} lost ({low:+.1%} to {high:+.1%})."
        )
    return [first, second, third, fourth, fifth]


def _list(path: Path) -> list[Any]:
    return parse_json(path.read_text(encoding="utf-8")) if path.is_file() else []


def _show(out: Path, report: dict[str, Any], slices: dict[str, Any], console: Console) -> None:
    console.print(result_table(report["results"]))
    if slices:
        console.print(slices_table(slices, BY))
    console.print(cascade_table(report["cascade"]))
    console.print(cost_table(report["cost"]))
    for number, line in enumerate(report["advice"], 1):
        console.print(f"{number}. {escape(line)}", highlight=False, soft_wrap=True)
    console.print(f"page: {out / 'index.html'}", soft_wrap=True)
