"""What recipes do with named slices: texts scored one by one, and the report of each slice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.evals.choices import Question
from jaxdistill.evals.perplexity import RowEvaluator
from jaxdistill.evals.slices import ItemSums
from jaxdistill.models.hub import Model
from jaxdistill.recipes.options import Training
from jaxdistill.recipes.prepare import check_length
from jaxdistill.train.encode import encode_rows
from jaxdistill.train.packing import Batch, eval_batches, pack
from jaxdistill.train.pieces import crop, split
from jaxdistill.train.slices import Described, described, slices_of


class Texts:
    """Hold texts laid out so that each can be scored alone: in rows that no two of them share.

    Args:
        rows: the texts; one longer than a row is treated as ``train.pieces.split`` says.
        model: gives the tokenizer.
        seq_len: tokens of a row.
        loss_on: see ``train.encode``.
        batch_size: rows a batch.
        tokens: texts are taken from the start until they have as many; 0 for all.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        model: Model,
        seq_len: int,
        loss_on: Literal["all", "completion"],
        batch_size: int,
        tokens: int = 0,
    ) -> None:
        check_length(seq_len, model)
        tokenizer = model.text_tokenizer()
        examples = encode_rows(rows, tokenizer, loss_on=loss_on, add_eos=False)
        lengths = np.cumsum([len(e.tokens) for e in examples])
        self.count = len(examples)
        if tokens:
            self.count = min(self.count, 1 + int(np.searchsorted(lengths, tokens)))
        pieces = split(examples[: self.count], seq_len)
        self.owner = pieces.example
        if not len(self.owner):
            raise UserError("the evaluation data hold no target token; give longer texts")
        pad = cast(int, tokenizer.pad_token_id or 0)
        runs = zip(*(array.tolist() for array in pieces), strict=True)
        crops = [crop(examples[i], start, start + length) for i, start, length in runs]
        packed = pack(crops, seq_len, packing="none", pad_id=pad)
        self.batches: list[Batch] = eval_batches(packed, batch_size)

    def sums(self, evaluate: RowEvaluator, params: Any, teacher_params: Any) -> ItemSums:
        """Return by metric each text's (sum, count)."""
        of_rows = evaluate(params, teacher_params, self.batches)
        n = self.owner.size

        def by_text(x: np.ndarray) -> np.ndarray:
            return np.bincount(self.owner, x[:n], self.count)

        return {name: (by_text(s), by_text(c)) for name, (s, c) in of_rows.items()}


def of_questions(questions: Sequence[Question], source: str) -> Described:
    """Return what questions are known by: their text, and the fields beside it."""
    names = dict.fromkeys(name for q in questions for name in q.fields)
    return Described(
        count=len(questions),
        texts=["\n".join((q.context, *q.choices)) for q in questions],
        columns={name: [q.fields.get(name) for q in questions] for name in names},
        source=source,
    )


def masks_of(sources: Mapping[str, Described], specs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return each source's slices; a column may be missing in some of them, not in all.

    Raises:
        UserError: see ``train.slices.slices_of``.
    """
    several = len(sources) > 1
    found = {k: slices_of(v, specs, required=not several) for k, v in sources.items()}
    for spec in specs if several else ():
        if not any(slices_of(v, [spec], required=False) for v in sources.values()):
            slices_of(next(iter(sources.values())), [spec])  # says what is wrong
    return found


class Watched(NamedTuple):
    """Hold the held-out texts of a run and which of them belong to each named slice."""

    texts: Texts
    masks: dict[str, np.ndarray]


def watched(o: Training, rows: Any, model: Model) -> Watched | None:
    """Return what ``--slice`` asks to be watched; None where it asks for nothing.

    Raises:
        UserError: a slice cannot be told, or holds none of the held-out texts.
    """
    if not o.slice:
        return None
    texts = Texts(rows, model, o.seq_len, o.loss_on, o.batch_size, o.eval_tokens)
    known = described([rows[i] for i in range(texts.count)], o.eval_data or o.data)
    masks = slices_of(known, o.slice)
    if empty := [name for name, mask in masks.items() if not mask.any()]:
        raise UserError(
            f"--slice {empty[0]} holds none of the {texts.count} held-out texts; accepted: a slice "
            "that some belong to; give more or other --eval-data, or more --eval-tokens"
        )
    return Watched(texts, masks)
