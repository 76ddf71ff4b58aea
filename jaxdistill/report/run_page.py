"""The page of a run: what was done, what came of it, and how to do it again, as one HTML file."""

from __future__ import annotations

import dataclasses
import html
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdistill.report.cascade_plots import draw_cascade
from jaxdistill.report.html import document, figure, paragraphs, table
from jaxdistill.report.plots import Evaluations, Rows, draw_training
from jaxdistill.report.slice_plots import draw_slices
from jaxdistill.report.table import (
    cascade_rows,
    cascade_sentence,
    cost_rows,
    cost_sentence,
    result_rows,
    slice_rows,
)
from jaxdistill.report.theme import Theme, in_both

_CAPTIONS = {
    "loss": "What training made smaller, step by step, on the batches it trained on.",
    "kl": "How far the student's answers are from the teacher's: on the batches trained on, and on "
    "a small probe of held-out text. The dashed line is where rounding alone left it.",
    "recovered": "100 % is the teacher. What rounding lost and training brought back, by the "
    "divergence from the teacher and by the loss on the text itself.",
    "slices": "A dot is a model on one slice, its line the 95 % interval: wide where "
    "there are few texts.",
    "coverage": "From right to left the student must be surer to answer. The line of both is what "
    "a user sees; the star is the threshold chosen, measured on questions that did not choose it.",
    "cost": "The same, against what a question costs.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPage:
    """Hold all that a run's page shows; what is left empty has no section.

    Attributes:
        title: of the page.
        facts: what was done, short phrases.
        advice: what to do, a line each, shown first.
        warnings: a line each.
        results: label to its evaluation, see ``draw_training``.
        metrics: label to the rows of its ``metrics.jsonl``.
        slices: ``SliceReport.plain`` by slice.
        slices_by: the metric that slices are compared by.
        samples: prompts and, by model, what it answered.
        cascade: what ``recipes.cascade`` returns.
        cost: what ``recipes.cost`` returns.
        notes: by the title of a section, a line that stands under it.
        links: other pages, name to place.
        command: what makes the run again.
        options: of the run, by name.
        environment: of the run, see ``RunDirectory``.
    """

    title: str
    facts: Sequence[str] = ()
    advice: Sequence[str] = ()
    warnings: Sequence[str] = ()
    results: Evaluations = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Rows] = dataclasses.field(default_factory=dict)
    slices: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    slices_by: str = "nll"
    samples: Sequence[Mapping[str, Any]] = ()
    cascade: Mapping[str, Any] | None = None
    cost: Mapping[str, Any] | None = None
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    links: Mapping[str, str] = dataclasses.field(default_factory=dict)
    command: Sequence[str] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run_page(run: RunPage) -> str:
    """Lay a run out as one HTML document that needs no other file and no network."""
    facts = " &middot; ".join(html.escape(fact) for fact in run.facts)
    parts = [
        f"<h1>{html.escape(run.title)}</h1>",
        f'<p class="quiet">{facts}</p>' if facts else "",
        _advice(run.advice),
        _warnings(run.warnings),
    ]
    sections: dict[str, Callable[[RunPage], str]] = {
        "Before and after": _results,
        "Training": _training,
        "Slices": _slices,
        "Side by side": _samples,
        "Cascade": _cascade,
        "Cost": _cost,
        "How to do it again": _again,
    }
    for title, section in sections.items():
        if body := section(run):
            note = run.notes.get(title)
            parts += [f"<h2>{title}</h2>", paragraphs([note], "quiet") if note else "", body]
    return document(run.title, parts)


def _advice(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f'<section class="card verdict"><h2>What to do</h2><ol>{items}</ol></section>'


def _warnings(lines: Sequence[str]) -> str:
    return "".join(
        f'<div class="card note"><strong>Warning.</strong> {html.escape(line)}</div>'
        for line in lines
    )


def _results(run: RunPage) -> str:
    if not run.results:
        return ""
    said = (
        "On held-out text, with 95 % intervals over its rows; differences are of the same rows. "
        "NLL and KL are nats a token; perplexity is e to the NLL; agreement is "
        "the share of places where the likeliest next token is the teacher's; MB are the weights "
        "as stored."
    )
    return table(*result_rows(run.results)) + paragraphs([said], "quiet")


def _pictures(draw: Callable[[Theme], dict[str, bytes]]) -> str:
    made = [figure(name, *both, _CAPTIONS[name]) for name, both in in_both(draw).items()]
    return f'<div class="pictures">{"".join(made)}</div>'


def _training(run: RunPage) -> str:
    if not any(run.metrics.values()):
        return ""
    return _pictures(lambda theme: draw_training(run.metrics, run.results, theme))


def _slices(run: RunPage) -> str:
    if not run.slices:
        return ""
    said = (
        "Each cell is a value and its 95 % interval over the texts. Lost: how much "
        "worse the student is than the teacher. Excess: how much more was lost than on all other "
        "texts, its interval widened for the number of slices; one that is above 0 names a "
        "slice that distillation treats worse than the rest."
    )
    drawn = _pictures(lambda theme: draw_slices(run.slices, run.slices_by, theme))
    return drawn + table(*slice_rows(run.slices, run.slices_by)) + paragraphs([said], "quiet")


def _samples(run: RunPage) -> str:
    made = []
    for sample in run.samples:
        answers = "".join(
            f'<div class="card"><h3>{html.escape(name)}</h3>'
            f"<p>{html.escape(text.strip())}</p></div>"
            for name, text in sample["answers"].items()
        )
        prompt = html.escape(sample["prompt"])
        made.append(f'<pre>{prompt}</pre><div class="beside">{answers}</div>')
    return "".join(made)


def _cascade(run: RunPage) -> str:
    if run.cascade is None:
        return ""
    report = run.cascade
    counts = report["questions"]
    said = (
        f"{counts['calibration']} questions chose the threshold, {counts['test']} others tell what "
        "it does; the interval is the exact 95 % one."
    )
    return (
        paragraphs([cascade_sentence(report)])
        + _pictures(lambda theme: draw_cascade(report, theme))
        + table(*cascade_rows(report))
        + paragraphs([said], "quiet")
    )


def _cost(run: RunPage) -> str:
    if run.cost is None:
        return ""
    report = run.cost
    formulas = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>"
        for name, text in report["formulas"].items()
    )
    said = f"{report['requests']:,.0f} requests on {report['device']}: estimates, not measurements."
    return (
        paragraphs([said, cost_sentence(report)])
        + table(*cost_rows(report))
        + f"<details><summary>How each figure was made</summary><dl>{formulas}</dl></details>"
    )


def _again(run: RunPage) -> str:
    parts = []
    if run.command:
        parts.append(f"<pre><code>{html.escape(shlex.join(run.command))}</code></pre>")
    if run.links:
        links = (
            f'<li><a href="{html.escape(place)}">{html.escape(name)}</a></li>'
            for name, place in run.links.items()
        )
        parts.append(f"<ul>{''.join(links)}</ul>")
    given = {name: str(value) for name, value in run.options.items()}
    found = {k: v for k, v in run.environment.items() if k != "packages"}
    found |= run.environment.get("packages", {})
    for title, rows in (("Every option", given), ("Made with", found)):
        if rows:
            lines = [(str(k), str(v)) for k, v in rows.items()]
            body = table(("name", "value"), lines)
            parts.append(f"<details><summary>{title}</summary>{body}</details>")
    return "".join(parts)
