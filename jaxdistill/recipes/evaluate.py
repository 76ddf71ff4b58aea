"""Evaluate a model on text and on multiple choice, alone or beside a teacher."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from jaxdistill.errors import UserError
from jaxdistill.evals.choices import Question, choices_name, load_choices, score_choices
from jaxdistill.evals.perplexity import make_evaluator
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.hub import Model, check_same_vocabulary, load_model
from jaxdistill.recipes.parallel import Parallel, parallel
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows
from jaxdistill.report.progress import item_progress
from jaxdistill.train.data import load_rows


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
    packing: bool = True
    """Pack texts into full rows; without it each text has its own row, cut at seq-len."""
    loss_on: Literal["all", "completion"] = "all"
    """Tokens that count: all, or the answers of chat rows alone."""
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
    None where the teacher has none right).
    """
    _check(o)
    questions = {choices_name(path): load_choices(path, o.limit) for path in o.choices}
    rows = None if o.data is None else load_rows(o.data)
    model = load_model(o.model)
    teacher = None if o.teacher is None else load_model(o.teacher)
    result: dict[str, Any] = {}
    if rows is not None:
        shared = None if teacher is None else check_same_vocabulary(teacher, model)
        packed = pack_rows(rows, model, o.seq_len, o.loss_on, o.packing, add_eos=False)
        objective = kd_objective(
            model.apply_fn(),
            None if teacher is None else teacher.apply_fn(),
            vocab_size=shared,
        )
        result |= make_evaluator(objective)(
            model.params,
            None if teacher is None else teacher.params,
            eval_batches_of(packed, o.batch_size),
        )
    if questions:
        result |= evaluate_choices(model, teacher, questions, console)
    return result


def evaluate_choices(
    model: Model,
    teacher: Model | None,
    questions: dict[str, list[Question]],
    console: Console | None = None,
) -> dict[str, Any]:
    """Return ``choices`` and ``choices_mean`` of a model, see ``evaluate``.

    The teacher's vocabulary may be another: each model reads the text with its own tokenizer.
    Progress goes to ``console``, by default stderr.
    """
    models = {"": model} if teacher is None else {"": model, "teacher_": teacher}
    scored: dict[str, dict[str, Any]] = {name: {} for name in questions}
    with item_progress(console) as progress:
        for prefix, judged in models.items():
            apply, tokenizer = judged.apply_fn(), judged.text_tokenizer()
            for name, asked in questions.items():
                total = sum(len(question.choices) for question in asked)
                task = progress.add_task(prefix.replace("_", " ") + name, total=total)
                metrics = score_choices(
                    apply,
                    judged.params,
                    tokenizer,
                    asked,
                    max_length=judged.config.max_position_embeddings,
                    progress=lambda done, task=task: progress.advance(task, done),
                ).metrics
                scored[name] |= {"teacher_acc": metrics["acc"]} if prefix else metrics
    mean: dict[str, Any] = {
        key: sum(metrics[key] for metrics in scored.values()) / len(scored)
        for key in ("acc", "acc_norm", "bits_per_byte", "teacher_acc")
        if key in next(iter(scored.values()))
    }
    mean["items"] = sum(metrics["items"] for metrics in scored.values())
    if teacher is not None:
        for metrics in (*scored.values(), mean):
            best = metrics["teacher_acc"]
            metrics["retention"] = metrics["acc"] / best if best else None
    return {"choices": scored, "choices_mean": mean}
