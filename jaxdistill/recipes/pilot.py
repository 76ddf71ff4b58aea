"""The small first study: is training needed, does it help, for which requests, at what cost?

Quantize; look whether rounding alone is good enough; if not, see what to freeze and train a little;
watch slices; find when the student may answer; count what that costs; end with one page and five
lines of advice.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tyro
from rich.console import Console

from jaxdistill._disk import write_whole
from jaxdistill.errors import UserError
from jaxdistill.evals.choices import Question, load_choices
from jaxdistill.evals.continuation import continuation_questions
from jaxdistill.models.hub import load_model
from jaxdistill.models.json_text import read_object
from jaxdistill.recipes.analyze import Analyze, analyze
from jaxdistill.recipes.cascade import Cascade, cascade
from jaxdistill.recipes.command import command_of
from jaxdistill.recipes.cost import Cost, cost
from jaxdistill.recipes.options import Quantize
from jaxdistill.recipes.pilot_report import report_pilot
from jaxdistill.recipes.prepare import check_length, split_rows
from jaxdistill.recipes.quantize import quantize
from jaxdistill.recipes.run_report import enough, surely
from jaxdistill.recipes.slices import watched
from jaxdistill.train.data import load_rows
from jaxdistill.train.encode import encode_rows
from jaxdistill.train.run_directory import RunDirectory, write_json

_LEAST_QUESTIONS = 16
_LONGER = 25  # times the pilot's steps: the training that it advises, and that costs are of
_NOT_THE_PILOT = ("out", "resume", "json", "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pilot:
    """Run the small first study: PTQ, a short KD-QAT, slices, cascade, cost, and advice."""

    model: str
    """Model: an HF directory, a .gguf file, or a hub name."""
    data: str
    """Text like that which the model will meet: .jsonl[.gz], .txt, .parquet, a directory of such
    files, or a hub data set."""
    out: Path = Path("runs/pilot")
    """Directory of the page, the runs and all results."""
    eval_data: str | None = None
    """Held-out text; without it every 20th row of the data is held out."""
    questions: str | None = None
    """Multiple choice that tells when the student may answer: a .jsonl[.gz] file of {"context",
    "choices", "label"}. By default made of the held-out text: which of four passages follows?"""
    limit: int = 400
    """Questions taken from the start of the file, or made; 0 takes all of a file, and makes as many
    as there can be."""
    max_drop: float = 0.03
    """Accuracy on the questions that the cascade may lose against the teacher alone."""
    confidence: float = 0.9
    """Probability that no more is lost."""
    bits: Literal[2, 3, 4, 8] = 4
    """Bits of a weight of the decoder's linear layers."""
    group_size: Literal["channel"] | int = "channel"
    """Weights that share a scale: all of an output channel, or this many (32, 64, 128)."""
    steps: int = 40
    """Optimizer updates, where training is needed."""
    batch_size: int = 4
    """Rows a step."""
    seq_len: int = 128
    """Tokens a row."""
    lr: float = 1e-4
    """Peak learning rate."""
    eval_tokens: int = 16384
    """Tokens of held-out text that are evaluated; 0 for all."""
    slice: tuple[str, ...] = ("longest:0.35", "rare_words:0.35")
    """Named slices of the held-out text, see `jaxdistill quantize`."""
    samples: int = 3
    """Held-out prompts that teacher, PTQ and student answer."""
    device: str = "h100"
    """Device that costs are counted for, see `jaxdistill cost`."""
    price: float | None = None
    """Price of an hour of it, in any currency."""
    seed: int = 0
    """Order of the data, and of the questions."""
    resume: bool = False
    """Go on with the pilot in --out from its last finished part or checkpoint."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


def pilot(o: Pilot, console: Console | None = None) -> dict[str, Any]:
    """Run the study; return what ``pilot.json`` holds.

    Returns:
        ``trained``, whether training was needed, and ``steps`` of it; ``results`` of the run, see
        ``recipes.distill``; ``analysis``, ``cascade`` (its costs in milliseconds a request) and
        ``cost``, what these jobs return (no analysis where nothing was trained);
        ``made_questions``, whether the questions were made of text; ``advice``, five lines;
        ``seconds``, by part and ``all``.

    Raises:
        UserError: any input is wrong.
        Stopped: a signal came while it trained; ``--resume`` goes on.
    """
    console = console or Console(stderr=True)
    questions = _checked_questions(o)
    known = {k: v for k, v in dataclasses.asdict(o).items() if k not in _NOT_THE_PILOT}
    said = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}
    with RunDirectory(o.out, said, resume=o.resume) as run:
        return _Study(o, console, run.path).run(questions)


class _Study:
    """Do the parts in order; each leaves its result in a file, and is not done twice."""

    def __init__(self, o: Pilot, console: Console, out: Path) -> None:
        self.o, self.console, self.out = o, console, out
        self.seconds: dict[str, float] = {}

    def run(self, questions: list[Question]) -> dict[str, Any]:
        """Do all parts."""
        o, out = self.o, self.out
        ptq = self._part("ptq", "is training needed?", lambda: self._quantize("ptq", steps=0))
        needed = not enough(ptq["ptq"])
        analysis: dict[str, Any] | None = None
        if needed:
            analysis = self._part("analysis", "what should be frozen?", self._analyze)
        patterns = analysis["recommendation"]["patterns"] if analysis else []
        freeze = patterns[0] if patterns else "none"
        results = self._part(
            "run",
            f"{o.steps} steps of training" if needed else "slices and samples",
            lambda: self._quantize(
                "run",
                known=ptq,
                steps=o.steps if needed else 0,
                freeze=freeze,
                slice=o.slice,
                samples=o.samples,
            ),
        )
        trained = _LONGER * o.steps if needed else 0
        spent = _cost(o, freeze=freeze, steps=trained)
        guarded = self._part(
            "cascade", "when may the student answer?", lambda: self._cascade(questions, spent)
        )
        there = guarded["test"]
        spent = _cost(
            o, coverage=there["shares"][0] if there else 0.0, freeze=freeze, steps=trained
        )
        report = {
            "trained": needed,
            "steps": o.steps if needed else 0,
            "made_questions": o.questions is None,
            "results": results,
            "analysis": analysis,
            "cascade": guarded,
            "cost": spent,
            "seconds": self.seconds | {"all": sum(self.seconds.values())},
        }
        given = dataclasses.asdict(o) | {"resume": False, "json": False}
        following = self._next(needed, results, freeze)
        return report_pilot(out, report, command_of(Pilot, given), following, self.console)

    def _next(self, needed: bool, results: dict[str, Any], freeze: str) -> list[str]:
        """Return the command that comes next: export, a longer training, or a gentler one."""
        o = self.o
        if not needed:
            run, name = str(self.out / "run"), "student.gguf"
            return ["jaxdistill", "export", "--run", run, "--format", "gguf", "--out", name]
        helped = surely(results["student"], "ptq", "kl") <= 0
        changes: dict[str, Any] = {"freeze": freeze, "slice": o.slice, "samples": o.samples}
        changes |= {"steps": _LONGER * o.steps} if helped else {"lr": o.lr / 10}
        job = dataclasses.asdict(_job(o, Path("runs/full"), **changes))
        return command_of(Quantize, job)

    def _part(self, name: str, what: str, make: Callable[[], Any]) -> Any:
        """Return a part's result: as it was found before, or made and kept."""
        path = self.out / f"{name}.json"
        if path.is_file():
            found = read_object(path)
        else:
            self.console.print(f"[bold]{name}[/bold]: {what}", highlight=False)
            began = time.perf_counter()
            found = {"result": make(), "seconds": round(time.perf_counter() - began, 1)}
            write_json(path, found)
        self.seconds[name] = found["seconds"]
        return found["result"]

    def _quantize(
        self, name: str, known: dict[str, Any] | None = None, **changes: Any
    ) -> dict[str, Any]:
        began = (self.out / name / "config.json").is_file()
        seen = {k: known[k] for k in ("teacher", "ptq")} if known else None
        job = _job(self.o, self.out / name, resume=began, **changes)
        return dict(quantize(job, self.console, known=seen))

    def _analyze(self) -> dict[str, Any]:
        o = self.o
        size = None if o.group_size == "channel" else o.group_size
        shutil.rmtree(self.out / "analysis", ignore_errors=True)  # one that was cut off
        return analyze(
            Analyze(
                model=o.model,
                data=o.data,
                out=self.out / "analysis",
                bits=o.bits,
                group_size=size,
                batch_size=o.batch_size,
                seq_len=o.seq_len,
            ),
            self.console,
        )

    def _cascade(self, questions: list[Question], spent: dict[str, Any]) -> dict[str, Any]:
        o = self.o
        each = {name: 1e3 * use["seconds_a_request"] for name, use in spent["answers"].items()}
        path = _write_questions(self.out / "questions.jsonl", questions)
        return cascade(
            Cascade(
                student=str(self.out / "run"),
                teacher=o.model,
                data=str(path),
                max_drop=o.max_drop,
                confidence=o.confidence,
                costs=(each["student"], each["teacher"]),
                seed=o.seed,
                out=self.out / "cascade",
            ),
            self.console,
        )


def _job(o: Pilot, out: Path, **changes: Any) -> Quantize:
    """Return a quantization of the pilot's."""
    shared = {f.name for f in dataclasses.fields(Quantize)} - {"out", "json", "resume"}
    same = {k: v for k, v in vars(o).items() if k in shared}
    plain = {"slice": (), "samples": 0, "out": out}
    return Quantize(**(same | plain | changes))  # pyright: ignore[reportArgumentType]


def _cost(o: Pilot, *, coverage: float = 0.0, freeze: str = "none", steps: int) -> dict[str, Any]:
    """Return what a training of so many steps costs, and answering; of the model's shape alone."""
    return cost(
        Cost(
            student=o.model,
            teacher=o.model,
            device=o.device,
            price=o.price,
            student_bits=o.bits,
            group_size=None if o.group_size == "channel" else o.group_size,
            coverage=coverage,
            tokens=float(steps * o.batch_size * o.seq_len),
            seq_len=o.seq_len,
            freeze=freeze,
        )
    )


def _checked_questions(o: Pilot) -> list[Question]:
    """Return the questions, given or made; raise ``UserError`` on anything that is wrong."""
    for name, value in (("max-drop", o.max_drop), ("confidence", o.confidence)):
        if not 0 < value < 1:
            raise UserError(f"--{name} {value} given; accepted: between 0 and 1")
    if o.steps < 1:
        raise UserError(f"--steps {o.steps} given; accepted: 1 or more")
    if o.limit < 0:
        raise UserError(f"--limit {o.limit} given; accepted: 0 or more")
    job = _job(o, o.out, slice=o.slice, samples=o.samples)
    _cost(o, steps=o.steps)
    rows = load_rows(o.data if o.eval_data is None else o.eval_data)
    held = rows if o.eval_data is not None else split_rows(rows, o.data)[1]
    model = load_model(o.model)
    check_length(o.seq_len, model)
    watched(job, held, model)
    if o.questions is not None:
        found = load_choices(o.questions, o.limit)
    else:
        tokenizer = model.text_tokenizer()
        examples = encode_rows(cast(Any, held), tokenizer, add_eos=False)
        texts = [str(tokenizer.decode(e.tokens, skip_special_tokens=True)) for e in examples]
        found = continuation_questions(texts, o.limit, seed=o.seed)
    if len(found) < _LEAST_QUESTIONS:
        where = o.questions or "the held-out text"
        raise UserError(
            f"{where} gives {len(found)} questions; accepted: {_LEAST_QUESTIONS} or more; give "
            "more, or longer held-out text"
        )
    return found


def _write_questions(path: Path, questions: list[Question]) -> Path:
    rows = (
        {"context": q.context, "choices": q.choices, "label": q.label, **q.fields}
        for q in questions
    )
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path
