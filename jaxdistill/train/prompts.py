"""Rows that begin with a prompt and have room for an answer: what sampling needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.train.encode import Example
from jaxdistill.train.packing import Packed, pack, recount
from jaxdistill.train.pieces import crop, target_mask


def prompt_rows(
    examples: Sequence[Example], *, seq_len: int, prompt_length: int, pad_id: int = 0
) -> Packed:
    """Give every example a row of its own: a prompt, whose tokens are no targets, and an answer.

    - Where only answers are targets (chats, instructions) the prompt is what comes before the first
      target; a longer one keeps its last ``prompt_length`` tokens.
    - A plain text, all of it targets, gets its first ``prompt_length`` tokens as the prompt.

    Rows without a target beside the prompt are dropped, as texts that are no longer than a prompt.

    Args:
        examples: in the order of the rows.
        seq_len: T; answers are cut there.
        prompt_length: tokens of a prompt at most, below ``seq_len``.
        pad_id: the id that fills the rows.

    Raises:
        UserError: the lengths leave no room for an answer, or no row is left.
    """
    if not 1 <= prompt_length < seq_len:
        raise UserError(
            f"prompt_length {prompt_length} for rows of {seq_len} tokens given; accepted: 1 to "
            f"{seq_len - 1}, so that an answer has room"
        )
    prompted = [crop(_split(e, prompt_length), 0, seq_len) for e in examples]
    kept = [i for i, e in enumerate(prompted) if target_mask(e).any()]
    if not kept:
        raise UserError(
            f"none of {len(examples)} examples has an answer beside a prompt of {prompt_length} "
            "tokens; give longer texts or chats with answers, or a shorter prompt_length"
        )
    packed = pack([prompted[i] for i in kept], seq_len, packing="none", pad_id=pad_id)
    return recount(packed, examples, kept)


def _split(example: Example, prompt_length: int) -> Example:
    """Return the example with a prompt of at most this length before its first target."""
    tokens, targets = example.tokens, example.loss_mask
    if len(tokens) and targets[1:].all():
        answer = np.arange(len(tokens)) >= prompt_length
        return dataclasses.replace(example, loss_mask=targets & answer)
    start = max(0, int(np.argmax(targets)) - prompt_length) if targets.any() else 0
    return crop(example, start, None)
