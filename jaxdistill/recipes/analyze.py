"""Analyse how quantization disturbs a model's signal and gradients, and what to freeze for it.

Load the teacher; post-training-quantize a copy; run both, and the student of a run, on a few
batches; recommend what to freeze; write the figures, pictures and a page.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from jaxdistill._disk import write_whole
from jaxdistill.errors import UserError
from jaxdistill.kd.recommend import Recommendation, recommend_freeze
from jaxdistill.kd.signal import Signal, by_projection, make_signal
from jaxdistill.kd.signal_sums import PROJECTIONS
from jaxdistill.mesh import on_primary
from jaxdistill.models.decoder import Params, Remat
from jaxdistill.models.hub import Model, load_model
from jaxdistill.models.json_text import read_object
from jaxdistill.paths import walk
from jaxdistill.quant.lattice import Ranges
from jaxdistill.quant.measure import clipped_share, flip_rate
from jaxdistill.quant.policy import (
    Policy,
    add_scales,
    fake_quant_activations,
    fake_quant_params,
    quantize_params,
)
from jaxdistill.recipes.options import Quantize, policy_of
from jaxdistill.recipes.parallel import Parallel, parallel
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows
from jaxdistill.recipes.run_report import finished_student
from jaxdistill.report.signal_arrays import arrays_of, labelled, number_of
from jaxdistill.report.signal_page import signal_page
from jaxdistill.report.signal_plots import draw_signal
from jaxdistill.train.data import load_rows
from jaxdistill.train.packing import Packing
from jaxdistill.train.run_directory import write_json

# The options of a run that say what its PTQ is.
_QUANTIZATION = ("bits", "group_size", "ranges", "asymmetric", "learn_ranges", "activation_bits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analyze(Parallel):
    """Analyse where quantization disturbs a model most, and recommend what to freeze."""

    model: str
    """Model to quantize: an HF directory, a .gguf file, or a hub name."""
    data: str
    """Text to run: .jsonl[.gz], .txt, .parquet, a directory of such files, or a hub data set."""
    out: Path
    """Directory of index.html, signal.json and plots/; an earlier analysis there is replaced."""
    run: Path | None = None
    """A finished run of the same model: its student is analysed too, by the run's own options."""
    bits: Literal[2, 3, 4, 8] | None = None
    """Bits of a weight of the decoder's linear layers; 4 without a run."""
    group_size: Literal["channel"] | int | None = None
    """Weights that share a scale: all of an output channel (without a run), or this many."""
    ranges: Ranges | None = None
    """How a scale is chosen, see quantize; mse without a run."""
    eval_tokens: int = 4096
    """Tokens of the text that are run."""
    batch_size: int = 4
    """Rows a batch; a gradient is of one batch, as in a training step."""
    seq_len: int = 256
    """Tokens a row."""
    packing: Packing = "best-fit"
    """How texts share rows, see `jaxdistill quantize`."""
    remat: Remat = "full"
    """What the backward pass makes again, see `jaxdistill quantize`."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


@parallel
def analyze(o: Analyze, console: Console | None = None) -> dict[str, Any]:
    """Run the analysis; return what ``signal.json`` holds, less its arrays.

    Raises:
        UserError: any input is wrong; nothing is written then.
    """
    console = console or Console(stderr=True)
    began = time.perf_counter()
    _check_options(o)
    _check_out(o.out)
    teacher = load_model(o.model).floats()
    job = _job(o)
    policy = policy_of(job, teacher)
    assert policy is not None  # Quantize has no float student
    trained = None if o.run is None else _student(o.run, teacher)
    with console.status("quantizing"):
        student = add_scales(teacher.params, policy)
    packed = pack_rows(
        load_rows(o.data),
        teacher,
        o.seq_len,
        packing=o.packing,
        add_eos=False,
        console=console,
    )
    data = eval_batches_of(packed, o.batch_size, o.eval_tokens)

    with console.status(f"running {len(data)} batches forward and back"):
        signals = _measure(o, teacher, policy, student, trained, data)
    layers = teacher.config.num_layers
    clipped = by_projection(clipped_share(student, policy), layers)
    flips = None
    if trained is not None:
        flips = by_projection(flip_rate(quantize_params(student, policy), trained), layers)
    arrays = arrays_of(signals, clipped, flips)
    advice = recommend_freeze(signals["ptq"])
    report = _report(o, job, signals, advice, began)
    try:
        on_primary(lambda: _write(o, report, arrays, advice), f"write {o.out}")
    except OSError as e:
        raise UserError(
            f"{o.out} cannot be written ({e.strerror or e}); choose another --out"
        ) from None
    _show(o, arrays, advice, report, console)
    return report


def _job(o: Analyze) -> Quantize:
    """Return the quantization that is analysed: a run's own, or what the options ask for."""
    if o.run is None:
        asked = {"bits": o.bits, "group_size": o.group_size, "ranges": o.ranges}
        given: dict[str, Any] = {k: v for k, v in asked.items() if v is not None}
        return Quantize(model=o.model, data=o.data, out=o.out, **given)
    finished_student(o.run)
    try:
        options = read_object(o.run / "config.json")["options"]
        known = {field.name for field in dataclasses.fields(Quantize)}
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in options.items()
        }
        return Quantize(out=o.run, **{k: v for k, v in plain.items() if k in known})
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(
            f"{o.run / 'config.json'} does not hold a run's options; give the --out of a finished "
            "`jaxdistill quantize`"
        ) from None


def _student(run: Path, teacher: Model) -> Params:
    """Return a run's student in the stored form; it must have the teacher's shapes."""
    found = load_model(run)

    def shapes(params: Params) -> dict[str, tuple[int, ...]]:
        leaves = {path.removesuffix("_q"): leaf.shape for path, leaf in walk(params)}
        return {k: v for k, v in leaves.items() if not k.endswith(("_scale", "_zero"))}

    ours, theirs = shapes(teacher.params), shapes(found.params)
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            raise UserError(
                f"the student of {run} has {theirs.get(path)} at {path} and {teacher.source} has "
                f"{ours.get(path)}; give the --model that the run was made from"
            )
    return found.params


def _measure(
    o: Analyze, teacher: Model, policy: Policy, ptq: Params, trained: Params | None, data: list[Any]
) -> dict[str, Signal]:
    options: dict[str, Any] = {
        "activation": fake_quant_activations(policy.activations),
        "remat": o.remat,
    }
    measure = make_signal(teacher.config, transform=fake_quant_params(policy), **options)
    signals = {"ptq": measure(teacher.params, ptq, data)}
    if trained is not None:
        again = make_signal(teacher.config, teacher_gradients=False, **options)
        signals["trained"] = again(teacher.params, trained, data)
    return signals


def _report(
    o: Analyze, job: Quantize, signals: dict[str, Signal], advice: Recommendation, began: float
) -> dict[str, Any]:
    """Return all but the arrays, in the types of JSON."""
    models = [{"name": "float", "nll": number_of(signals["ptq"]["nll/teacher"])}]
    for name, signal in signals.items():
        of_student = {"nll": signal["nll/student"], "kl": signal["kl"]}
        of_student["sqnr"] = signal["sqnr/hidden"]
        models.append({"name": name} | {k: number_of(v) for k, v in of_student.items()})
    said = dataclasses.asdict(advice)
    for standing in said["ranking"]:
        standing |= {name: number_of(standing[name]) for name in ("sqnr", "ratio")}
    return {
        "model": o.model,
        "data": o.data,
        "run": None if o.run is None else str(o.run),
        "quantization": {name: getattr(job, name) for name in _QUANTIZATION},
        "target_tokens": int(signals["ptq"]["tokens"]),
        "batch": [o.batch_size, o.seq_len],
        "models": models,
        "recommendation": said,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _check_options(o: Analyze) -> None:
    for name, least in {"eval_tokens": 1, "batch_size": 1, "seq_len": 2}.items():
        given = getattr(o, name)
        if given < least:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {given} given; accepted: {least} or more")
    asked = [n for n in ("bits", "group_size", "ranges") if getattr(o, n) is not None]
    if o.run is not None and asked:
        flag = asked[0].replace("_", "-")
        raise UserError(f"--{flag} given with --run, which has its own; leave out one of the two")


def _check_out(out: Path) -> None:
    earlier = (out / "signal.json").is_file()
    if out.exists() and not earlier and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no analysis; choose another --out")


def _write(
    o: Analyze, report: dict[str, Any], arrays: dict[str, np.ndarray], advice: Recommendation
) -> None:
    """Write signal.json, plots/ and index.html."""
    pictures, dark = draw_signal(arrays), draw_signal(arrays, "dark")
    q = report["quantization"]
    weights = "per channel" if q["group_size"] == "channel" else f"groups of {q['group_size']}"
    kind = " asymmetric" if q["asymmetric"] else ""
    facts = [
        f"{q['bits']}-bit{kind} weights, {weights}, ranges by {q['ranges']}, rounded to nearest",
        *([] if q["activation_bits"] == "none" else [f"{q['activation_bits']}-bit activations"]),
        f"{report['target_tokens']:,} target tokens of {Path(o.data).name}",
        f"batches of {o.batch_size} rows of {o.seq_len} tokens",
        *([] if o.run is None else [f"beside it the student of {o.run}"]),
    ]
    command = ""
    if advice.patterns and o.run is None:
        command = (
            f"jaxdistill quantize --model {o.model} --bits {q['bits']} --group-size "
            f"{q['group_size']} --ranges {q['ranges']} --freeze '{advice.patterns[0]}' "
            "--data TEXT --out RUN"
        )
    title = Path(o.model).name
    page = signal_page(title, facts, report["models"], arrays, advice, pictures, dark, command)

    plots = o.out / "plots"
    shutil.rmtree(plots, ignore_errors=True)
    plots.mkdir(parents=True)
    for name, picture in pictures.items():
        write_whole(plots / f"{name}.png", picture)
    write_whole(o.out / "index.html", page)
    write_json(
        o.out / "signal.json",
        report | {"projections": list(PROJECTIONS), "arrays": labelled(arrays)},
    )


def _show(
    o: Analyze,
    arrays: dict[str, np.ndarray],
    advice: Recommendation,
    report: dict[str, Any],
    console: Console,
) -> None:
    """Print the ranking, the advice, and where everything lies."""
    table = Table(title="quantization's effect, PTQ", title_justify="left")
    table.add_column("projection", no_wrap=True)
    for head in ("inflation", "x median", "layers above", "SQNR dB", "clipped", "weights"):
        table.add_column(head, justify="right")
    for s in advice.ranking:
        clipped = arrays["ptq/clipped"][:, PROJECTIONS.index(s.projection)].mean()
        table.add_row(
            s.projection,
            f"{s.inflation:.2f}",
            f"{s.ratio:.2f}" if math.isfinite(s.ratio) else "",
            f"{s.layers_above} of {s.layers}",
            f"{s.sqnr:.1f}",
            f"{clipped:.2%}",
            f"{s.weights:.1%}",
            style="bold" if s.frozen else "",
        )
    console.print(table)
    for reason in advice.reasons:
        console.print(reason)
    console.print(f"page: {o.out / 'index.html'}", soft_wrap=True)
    console.print(f"{report['seconds']:.0f} s")
