"""Evaluate a model on text: NLL, perplexity, and beside a teacher KL and agreement."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import tyro

from jaxdistill.evals.perplexity import make_evaluator
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.hub import check_same_vocabulary, load_model
from jaxdistill.recipes.prepare import eval_batches_of, pack_rows
from jaxdistill.train.data import load_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluate a model on text, alone or against a teacher."""

    model: str
    """Model: a run directory, an HF directory, a .gguf file, or a hub name."""
    data: str
    """Text: .jsonl[.gz], .txt, .parquet, a directory of such files, or a hub data set."""
    teacher: str | None = None
    """Model to compare with: adds kl (nats a token) and agreement (share of equal argmax)."""
    seq_len: int = 512
    """Tokens a row."""
    batch_size: int = 8
    """Rows a batch."""
    packing: bool = True
    """Pack texts into full rows; without it each text has its own row, cut at seq-len."""
    loss_on: Literal["all", "completion"] = "all"
    """Tokens that count: all, or the answers of chat rows alone."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


def evaluate(o: Evaluate) -> dict[str, float | int]:
    """Return ``nll``, ``perplexity``, ``tokens``, and with a teacher ``kl`` and ``agreement``."""
    model = load_model(o.model)
    teacher = None if o.teacher is None else load_model(o.teacher)
    if teacher is not None:
        check_same_vocabulary(teacher, model)
    rows = load_rows(o.data)
    packed = pack_rows(rows, model, o.seq_len, o.loss_on, o.packing, add_eos=False)
    objective = kd_objective(model.apply_fn(), None if teacher is None else teacher.apply_fn())
    return make_evaluator(objective)(
        model.params,
        None if teacher is None else teacher.params,
        eval_batches_of(packed, o.batch_size),
    )
