"""Evaluate a model on text and on multiple choice, alone or beside a teacher."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from jaxdistill._progress import ItemProgress
from jaxdistill.errors import UserError
from jaxdistill.evals.choices import (
    ChoiceScores,
    Question,
    choice_sums,
    choices_name,
    load_choices,
    score_choices,
)
from jaxdistill.evals.perplexity import make_evaluator, make_row_evaluator
from jaxdistill.evals.slices import report_slices
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.hub import Model, check_same_vocabulary, load_model
from jaxdistill.recipes.parallel import Parallel, parallel
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows
from jaxdistill.recipes.slices import Texts, masks_of, of_questions
from jaxdistill.train.data import load_rows
from jaxdistill.train.packing import Packing
from jaxdistill.train.slices import described

TEXT = "text"  # the name of --data among what has slices
Scored = dict[str, dict[str, ChoiceScores]]  # by model and file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Parallel):
    """Evaluate a model on text, on multiple choice, or both, alone or against a teacher."""

    model: str
    """Model: a run directory, an HF directory, a .gguf file, or a hub name."""
    data: str | None = None
    """Text: .jsonl[.gz], .txt, .parquet, a directory of such files, or a hub data set."""
    choices: tuple[str, ...] = ()
    """Multiple choice: .jsonl[.gz] files of {"context", "choices", "label"}, scored by
    log-likelihood."""
    limit: int = 0
    """Questions taken from the start of each file of choices; 0 takes all."""
    teacher: str | None = None
    """Model to compare with: adds kl (nats a token) and agreement (share of equal argmax) on text,
    its accuracy and the retention (accuracy / teacher's accuracy) on choices."""
    seq_len: int = 512
    """Tokens a row of text."""
    batch_size: int = 8
    """Rows a batch of text."""
    packing: Packing = "best-fit"
    """How texts share rows: best-fit keeps each whole where it fits, wrap cuts one stream at every
    row's end, none gives each a row."""
    loss_on: Literal["all", "completion"] = "all"
    """Tokens that count: all, or the answers of chat rows alone."""
    slice: tuple[str, ...] = ()
    """Named slices that are judged one by one: a column, NAME=REGEX over the text, longest:SHARE,
    rare_words:SHARE or rare_labels:SHARE, as in longest:0.1."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


def _check(o: Evaluate) -> None:
    """Raise ``UserError`` on options that do not fit; from ``__post_init__`` tyro would box it."""
    if o.data is None and not o.choices:
        raise UserError("neither --data nor --choices given; accepted: one of them, or both")
    if o.limit < 0:
        raise UserError(f"--limit {o.limit} given; accepted: 0 (all) or more")
    seen: dict[str, str] = {}
    for path in o.choices:
        name = choices_name(path)
        if name in seen:
            raise UserError(
                f"--choices {seen[name]} and {path} have one name, {name!r}, in the results; "
                "accepted: files of different names; rename one"
            )
        seen[name] = path


@parallel
def evaluate(o: Evaluate, console: Console | None = None) -> dict[str, Any]:
    """Return what ``--json`` prints.

    With ``data``: ``nll``, ``perplexity``, ``tokens``, and with a teacher ``kl`` and ``agreement``.
    With ``choices``: ``choices``, by file name the metrics of ``evals.choices.choice_metrics``, and
    ``choices_mean``, the plain mean of each over the files (``items`` is their sum); with a teacher
    also ``teacher_acc`` and ``retention`` (``acc / teacher_acc``; of the two means, in the mean;
    None where the teacher has none right). With ``slice``: ``slices``, by ``text`` or file name and
    slice what ``evals.slices.SliceReport`` holds; the model is the ``student`` there.
    """
    _check(o)
    questions = {choices_name(path): load_choices(path, o.limit) for path in o.choices}
    rows: Any = None if o.data is None else load_rows(o.data)
    masks = masks_of(_described(o, rows, questions), o.slice) if o.slice else {}
    model = load_model(o.model)
    teacher = None if o.teacher is None else load_model(o.teacher)
    result: dict[str, Any] = {}
    if rows is not None:
        shared = None if teacher is None else check_same_vocabulary(teacher, model)
        packed = pack_rows(
            rows,
            model,
            o.seq_len,
            o.loss_on,
            o.packing,
            add_eos=False,
            console=console or Console(stderr=True),
        )
        own, guide = model.apply_fn(), None if teacher is None else teacher.apply_fn()
        score = functools.partial(kd_objective, vocab_size=shared)
        result |= make_evaluator(score(own, guide))(
            model.params,
            None if teacher is None else teacher.params,
            eval_batches_of(packed, o.batch_size),
        )
        if masks:
            texts = Texts(rows, model, o.seq_len, o.loss_on, o.batch_size)
            taught = None if teacher is None else teacher.params
            by_row = make_row_evaluator(score(own, guide, by_row=True))
            sums = {"student": texts.sums(by_row, model.params, taught)}
            if teacher is not None:
                alone = make_row_evaluator(score(teacher.apply_fn(), by_row=True))
                sums["teacher"] = texts.sums(alone, teacher.params, None)
            found = report_slices(sums, masks[TEXT], by="nll")
            result["slices"] = {TEXT: {name: report.plain() for name, report in found.items()}}
    if questions:
        models = {"student": model} if teacher is None else {"student": model, "teacher": teacher}
        scored = score_files(models, questions, console)
        result |= choices_result(scored)
        for name, asked in questions.items() if masks else ():
            sums = {m: choice_sums(asked, of[name].log_likelihoods) for m, of in scored.items()}
            found = report_slices(sums, masks[name], by="acc")
            plain = {name: report.plain() for name, report in found.items()}
            result.setdefault("slices", {})[name] = plain
    return result


def _described(o: Evaluate, rows: Any, questions: dict[str, list[Question]]) -> dict[str, Any]:
    """Return what is known of all that is evaluated, by its name in the results."""
    texts = {} if rows is None else {TEXT: described(rows, o.data or "")}
    return texts | {name: of_questions(asked, name) for name, asked in questions.items()}


def score_files(
    models: Mapping[str, Model],
    questions: Mapping[str, list[Question]],
    console: Console | None = None,
) -> Scored:
    """Return every model's log-likelihoods of every file's choices, and its metrics.

    Vocabularies may differ: each model reads the text with its own tokenizer. Progress goes to
    ``console``, by default stderr.
    """
    scored: Scored = {}
    with ItemProgress(console) as progress:
        for label, model in models.items():
            apply, tokenizer = model.apply_fn(), model.text_tokenizer()
            for name, asked in questions.items():
                total = sum(len(question.choices) for question in asked)
                task = progress.add_task(f"{label} {name}", total=total)
                scored.setdefault(label, {})[name] = score_choices(
                    apply,
                    model.params,
                    tokenizer,
                    asked,
                    max_length=model.config.max_position_embeddings,
                    progress=lambda done, task=task: progress.advance(task, done),
                )
    return scored


def choices_result(scored: Scored) -> dict[str, Any]:
    """Return ``choices`` and ``choices_mean`` of the student, see ``evaluate``."""
    files: dict[str, dict[str, Any]] = {k: dict(v.metrics) for k, v in scored["student"].items()}
    for name, found in scored.get("teacher", {}).items():
        files[name]["teacher_acc"] = found.metrics["acc"]
    mean: dict[str, Any] = {
        key: sum(metrics[key] for metrics in files.values()) / len(files)
        for key in ("acc", "acc_norm", "bits_per_byte", "teacher_acc")
        if key in next(iter(files.values()))
    }
    mean["items"] = sum(metrics["items"] for metrics in files.values())
    if "teacher" in scored:
        for metrics in (*files.values(), mean):
            best = metrics["teacher_acc"]
            metrics["retention"] = metrics["acc"] / best if best else None
    return {"choices": files, "choices_mean": mean}
