"""Multiple choice by log-likelihood: read questions, score every choice, count the right ones."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxdistill.errors import UserError
from jaxdistill.evals.likelihood import encode_pair, log_likelihoods
from jaxdistill.models.json_text import parse_json
from jaxdistill.models.tokenizer import Tokenizer
from jaxdistill.train.text_file import read_lines

FORM = (
    'one object a line, {"context": text, "choices": [two texts or more, none empty], '
    '"label": the number of the right one, from 0}'
)
_ENDINGS = (".jsonl", ".jsonl.gz")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Hold one multiple-choice question.

    Attributes:
        context: what stands before the choices; may be empty.
        choices: the texts to choose from, without the space that parts them from the context.
        label: the number of the right choice, from 0.
        where: file and line, for messages.
        fields: what else the row says, by name.
    """

    context: str
    choices: tuple[str, ...]
    label: int
    where: str = "a question"
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class ChoiceScores(NamedTuple):
    """Hold each question's log-likelihoods, one a choice, and the metrics over all questions."""

    log_likelihoods: list[np.ndarray]
    metrics: dict[str, float | int]


def choices_name(path: str | Path) -> str:
    """Return the name of a file of questions: without folder, ``.gz`` and ``.jsonl``."""
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl")


def load_choices(path: str | Path, limit: int = 0) -> list[Question]:
    """Read the first ``limit`` questions (0: all) of a ``.jsonl`` or ``.jsonl.gz`` file.

    Fields beyond ``context``, ``choices`` and ``label`` can name slices; blank lines are skipped.

    Raises:
        UserError: the file is missing, unreadable or without a question, or a row is of another
            form; names the row.
    """
    path = Path(path)
    accepted = f"a file ending in {' or '.join(_ENDINGS)}"
    if not path.is_file():
        problem = "is no file" if path.exists() else "does not exist"
        raise UserError(f"choices {str(path)!r} {problem}; accepted: {accepted}; check the path")
    if not path.name.endswith(_ENDINGS):
        raise UserError(
            f"choices {str(path)!r} has the ending {path.suffix!r}; accepted: {accepted}; convert "
            "or rename it"
        )
    questions: list[Question] = []
    try:
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                questions.append(_question(line, f"{path}:{number}"))
            if 0 < limit <= len(questions):
                break
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"choices {str(path)!r} cannot be read ({error}); accepted: UTF-8 text, compressed "
            "with gzip where the name ends in .gz; write it again"
        ) from error
    if not questions:
        raise UserError(f"choices {str(path)!r} holds no question; accepted: {FORM}; add some")
    return questions


def _question(line: str, where: str) -> Question:
    """Check one line and return its question."""
    try:
        row = parse_json(line, constants=True)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); accepted: {FORM}; correct it") from error
    problem = _problem(row)
    if problem:
        raise UserError(f"{where} {problem}; accepted: {FORM}; correct or remove the row")
    own = ("context", "choices", "label")
    return Question(
        context=row["context"],
        choices=tuple(row["choices"]),
        label=row["label"],
        where=where,
        fields={name: value for name, value in row.items() if name not in own},
    )


def _problem(row: Any) -> str:
    """Say what is wrong with a row, or nothing."""
    if not isinstance(row, dict):
        return f"is {type(row).__name__}, no object"
    missing = [name for name in ("context", "choices", "label") if name not in row]
    if missing:
        return f"lacks {' and '.join(missing)}"
    context, choices, label = row["context"], row["choices"], row["label"]
    if not isinstance(context, str):
        return f"has the context {context!r}, no text"
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        return f"has the choices {choices!r}, no list of texts that are not empty"
    if len(choices) < 2:
        return f"has {len(choices)} choices"
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        return f"has the label {label!r} for {len(choices)} choices"
    return ""


def choice_metrics(
    questions: Sequence[Question], log_likelihoods: Sequence[np.ndarray]
) -> dict[str, float | int]:
    """Return the metrics of questions whose choices have these log-likelihoods.

    ``acc`` is the share of questions whose right choice has the highest log-likelihood,
    ``acc_norm`` the same with log-likelihoods divided by the choice's UTF-8 bytes, the space before
    it not counted. (The lm-evaluation-harness calls that ``acc_bytes``; its ``acc_norm`` divides by
    characters, which differs only where a choice has characters beyond ASCII.) The first of equal
    choices is taken. Each has its standard error ``sqrt(p * (1 - p) / n)`` beside it, ``n`` being
    ``items``. ``bits_per_byte`` is the negative log2-likelihood of all right choices over their
    bytes.
    """
    sums = choice_sums(questions, log_likelihoods)
    metrics: dict[str, float | int] = {}
    for name in ("acc", "acc_norm"):
        share = float(np.mean(sums[name][0]))
        metrics[name] = share
        metrics[f"{name}_stderr"] = math.sqrt(share * (1 - share) / len(questions))
    bits, length = (float(np.sum(x)) for x in sums["bits_per_byte"])
    return metrics | {"bits_per_byte": bits / length, "items": len(questions)}


def choice_sums(
    questions: Sequence[Question], log_likelihoods: Sequence[np.ndarray]
) -> dict[str, tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]]:
    """Return by metric of ``choice_metrics`` each question's (sum, count)."""
    lengths = [np.array([len(c.encode()) for c in q.choices], float) for q in questions]
    labels = [q.label for q in questions]
    each = list(zip(log_likelihoods, lengths, labels, strict=True))
    one = np.ones(len(questions))
    return {
        "acc": (np.array([float(np.argmax(s) == k) for s, _, k in each]), one),
        "acc_norm": (np.array([float(np.argmax(s / n) == k) for s, n, k in each]), one),
        "bits_per_byte": (
            np.array([-float(s[k]) / math.log(2) for s, _, k in each]),
            np.array([float(n[k]) for _, n, k in each]),
        ),
    }


def score_choices(
    apply: Callable[..., Any],
    params: Any,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    max_length: int,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ChoiceScores:
    """Return the log-likelihood of every choice after its question's context, and the metrics.

    A choice is scored as a space and its text after the context; after an empty context as its text
    alone, behind BOS (or EOS where the tokenizer has no BOS).

    Args:
        apply: an ``ApplyFn``; give the same one for several files, it is compiled once a shape.
        params: its params.
        tokenizer: the model's.
        questions: see ``load_choices``.
        max_length: tokens the model can read; a longer context loses its beginning.
        batch_tokens: see ``log_likelihoods``.
        progress: told the number of choices done after each batch.

    Raises:
        UserError: a choice has no token of its own or more than the model can read; names the row.
    """
    pairs = []
    for question in questions:
        for choice in question.choices:
            space = " " if question.context else ""
            pair = encode_pair(tokenizer, question.context, space + choice)
            if not 1 <= len(pair.continuation) <= max_length:
                raise UserError(
                    f"{question.where} has a choice of {len(pair.continuation)} tokens; accepted: "
                    f"1 to {max_length}, the model's positions; shorten or remove it"
                )
            pairs.append(pair)
    scores, _ = log_likelihoods(
        apply,
        params,
        pairs,
        max_length=max_length,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    ends = np.cumsum([len(question.choices) for question in questions])[:-1]
    split = np.split(scores, ends)
    return ChoiceScores(split, choice_metrics(questions, split))
