"""The command line: one verb a recipe, one line for bad input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from jaxdistill._disk import check_name
from jaxdistill._notes import notes_on_stderr
from jaxdistill._signals import Stopped, heard
from jaxdistill.errors import UserError
from jaxdistill.mesh import is_primary
from jaxdistill.recipes.analyze import Analyze, analyze
from jaxdistill.recipes.cache_teacher import CacheTeacher, cache_teacher
from jaxdistill.recipes.cascade import Cascade, cascade
from jaxdistill.recipes.condense import condense
from jaxdistill.recipes.condense_options import Condense
from jaxdistill.recipes.cost import Cost, cost
from jaxdistill.recipes.demo import Demo, demo
from jaxdistill.recipes.distill import Distill, distill
from jaxdistill.recipes.evaluate import TEXT, Evaluate, evaluate
from jaxdistill.recipes.evaluate_set import EvaluateSet, evaluate_set
from jaxdistill.recipes.export import Export, export
from jaxdistill.recipes.generate import Generate, generate
from jaxdistill.recipes.objectives import (
    Objectives,
    objectives,
    objectives_markdown,
    objectives_table,
)
from jaxdistill.recipes.parallel import join_hosts
from jaxdistill.recipes.pilot import Pilot, pilot
from jaxdistill.recipes.plan import Plan, plan
from jaxdistill.recipes.quantize import Quantize, quantize
from jaxdistill.report.table import (
    cascade_sentence,
    cascade_table,
    choices_table,
    comparison_table,
    cost_sentence,
    cost_table,
    plan_table,
    result_table,
    slices_table,
)


def _show_evaluation(out: Console, o: Evaluate, result: dict[str, Any]) -> None:
    if o.data is not None:
        out.print(result_table({o.model: result}))
    if o.choices:
        out.print(choices_table(result["choices"], result["choices_mean"]))
    for name, slices in result.get("slices", {}).items():
        out.print(slices_table(slices, "nll" if name == TEXT else "acc", name))


def _show_cascade(out: Console, _: Cascade, report: dict[str, Any]) -> None:
    out.print(cascade_table(report))
    out.print(cascade_sentence(report), highlight=False)


def _show_cost(out: Console, _: Cost, report: dict[str, Any]) -> None:
    out.print(cost_table(report))
    out.print(cost_sentence(report), highlight=False)


def _show_cache(_: Console, o: CacheTeacher, made: dict[str, Any]) -> None:
    print(
        f"{o.out}: {made['tokens']:,} tokens in {made['bytes'] / 1e6:,.1f} MB, "
        f"{made['bytes_per_token']} bytes a token, {made['kept']:.2%} of the probability kept, "
        f"{made['tokens_per_second']:,.0f} tokens/s"
    )


def _show_objectives(out: Console, o: Objectives, _: Any) -> None:
    if o.markdown:
        print(objectives_markdown(), end="")
    else:
        out.print(objectives_table())


# By verb: its options, what does it, and what shows the result on stdout where the job has not
# shown it on stderr.
_Show = Callable[[Console, Any, Any], None]
_JOBS: dict[str, tuple[type, Callable[[Any], Any], _Show | None]] = {
    "pilot": (Pilot, pilot, None),
    "quantize": (Quantize, quantize, None),
    "distill": (Distill, distill, None),
    "evaluate": (Evaluate, evaluate, _show_evaluation),
    "cascade": (Cascade, cascade, _show_cascade),
    "cost": (Cost, cost, _show_cost),
    "analyze": (Analyze, analyze, None),
    "cache-teacher": (CacheTeacher, cache_teacher, _show_cache),
    "objectives": (Objectives, lambda _: objectives(), _show_objectives),
    "condense": (Condense, condense, None),
    "evaluate-set": (
        EvaluateSet,
        evaluate_set,
        lambda out, _, result: out.print(comparison_table(result["results"])),
    ),
    "plan": (Plan, plan, lambda out, _, report: out.print(plan_table(report))),
    "export": (Export, export, lambda _, __, path: print(path)),
    "generate": (Generate, generate, lambda _, __, text: print(text)),
    "demo": (Demo, demo, None),
}
_PATHS = ("model", "teacher", "student", "data", "eval_data", "mix")  # and all of type Path
VERBS = {verb: options for verb, (options, *_) in _JOBS.items()}


def run(options: Any) -> None:
    """Do what the parsed options ask for; results go to stdout, progress to stderr."""
    for name, value in vars(options).items():
        if isinstance(value, Path) or name in _PATHS:
            for path in value if isinstance(value, tuple) else (value,):
                if path is not None:
                    # Several teachers are separated by commas.
                    text = str(path).replace(",", "/") if name == "teacher" else str(path)
                    check_name(f"--{name.replace('_', '-')}", text)
    if getattr(options, "hosts", None) is not None:
        join_hosts(options.hosts)
        if not is_primary():  # what is said is said once
            sys.stdout = open(os.devnull, "w")
    job, show = next((j, s) for kind, j, s in _JOBS.values() if type(options) is kind)
    result = job(options)
    if getattr(options, "json", False):
        print(json.dumps(result))
    elif show is not None:
        show(Console(), options, result)


def main(arguments: list[str] | None = None) -> None:
    """Parse, run, and exit: 0 done, 2 bad input or a full disk, 130 and 143 stopped by a signal."""
    try:
        with heard("raise"), notes_on_stderr():
            options = tyro.extras.subcommand_cli_from_dict(
                VERBS,  # pyright: ignore[reportArgumentType]
                prog="jaxdistill",
                description="Make language models and their training data smaller: 4-bit "
                "distillation with ov-freeze, and data set distillation, in JAX.",
                args=arguments,
            )
            run(options)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except Stopped as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)
