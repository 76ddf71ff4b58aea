"""A condensed set in the place of text: its rows of embeddings, with their teacher's answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from jaxdistill.dd.stored_set import ARRAYS, ROWS, StoredSet, load_set
from jaxdistill.errors import UserError
from jaxdistill.evals.features import embedding_table
from jaxdistill.losses.loss import Loss
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.fingerprint import model_fingerprint
from jaxdistill.models.hub import Model
from jaxdistill.recipes.options import Distill
from jaxdistill.train.packing import Batch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LearnedRows:
    """Hold M rows of embeddings as ``train.packing.Packed`` holds rows of tokens.

    Attributes:
        stored: the set, see ``StoredSet.has_rows``.
        where: its directory.
    """

    stored: StoredSet
    where: Path

    def __len__(self) -> int:
        """Count the rows."""
        return self.stored.synthetic.size

    def __getitem__(self, index: Any) -> Batch:
        """Give one row, arrays [T, ...], or a slice of rows."""
        whole = self.stored.synthetic.batch()
        return {name: np.asarray(whole[name])[index] for name in ROWS}

    def confidence(self) -> float:
        """Return the teacher's mean largest probability over the places that predict a target."""
        rows = self[:]
        top = softmax(rows["teacher_logits"][:, :-1].astype(np.float64), axis=-1).max(axis=-1)
        return float(top[rows["loss_mask"][:, 1:].astype(bool)].mean())


def learned_rows(source: str) -> LearnedRows | None:
    """Return the rows of a set, or of a run that holds one; None where the data are others.

    Raises:
        UserError: the set is damaged.
    """
    for where in (Path(source), Path(source) / "set"):
        if (where / ARRAYS).is_file():
            stored = load_set(where)
            return LearnedRows(stored=stored, where=where) if stored.has_rows else None
    return None


def check_learned(
    rows: LearnedRows, o: Distill, student: Model, teachers: list[Model], loss: Loss
) -> None:
    """Raise ``UserError`` where the options or the models do not suit the rows."""
    effects = {
        "--cache": o.cache is not None,
        "--on-policy": o.on_policy > 0,
        "--text-from": o.text_from != "data",
        "--rationale-weight": o.rationale_weight is not None,
        "--curriculum": o.curriculum != "none",
        "--top-k": o.top_k > 0,
        "--correction": o.correction is not None,
        "several teachers": len(teachers) > 1,
    }
    refused = [flag for flag, given in effects.items() if given]
    others = loss.of_kind("states", "cross_tokenizer")
    refused += [f"--objective {others[0].entry.name}"] if others else []
    if refused:
        raise UserError(
            f"{refused[0]} given with the learned rows of {rows.where}, which are embeddings with "
            "their teacher's logits; accepted: one teacher and divergences of logits; leave it out"
        )
    if o.eval_data is None:
        raise UserError(
            f"the learned rows of {rows.where} hold no text to be held out; give --eval-data"
        )
    if o.batch_size > len(rows):
        raise UserError(
            f"--batch-size {o.batch_size} given for the {len(rows)} rows of {rows.where}; "
            f"accepted: 1 to {len(rows)}"
        )
    reading = rows.stored.settings.get("reading")
    reading = reading if isinstance(reading, dict) else {}
    model = teachers[0] if teachers else student
    found = model_fingerprint(model.config, model.params)
    if found != reading.get("model_fingerprint"):
        raise UserError(
            f"{rows.where} was learned of {reading.get('model')} of the fingerprint "
            f"{reading.get('model_fingerprint')}, and {model.source} has {found}; give that model "
            "as the teacher, or condense again"
        )
    arrays, c = rows[:], model.config
    wide = arrays["embeddings"].shape[-1], arrays["teacher_logits"].shape[-1]
    if wide != (c.hidden_size, c.vocab_size):
        raise UserError(
            f"{rows.where} has embeddings and logits of the widths {wide}, and {model.source} of "
            f"{(c.hidden_size, c.vocab_size)}; it is damaged: condense again"
        )
    if student is not model and not _same_table(student, model):
        raise UserError(
            f"the student {student.source} has another table than {model.source}, whose embeddings "
            f"{rows.where} holds; leave out --student, or train on text"
        )


def _same_table(one: Model, other: Model) -> bool:
    return np.array_equal(embedding_table(one), embedding_table(other))


def check_width(rows: LearnedRows, config: ModelConfig) -> None:
    """Raise ``UserError`` where a student has another width than the rows' embeddings."""
    width = rows[:]["embeddings"].shape[-1]
    if config.hidden_size != width:
        raise UserError(
            f"the student is {config.hidden_size} wide, and the embeddings of {rows.where} are "
            f"{width}; cut layers, intermediate or heads alone"
        )
