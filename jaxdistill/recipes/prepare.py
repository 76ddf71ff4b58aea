"""What every recipe does to its data: split, encode, pack, and cut the evaluation to size."""

from __future__ import annotations

import re
from typing import Any, Literal, cast

import datasets
from rich.console import Console

from jaxdistill.errors import UserError
from jaxdistill.models.hub import Model
from jaxdistill.train.chat_rows import row_form
from jaxdistill.train.encode import encode_rows
from jaxdistill.train.packing import Batch, Counts, Packed, Packing, eval_batches, pack

_HOLD_OUT_EVERY = 20
_SPACE = re.compile(r"\s+")


def split_rows(
    rows: datasets.Dataset, source: str, console: Console | None = None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return (training, held-out) rows: every 20th row is held out.

    Of fewer rows that are texts, the last 20th of their characters is held out, and a line on
    ``console`` (by default standard error) says so. Of fewer chats, the last one is.

    Raises:
        UserError: there is one row that is not a text, or one character.
    """
    if len(rows) < _HOLD_OUT_EVERY and all(row_form(row, source) == "text" for row in rows):
        return _split_texts(rows, source, console or Console(stderr=True))
    if len(rows) < 2:
        raise UserError(f"{source} has {len(rows)} row, too few to hold one out; give --eval-data")
    held = set(range(_HOLD_OUT_EVERY - 1, len(rows), _HOLD_OUT_EVERY)) or {len(rows) - 1}
    return (
        rows.select([i for i in range(len(rows)) if i not in held]),
        rows.select(sorted(held)),
    )


def _split_texts(rows: Any, source: str, console: Console) -> Any:
    """Hold out the end of the texts, from the start of a word."""
    total = sum(len(row["text"]) for row in rows)
    if total < 2:
        raise UserError(f"{source} has {total} characters, too few to split; give --eval-data")
    left = wanted = -(-total // _HOLD_OUT_EVERY)
    train: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    for row in reversed(list(rows)):
        text = row["text"]
        cut = max(0, len(text) - left)
        space = _SPACE.search(text, cut, cut + left // 2) if cut and left else None
        cut = space.end() if space and space.end() < len(text) else cut
        train += [row | {"text": text[:cut]}] if cut else []
        held += [row | {"text": text[cut:]}] if cut < len(text) else []
        left = max(0, left - len(text))
    console.print(
        f"{source} has {len(rows)} texts, too few to hold out every {_HOLD_OUT_EVERY}th: the last "
        f"{wanted:,} of {total:,} characters are held out",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return tuple(
        datasets.Dataset.from_list(part[::-1], features=rows.features) for part in (train, held)
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
    packing: Packing = "best-fit",
    *,
    add_eos: bool = True,
    by_length: bool = False,
    name: str = "data",
    console: Console | None = None,
) -> Packed:
    """Encode rows with the model's tokenizer and lay them out in rows of ``seq_len`` tokens.

    Training teaches where a plain text ends (``add_eos``); evaluation scores the text alone.

    Args:
        rows: as ``encode_rows`` takes them.
        model: gives the tokenizer.
        seq_len: tokens of a row.
        loss_on: see ``encode_rows``.
        packing: see ``train.packing.pack``.
        add_eos: see ``encode_rows``.
        by_length: see ``train.packing.pack``.
        name: what the rows are to the user, for messages.
        console: where a line says what became of the tokens; None for no line.

    Raises:
        UserError: the row length does not suit the model, or no row has a target.
    """
    check_length(seq_len, model)
    tokenizer = model.text_tokenizer()
    examples = encode_rows(rows, tokenizer, loss_on=loss_on, add_eos=add_eos)
    pad = cast(int, tokenizer.pad_token_id or 0)
    packed = pack(examples, seq_len, packing=packing, by_length=by_length, pad_id=pad)
    if not len(packed):
        raise UserError(
            f"the {name} have no target token: none of {len(examples)} texts has one within "
            f"--seq-len {seq_len}; give a larger --seq-len, or longer texts"
        )
    if console is not None:
        say_counts(console, name, packed)
    return packed


def say_counts(console: Console, name: str, rows: Any) -> None:
    """Say what became of the tokens of texts, where the rows know it."""
    if (counts := counts_of(rows)) is not None:
        console.print(f"{name}: {counts}", highlight=False, markup=False, soft_wrap=True)


def counts_of(rows: Any) -> Counts | None:
    """Return the counts of packed, paired or cached rows; None of learned ones."""
    for inner in ("student", "rows"):
        rows = getattr(rows, inner, rows)
    return getattr(rows, "counts", None)


def eval_batches_of(packed: Packed, batch_size: int, tokens: int = 0) -> list[Batch]:
    """Return the evaluation's batches that hold a target, the first ``tokens`` tokens (0: all)."""
    found = [batch for batch in eval_batches(packed, batch_size) if batch["loss_mask"].any()]
    if not found:
        raise UserError("the evaluation data hold no target token; give longer texts")
    if tokens:
        found = found[: max(1, tokens // (batch_size * packed.tokens.shape[1]))]
    return found
