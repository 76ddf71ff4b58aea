"""What several models answer to the same prompts, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

from jaxdistill.errors import UserError
from jaxdistill.models.decoder import Params
from jaxdistill.models.generate import Sampling
from jaxdistill.models.hub import Model, load_model
from jaxdistill.recipes.generate import continuations
from jaxdistill.train.chat_rows import row_form
from jaxdistill.train.encode import encode_rows
from jaxdistill.train.prompts import prompt_rows

PROMPT, NEW = 48, 48  # tokens
_LOOKED_AT = 8  # rows looked at for each prompt wanted: some are too short


def prompts_of(rows: Iterable[Mapping[str, Any]], model: Model, count: int) -> list[list[int]]:
    """Return the tokens of the first prompts that rows have, at most ``count``.

    A prompt is what comes before a chat's or an instruction's answer (its last 48 tokens), or the
    first 48 tokens of a plain text; fewer where the model reads less than 96. Rows that are too
    short, or have no answer that can be told from the prompt, have none.
    """
    length = min(PROMPT, model.config.max_position_embeddings // 2)
    tokenizer = model.text_tokenizer()
    pad = cast(int, tokenizer.pad_token_id or 0)
    found: list[list[int]] = []
    for row in islice(rows, _LOOKED_AT * count):
        try:
            plain = row_form(row, "held-out text") == "text"
            examples = encode_rows(
                [row], tokenizer, loss_on="all" if plain else "completion", add_eos=False
            )
            packed = prompt_rows(examples, seq_len=length + 1, prompt_length=length, pad_id=pad)
        except UserError:
            continue
        start = int(packed.loss_mask[0].argmax())
        if start:
            found.append(packed.tokens[0, :start].tolist())
    return found[:count]


def side_by_side(
    models: Mapping[str, Model], prompts: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Return, a prompt each, ``prompt`` and ``answers``: what each model goes on with, greedily.

    Args:
        models: by the name that is shown; they have one vocabulary.
        prompts: their tokens, see ``prompts_of``.
    """
    if not prompts:
        return []
    room = min(m.config.max_position_embeddings for m in models.values()) - max(map(len, prompts))
    if room < 1:
        return []
    how = Sampling(max_new_tokens=min(NEW, room))
    tokenizer = next(iter(models.values())).text_tokenizer()
    found = {name: continuations(model, prompts, how) for name, model in models.items()}
    return [
        {
            "prompt": str(tokenizer.decode(list(prompt), skip_special_tokens=True)),
            "answers": {name: texts[i] for name, texts in found.items()},
        }
        for i, prompt in enumerate(prompts)
    ]


def run_samples(
    run: Path | str, teacher: Model | None, rounded: Params | None, rows: Any, count: int
) -> list[dict[str, Any]]:
    """Return what teacher, PTQ and a run's finished student answer to held-out prompts.

    Args:
        run: its directory.
        teacher: None where it reads other tokens, or there is none.
        rounded: the student's weights before training; None where it is a float one.
        rows: the held-out texts.
        count: prompts.
    """
    student = load_model(run)
    models = {} if teacher is None else {"teacher": teacher}
    if rounded is not None:
        models["PTQ"] = dataclasses.replace(student, params=rounded)
    models["student"] = student
    return side_by_side(models, prompts_of(rows, student, count))
