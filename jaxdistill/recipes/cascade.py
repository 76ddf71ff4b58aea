"""A cascade of student, teacher and person: the threshold that keeps an accuracy, and its cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from jaxdistill.errors import UserError
from jaxdistill.evals.cascade import (
    Operating,
    Tier,
    calibrate,
    choice_confidence,
    coverage_curve,
    outcome,
)
from jaxdistill.evals.cascade_model import SETTINGS, choose
from jaxdistill.evals.choices import Question, load_choices
from jaxdistill.evals.intervals import paired_difference, share_interval
from jaxdistill.models.hub import Model, load_model
from jaxdistill.recipes.cost import weights_of
from jaxdistill.recipes.evaluate import score_files
from jaxdistill.report.cascade_plots import draw_cascade
from jaxdistill.report.theme import write_pictures
from jaxdistill.train.run_directory import write_json

_FILE = "questions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cascade:
    """Find when a small model may answer, and when a large one or a person should."""

    student: str
    """The small model: a run directory, an HF directory, a .gguf file, or a hub name."""
    teacher: str
    """The large model."""
    data: str
    """Questions: a .jsonl[.gz] file of {"context", "choices", "label"}. One part of them chooses
    the threshold, the others tell what it does."""
    target_accuracy: float | None = None
    """Accuracy wanted of the whole, between 0 and 1."""
    max_drop: float | None = None
    """In place of it: accuracy that may be lost against the last tier alone, 0.02 for two of a
    hundred answers. It needs fewer questions, for the models are compared on the same ones."""
    confidence: float = 0.95
    """Probability, over the draw of the questions, that this is kept."""
    signal: Literal["max_probability", "margin", "entropy"] = "max_probability"
    """What a model's confidence is: its choice's probability, that less the next one's, or 1 less
    the entropy over its greatest."""
    by: Literal["acc", "acc_norm"] = "acc"
    """How choices are compared: by log-likelihood, or by log-likelihood a byte."""
    costs: tuple[float, ...] = ()
    """What a question costs by student and teacher, and third, where there is one, by a person, who
    then answers what the teacher is not sure of. By default the gigabytes of weights that a pass
    of each model reads, at its own bits; give measured milliseconds where you have them."""
    person_accuracy: float = 1.0
    """Share of the questions that a person gets right."""
    calibration: float = 0.5
    """Share of the questions that choose the threshold."""
    limit: int = 0
    """Questions taken from the start of the file; 0 takes all."""
    seed: int = 0
    """Of the split, and of the person's mistakes."""
    out: Path | None = None
    """Directory of cascade.json, which `CascadeModel.load` serves, and of plots/."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


def cascade(o: Cascade, console: Console | None = None) -> dict[str, Any]:
    """Return what ``cascade.json`` holds.

    The options; ``questions`` of each part; ``thresholds`` of student and, before a person, teacher
    (null for never), or null where none can be trusted to keep what is wanted; ``unit`` of costs;
    ``calibration`` and ``test``, each ``accuracy``, ``cost`` and ``shares`` of the tiers, of the
    test the exact 95 % interval of the accuracy; ``alone``, accuracy and cost of each tier without
    the others on the test part, with the accuracy's ``interval``; ``student_lost``, how much less
    accurate the student is there than the teacher, with its paired interval; ``curve`` of student
    and teacher there.

    Raises:
        UserError: an option or input is wrong; nothing is written then.
    """
    _check(o)
    questions = load_choices(o.data, o.limit)
    if len(questions) < 4:
        raise UserError(f"{o.data} holds {len(questions)} questions; accepted: 4 or more")
    models = {"student": load_model(o.student), "teacher": load_model(o.teacher)}
    tiers = _tiers(o, models, questions, console)
    order = np.random.default_rng(o.seed).permutation(len(questions))
    cut = min(max(1, round(o.calibration * order.size)), order.size - 1)
    own, test = ([_some(t, part) for t in tiers] for part in (order[:cut], order[cut:]))
    found = calibrate(own, o.target_accuracy, max_drop=o.max_drop, confidence=o.confidence)
    curve = coverage_curve(*test[:2])
    report = {
        "student": _place(o.student),
        "teacher": _place(o.teacher),
        "data": o.data,
        "signal": o.signal,
        "normalized": o.by == "acc_norm",
        "target_accuracy": o.target_accuracy,
        "max_drop": o.max_drop,
        "confidence": o.confidence,
        "questions": {"calibration": cut, "test": order.size - cut},
        "unit": "given" if o.costs else "GB read",
        "thresholds": None if found is None else [_plain(t) for t in found.thresholds],
        "calibration": None if found is None else found.outcome._asdict(),
        "test": None if found is None else _tested(test, found),
        "alone": {t.name: _alone(t) for t in test},
        "student_lost": paired_difference(test[1].correct, test[0].correct).plain(),
        "curve": {name: values.tolist() for name, values in curve._asdict().items()},
    }
    if o.out is not None:
        try:
            o.out.mkdir(parents=True, exist_ok=True)
            write_pictures(o.out / "plots", draw_cascade(report))
            write_json(o.out / SETTINGS, report)
        except OSError as e:
            raise UserError(
                f"{o.out} cannot be written ({e.strerror or e}); choose another --out"
            ) from None
    return report


def _check(o: Cascade) -> None:
    if (o.target_accuracy is None) == (o.max_drop is None):
        raise UserError(
            "neither or both of --target-accuracy and --max-drop given; accepted: one of them"
        )
    shares = {"target-accuracy": o.target_accuracy, "max-drop": o.max_drop}
    shares = {name: value for name, value in shares.items() if value is not None}
    shares |= {"confidence": o.confidence, "calibration": o.calibration}
    for name, value in shares.items():
        if not 0 < value < 1:
            raise UserError(f"--{name} {value} given; accepted: between 0 and 1")
    if len(o.costs) not in (0, 2, 3) or not all(0 <= c < np.inf for c in o.costs):
        raise UserError(
            f"--costs {' '.join(map(str, o.costs))} given; accepted: two, of student and teacher, "
            "or three, of a person too, each 0 or more"
        )
    if not 0 <= o.person_accuracy <= 1 or (o.person_accuracy < 1 and len(o.costs) != 3):
        raise UserError(
            f"--person-accuracy {o.person_accuracy} given with {len(o.costs)} costs; accepted: 0 "
            "to 1, beside three costs"
        )
    for name, value in (("limit", o.limit), ("seed", o.seed)):
        if value < 0:
            raise UserError(f"--{name} {value} given; accepted: 0 or more")
    if o.out is not None and o.out.exists() and not o.out.is_dir():
        raise UserError(f"--out {o.out} is a file; accepted: a directory, new or not")


def _tiers(
    o: Cascade, models: dict[str, Model], questions: list[Question], console: Console | None
) -> list[Tier]:
    """Return what every tier does with every question."""
    scored = score_files(models, {_FILE: questions}, console)
    labels = np.array([q.label for q in questions])
    tiers = []
    sources = (o.student, o.teacher)
    for number, ((name, model), source) in enumerate(zip(models.items(), sources, strict=True)):
        found = scored[name][_FILE].log_likelihoods
        scores = choose(questions, found, normalized=o.by == "acc_norm")
        tiers.append(
            Tier(
                name,
                np.array([np.argmax(s) for s in scores]) == labels,
                o.costs[number] if o.costs else weights_of(source, model.config).read / 1e9,
                choice_confidence(scores)[o.signal],
            )
        )
    if len(o.costs) == 3:
        drawn = np.random.default_rng([o.seed, 1]).random(labels.size)
        tiers.append(Tier("person", drawn < o.person_accuracy, o.costs[2]))
    return tiers


def _alone(tier: Tier) -> dict[str, Any]:
    right = share_interval(int(np.sum(tier.correct)), tier.correct.size)
    return {"accuracy": right.value, "interval": list(right[1:]), "cost": tier.cost}


def _some(tier: Tier, rows: np.ndarray) -> Tier:
    sure = None if tier.confidence is None else tier.confidence[rows]
    return tier._replace(correct=tier.correct[rows], confidence=sure)


def _place(model: str) -> str:
    """Return where a model lies, from wherever it is looked for; a hub name as it is."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _plain(threshold: float) -> float | None:
    return float(threshold) if np.isfinite(threshold) else None


def _tested(test: list[Tier], found: Operating) -> dict[str, Any]:
    there, count = outcome(test, found.thresholds), test[0].correct.size
    interval = share_interval(round(there.accuracy * count), count)
    return there._asdict() | {"interval": list(interval[1:])}
