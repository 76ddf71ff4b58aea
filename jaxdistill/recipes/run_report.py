"""What a quantization run says of itself when it is done: results, warnings, README, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from jaxdistill._disk import write_whole
from jaxdistill.errors import UserError
from jaxdistill.evals.slices import SliceReport, slice_power, slice_warning
from jaxdistill.mesh import on_primary
from jaxdistill.models.json_text import read_object
from jaxdistill.models.quantized import is_quantized
from jaxdistill.report.plots import draw_training
from jaxdistill.report.run_page import RunPage, run_page
from jaxdistill.report.table import (
    markdown_table,
    result_table,
    slices_markdown,
    slices_table,
)
from jaxdistill.report.theme import write_pictures
from jaxdistill.train.packing import Counts
from jaxdistill.train.run_directory import RunDirectory, read_metrics, write_json

Results = dict[str, dict[str, Any]]
Slices = Mapping[str, SliceReport]
BY = "nll"  # the metric that slices are compared by


def check_student(result: Mapping[str, float | int], lr: float) -> None:
    """Raise ``UserError`` where the last update left a student that is not finite."""
    if not math.isfinite(result["nll"]):
        raise UserError(
            f"the student's held-out NLL is {result['nll']} at --lr {lr}; it was not stored; lower "
            "--lr, then start again in another --out"
        )


def warnings_of(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say what the user should hear of the results: no training needed, or training that hurt.

    Nothing is said of a difference that its interval does not tell from none.
    """
    start, student, said = before_training(results), results["student"], []
    label = "ptq" if "ptq" in results else "start"
    name = "PTQ" if label == "ptq" else "the start"
    if enough(start):
        said.append(f"{name} alone is within 1 % of the teacher's perplexity: no training needed")
    by = "kl" if "kl" in student else "nll"
    if surely(student, label, by) > 0:
        said.append(
            f"held-out {by.upper()} ended at {student[by]:.4f}, above {name}'s {start[by]:.4f}: "
            "lower --lr, give more or closer data"
        )
    return said


def enough(start: Mapping[str, Any]) -> bool:
    """Return whether a student is surely within 1 % of its teacher's perplexity before training."""
    high = start.get("against", {}).get("teacher", {}).get("nll", [None])[-1]
    return high is not None and high <= math.log(1.01)


def surely(result: Mapping[str, Any], other: str, by: str) -> int:
    """Return 1 where a loss is surely greater than another evaluation's, -1 where less, else 0."""
    _, low, high = result.get("against", {}).get(other, {}).get(by, [None] * 3)
    return int(low is not None and low > 0) - int(high is not None and high < 0)


def before_training(results: Mapping[str, Mapping[str, float | int]]) -> dict[str, Any]:
    """Return the student's evaluation before training: ``ptq``, or ``start`` of a float one."""
    return dict(results["ptq"] if "ptq" in results else results["start"])


def report_run(
    run: RunDirectory,
    results: Results,
    console: Console,
    title: str,
    slices: Slices | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    command: Sequence[str] = (),
) -> None:
    """Write ``results.json``, the plots, the run's README and its page; show the tables.

    Args:
        run: the directory; it is closed.
        results: label to its evaluation.
        console: where the tables go.
        title: of README and page.
        slices: their report goes to ``slices.json``.
        samples: what models answered, see ``recipes.samples``; they go to ``samples.json``.
        command: what makes the run again.
    """
    plain = {name: report.plain() for name, report in (slices or {}).items()}
    said = warnings_of(results)
    said += [s for tell in (slice_warning, slice_power) if slices and (s := tell(slices, BY))]
    known = read_object(run.path / "config.json")
    page = RunPage(
        title=f"A jaxdistill run: {title}",
        facts=facts_of(known["options"]) + data_facts(run.path / "data.json"),
        warnings=[_sentence(w) for w in said],
        results=results,
        metrics={"student": read_metrics(run.path)},
        slices=plain,
        slices_by=BY,
        samples=samples,
        command=command,
        options=known["options"],
        environment=known["environment"],
    )
    on_primary(lambda: _write(run.path, page, said), f"write {run.path}")
    run.close()
    console.print(result_table(results))
    if plain:
        console.print(slices_table(plain, BY))
    for warning in said:
        console.print(f"[yellow]warning: {escape(warning)}", soft_wrap=True)


def data_facts(path: Path) -> list[str]:
    """Say what became of the texts' tokens, from a run's ``data.json``."""
    names = {"train": "training data", "held_out": "held-out data"}
    found = read_object(path) if path.is_file() else {}
    return [f"{names[k]}: {Counts(**v)}" for k, v in found.items()]


def facts_of(options: Mapping[str, Any]) -> list[str]:
    """Say what a run did in short phrases, from its options."""
    bits, size = options["bits"], options["group_size"]
    kept = "float weights" if bits == "none" else f"{bits}-bit weights"
    return [
        kept + ("" if bits == "none" or size == "channel" else f" in groups of {size}"),
        f"objective {options['objective']}",
        "nothing frozen" if options["freeze"] == "none" else f"frozen: {options['freeze']}",
        f"{options['steps']:,} steps of {options['batch_size']} x {options['seq_len']} tokens",
        f"text of {Path(options['data']).name}",
    ]


def _sentence(warning: str) -> str:
    return warning[:1].upper() + warning[1:].rstrip(".") + "."


def gap_lines(student: Mapping[str, Any], name: str) -> list[str]:
    """Say how much of the gap to the teacher was closed, or why that has no number."""
    lines = []
    for metric, gap in student.get("gap_recovered", {}).items():
        text = f"Share of {name}'s {metric.upper()} gap to the teacher recovered: "
        lines.append(
            f"{text}-, because {name} and teacher cannot be told apart on these rows.\n"
            if gap is None
            else text + "{:.1%} ({:.1%} to {:.1%}).\n".format(*gap)
        )
    return lines


def _write(run: Path, page: RunPage, said: list[str]) -> None:
    """Write what ``report_run`` says."""
    results, slices = dict(page.results), page.slices
    write_json(run / "results.json", results)
    if slices:
        write_json(run / "slices.json", slices)
    if page.samples:
        write_json(run / "samples.json", list(page.samples))
    if any(page.metrics.values()):
        write_pictures(run / "plots", draw_training(page.metrics, results))
    write_whole(run / "index.html", run_page(page))
    student, gap = results["student"], []
    if "kl" in student:
        name = "PTQ" if "ptq" in results else "the start"
        gap = gap_lines(student, name)
    lines = [
        f"# {page.title}\n",
        markdown_table(results),
        *gap,
        *([f"By slice, with 95 % intervals:\n\n{slices_markdown(slices, BY)}"] if slices else []),
        *(f"Warning: {w}.\n" for w in said),
        "| file | what it is |\n| --- | --- |\n"
        "| index.html | all of this as one page, for a browser |\n"
        "| config.json | every option, and the versions it ran on |\n"
        "| metrics.jsonl, tensorboard/ | every step's loss, KL, agreement, speed |\n"
        "| plots/ | loss, KL and recovered gap |\n"
        "| checkpoints/ | training states, for `--resume` |\n"
        "| student/ | the student: weights (integers and scales, or float), tokenizer |\n"
        "| results.json | the first table above |\n"
        + ("| slices.json | every metric of every slice, with intervals |\n" if slices else "")
        + ("| samples.json | answers side by side |\n" if page.samples else ""),
        "Use it: `jaxdistill generate --model DIR --prompt ...`, `jaxdistill evaluate --model DIR "
        "--data ...`, and a quantized one: `jaxdistill export --run DIR --format gguf --out "
        "model.gguf`.\n",
    ]
    write_whole(run / "README.md", "\n".join(lines))


def finished_student(run: Path) -> Path:
    """Return a run's student directory; raise ``UserError`` where the run has none."""
    student = run / "student"
    if (student / "config.json").is_file() and not is_quantized(student):
        raise UserError(
            f"the student of {run} is a float model, and is no export needed: {student} is a "
            "Hugging Face directory; give a run with --bits to export integers"
        )
    if not is_quantized(student):
        raise UserError(
            f"{run} holds no finished student; give the --out of a finished `jaxdistill quantize`, "
            "or finish it with --resume"
        )
    return student
