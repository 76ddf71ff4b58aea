"""Text to token ids: one way for training, evaluation and generation.

The tokenizer's own first tokens (BOS) are put before a text that does not begin with them, and its
own last tokens (EOS) are left out: who trains on a text's end adds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxdistill.errors import UserError
from jaxdistill.models.chat_template import TemplateError, render
from jaxdistill.models.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """A text's tokens.

    Attributes:
        ids: of the tokens.
        offsets: the characters of each, empty ranges at 0 for those put before the text; or None.
    """

    ids: list[int]
    offsets: Int[np.ndarray, "n 2"] | None


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], *, bos: bool = True, offsets: bool = False
) -> list[Encoded]:
    """Encode texts, each whole.

    Args:
        tokenizer: any.
        texts: any; nothing comes of an empty one but what is put before it.
        bos: whether the tokenizer's own first tokens are put before texts that lack them.
        offsets: whether to return them; they take far more memory than the ids.

    Raises:
        UserError: the tokenizer cannot read a text.
    """
    if not texts:
        return []
    first = first_ids(tokenizer) if bos else []
    encoded = _tokenize(tokenizer, list(texts), offsets=offsets)
    found = []
    for n, ids in enumerate(encoded["input_ids"]):
        more = [] if ids[: len(first)] == first else first
        pairs = None
        if offsets:
            pairs = np.array([(0, 0)] * len(more) + encoded["offset_mapping"][n], np.int64)
            pairs = pairs.reshape(-1, 2)
        found.append(Encoded([*more, *ids], pairs))
    return found


def encode_text(tokenizer: Tokenizer, text: str, *, bos: bool = True) -> list[int]:
    """Return one text's tokens, see ``encode``."""
    return encode(tokenizer, [text], bos=bos)[0].ids


def first_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that the tokenizer puts before a text by itself."""
    (own,), (whole,) = (
        _tokenize(tokenizer, ["a"], special=special)["input_ids"] for special in (False, True)
    )
    for at in range(len(whole) - len(own) + 1):
        if whole[at : at + len(own)] == own:
            return whole[:at]
    raise UserError(
        "the tokenizer puts special tokens inside of a text; accepted: before and after it; give a "
        "model with another tokenizer"
    )


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, chat: bool = True) -> list[int]:
    """Return the tokens of what a user says, through the chat template where there is one.

    Raises:
        UserError: the template rejects the prompt.
    """
    if not chat or not tokenizer.chat_template:
        return encode_text(tokenizer, prompt)
    try:
        text = render(tokenizer, [{"role": "user", "content": prompt}], prompt=True)
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template rejects the prompt ({error})") from error
    return encode_text(tokenizer, text, bos=False)


def _tokenize(
    tokenizer: Tokenizer, texts: list[str], *, special: bool = False, offsets: bool = False
) -> Any:
    try:
        return tokenizer(
            texts,
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"the tokenizer cannot read a text ({' '.join(str(error).split())}); give the model's "
            "own tokenizer.json"
        ) from error
