"""List the registered objectives: for the terminal, as JSON, and as the page docs/objectives.md."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import tyro
from rich.console import Group
from rich.table import Table

from jaxdistill.kd.families import registered
from jaxdistill.losses.loss import MEASURED
from jaxdistill.losses.registry import Entry, Kind

_Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
# Each kind's title, the option that takes it, and what it does.
_KINDS: dict[Kind, tuple[str, str, str]] = {
    "divergence": (
        "Divergences",
        "--objective",
        "Compare the next token's distribution, p the teacher's and q the student's, both "
        "`softmax(z / T)`; what compares the two is multiplied by `T^2`.",
    ),
    "states": (
        "Hidden states and attention",
        "--objective",
        "Compare what happens inside a live teacher and the student, layer by layer; terms of the "
        "same sum as the divergences.",
    ),
    "cross_tokenizer": (
        "Across tokenizers",
        "--objective",
        "For a teacher of another vocabulary: both models read one text, each in its own tokens.",
    ),
    "token_weight": (
        "Weights of tokens",
        "--token-weight",
        "Weigh each token by its teachers; the loss becomes the weighted mean.",
    ),
    "mixture": (
        "Mixtures of teachers",
        "--mixture",
        "Make one distribution of several teachers', before the divergence's temperature.",
    ),
    "correction": (
        "Corrections by labels",
        "--correction",
        "Put the teacher right where it contradicts the text, before the divergence sees it.",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objectives:
    """List what --objective, --token-weight, --mixture and --correction accept."""

    json: _Switch = False
    """Print the list as JSON, with formulas, sources and costs."""
    markdown: _Switch = False
    """Print the list as the page docs/objectives.md."""


def _arguments(entry: Entry) -> dict[str, Any]:
    """Return the arguments and their defaults; None where the user must give one."""
    measured = MEASURED.get(entry.name, {})
    return {
        name: measured.get(name) if default is inspect.Parameter.empty else default
        for name, default in entry.arguments.items()
    }


def _written(entry: Entry) -> str:
    """Return the arguments as a user would write them."""
    pairs = _arguments(entry).items()
    return ", ".join(name if value is None else f"{name}={_text(value)}" for name, value in pairs)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _by_kind() -> dict[Kind, list[Entry]]:
    found: dict[Kind, list[Entry]] = {kind: [] for kind in _KINDS}
    for entry in registered().values():
        found[entry.kind].append(entry)
    return {kind: entries for kind, entries in found.items() if entries}


def objectives() -> list[dict[str, Any]]:
    """Return all objectives: name, kind, arguments, summary, formula, source, when, cost."""
    return [
        {
            "name": entry.name,
            "kind": kind,
            "arguments": _arguments(entry),
            "summary": entry.summary,
            "formula": entry.formula,
            "source": entry.source,
            "when": entry.when,
            "cost": entry.cost,
        }
        for kind, entries in _by_kind().items()
        for entry in entries
    ]


def objectives_table() -> Group:
    """Lay the objectives out for the terminal, a table for each kind."""
    tables = []
    for kind, entries in _by_kind().items():
        title, option, _ = _KINDS[kind]
        table = Table(title=f"{title} ({option})", title_justify="left", expand=True)
        table.add_column("name", no_wrap=True)
        table.add_column("arguments", ratio=1)
        table.add_column("when to use it", ratio=2)
        for entry in entries:
            table.add_row(entry.name, _written(entry), entry.when)
        tables.append(table)
    return Group(*tables)


_INTRO = """\
# Objectives

<!-- Written by `jaxdistill objectives --markdown`; change the registry, not this page. -->

What a student may be trained towards. Every entry below is one registered function; the command
line, the Python interface and this page read the same registry.

## How to write one

    jaxdistill distill ... --objective '0.9*jsd:beta=0.1,temperature=2+0.1*ce'

An objective is `NAME`, or `NAME:ARGUMENT=VALUE,ARGUMENT=VALUE`, or a sum of such terms joined by
`+`, each with a weight and `*` in front of it where that is not 1. Names and arguments are those
below; an argument without a value there must be given.

* A number: `jsd:beta=0.1`.
* A ramp, `forward_kl:temperature=4..1`: linear from the first step of the run to the last.
* `taid:t=adaptive`, the default: t moves ahead as fast as the loss falls.
* `cakld:confidence=measured`, the default: the run measures it on the teacher before it starts.

Quote a sum in the shell, for `*` may match files. Weights of tokens, mixtures and corrections take
one `NAME:ARGUMENT=VALUE` each and no ramps. In Python:

    kd_objective(student, teacher, "jsd:beta=0.1+0.1*ce")

Every loss is a sum over the tokens that count, divided by their number (or by the sum of their
weights), never a mean over padding. Costs are what comes on top of both models' forward passes;
the vocabulary head runs in chunks, so that no `[tokens, vocabulary]` array is ever whole.
"""


def objectives_markdown() -> str:
    """Return the page: how to write an objective, then every one by its kind."""
    parts = [_INTRO]
    for kind, entries in _by_kind().items():
        title, option, what = _KINDS[kind]
        parts.append(f"\n## {title}\n\n`{option}`. {what}\n")
        for entry in entries:
            lines = [
                f"* Formula: `{entry.formula}`",
                f"* Source: {entry.source}",
                f"* When: {entry.when}",
                f"* Cost: {entry.cost}",
                f"* Arguments: {f'`{_written(entry)}`' if entry.arguments else 'none'}",
            ]
            what = entry.summary.removeprefix("Return ")
            what = what[0].upper() + what[1:]
            parts.append(f"\n### {entry.name}\n\n{what}\n\n" + "\n".join(lines) + "\n")
    return "".join(parts)
