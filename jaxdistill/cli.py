"""The command line: one verb a recipe, one line for bad input."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import tyro
from rich.console import Console

from jaxdistill._memory import keep_pages
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
from jaxdistill.train.preemption import Stopped, ended_by_sigterm

VERBS = {
    "pilot": Pilot,
    "quantize": Quantize,
    "distill": Distill,
    "evaluate": Evaluate,
    "cascade": Cascade,
    "cost": Cost,
    "analyze": Analyze,
    "cache-teacher": CacheTeacher,
    "objectives": Objectives,
    "condense": Condense,
    "evaluate-set": EvaluateSet,
    "plan": Plan,
    "export": Export,
    "generate": Generate,
    "demo": Demo,
}


def run(options: Any) -> None:
    """Do what the parsed options ask for; results go to stdout, progress to stderr."""
    if getattr(options, "hosts", None) is not None:
        join_hosts(options.hosts)
        if not is_primary():  # what is said is said once
            sys.stdout = open(os.devnull, "w")
    out = Console()
    match options:
        case Pilot():
            report = pilot(options)
            if options.json:
                print(json.dumps(report))
        case Quantize():
            results = quantize(options)
            if options.json:
                print(json.dumps(results))
        case Distill():
            results = distill(options)
            if options.json:
                print(json.dumps(results))
        case Evaluate():
            result = evaluate(options)
            if options.json:
                print(json.dumps(result))
            elif options.data is not None:
                out.print(result_table({options.model: result}))
            if options.choices and not options.json:
                out.print(choices_table(result["choices"], result["choices_mean"]))
            for name, slices in result.get("slices", {}).items() if not options.json else ():
                out.print(slices_table(slices, "nll" if name == TEXT else "acc", name))
        case Cascade():
            report = cascade(options)
            if options.json:
                print(json.dumps(report))
            else:
                out.print(cascade_table(report))
                out.print(cascade_sentence(report), highlight=False)
        case Cost():
            report = cost(options)
            if options.json:
                print(json.dumps(report))
            else:
                out.print(cost_table(report))
                out.print(cost_sentence(report), highlight=False)
        case Analyze():
            report = analyze(options)
            if options.json:
                print(json.dumps(report))
        case CacheTeacher():
            made = cache_teacher(options)
            if options.json:
                print(json.dumps(made))
            else:
                print(
                    f"{options.out}: {made['tokens']:,} tokens in {made['bytes'] / 1e6:,.1f} MB, "
                    f"{made['bytes_per_token']} bytes a token, {made['kept']:.2%} of the "
                    f"probability kept, {made['tokens_per_second']:,.0f} tokens/s"
                )
        case Objectives():
            if options.json:
                print(json.dumps(objectives()))
            elif options.markdown:
                print(objectives_markdown(), end="")
            else:
                out.print(objectives_table())
        case Condense():
            result = condense(options)
            if options.json:
                print(json.dumps(result))
        case EvaluateSet():
            result = evaluate_set(options)
            if options.json:
                print(json.dumps(result))
            else:
                out.print(comparison_table(result["results"]))
        case Plan():
            report = plan(options)
            if options.json:
                print(json.dumps(report))
            else:
                out.print(plan_table(report))
        case Export():
            print(export(options))
        case Generate():
            print(generate(options))
        case Demo():
            report = demo(options)
            if options.json:
                print(json.dumps(report))


def main(arguments: list[str] | None = None) -> None:
    """Parse, run, and exit: 0 done, 2 bad input or a full disk, 130 and 143 stopped by a signal."""
    keep_pages()
    try:
        with ended_by_sigterm():
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
    except KeyboardInterrupt:
        print("interrupted; go on with --resume where the verb has it", file=sys.stderr)
        sys.exit(130)
