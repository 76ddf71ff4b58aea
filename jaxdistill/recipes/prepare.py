"""What every recipe does to its data: split, encode, pack, and cut the evaluation to size."""

from __future__ import annotations

from typing import Any, Literal, cast

import datasets

from jaxdistill.errors import UserError
from jaxdistill.models.hub import Model
from jaxdistill.train.encode import encode_rows
from jaxdistill.train.packing import Batch, Packed, eval_batches, no_packing, pack

_HOLD_OUT_EVERY = 20


def split_rows(rows: datasets.Dataset, source: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return (training, held-out) rows: every 20th row is held out, at least one."""
    if len(rows) < 2:
        raise UserError(f"{source} has {len(rows)} row, too few to hold one out; give --eval-data")
    held = set(range(_HOLD_OUT_EVERY - 1, len(rows), _HOLD_OUT_EVERY)) or {len(rows) - 1}
    return (
        rows.select([i for i in range(len(rows)) if i not in held]),
        rows.select(sorted(held)),
    )


def check_length(seq_len: int, model: Model) -> None:
    """Raise ``UserError`` where a row is longer than the model can read."""
    if seq_len > model.config.max_position_embeddings:
        raise UserError(
            f"--seq-len {seq_len} exceeds the {model.config.max_position_embeddings} positions of "
            f"{model.source}; choose a smaller one"
        )


def pack_rows(
    rows: Any,
    model: Model,
    seq_len: int,
    loss_on: Literal["all", "completion"] = "all",
    packing: bool = True,
    add_eos: bool = True,
) -> Packed:
    """Encode rows with the model's tokenizer and lay them out in rows of ``seq_len`` tokens.

    Training teaches where a plain text ends (``add_eos``); evaluation scores the text alone.
    """
    check_length(seq_len, model)
    tokenizer = model.text_tokenizer()
    examples = encode_rows(rows, tokenizer, loss_on=loss_on, add_eos=add_eos)
    pad = cast(int, tokenizer.pad_token_id or 0)
    return (pack if packing else no_packing)(examples, seq_len, pad_id=pad)


def eval_batches_of(packed: Packed, batch_size: int, tokens: int = 0) -> list[Batch]:
    """Return the evaluation's batches that hold a target, the first ``tokens`` tokens (0: all)."""
    found = [batch for batch in eval_batches(packed, batch_size) if batch["loss_mask"].any()]
    if not found:
        raise UserError("the evaluation data hold no target token; give longer texts")
    if tokens:
        found = found[: max(1, tokens // (batch_size * packed.tokens.shape[1]))]
    return found
