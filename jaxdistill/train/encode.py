"""Turn rows into tokens, and mark which of the tokens are targets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32
from transformers import PreTrainedTokenizerFast

from jaxdistill.errors import UserError
from jaxdistill.models.chat_template import Span
from jaxdistill.models.token_ids import encode
from jaxdistill.train.chat_rows import Conversation, conversation, row_form, row_weight
from jaxdistill.train.chat_spans import REASONING, answer_spans, render_chat, turn_spans

_CHUNK = 1024  # rows that the tokenizer sees at once, over its own threads
_HEADS = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """Hold the tokens of one row.

    Attributes:
        tokens: token ids.
        loss_mask: ``loss_mask[i]`` says whether token ``i`` is a target, that is, whether the
            prediction made *at token i-1* is judged. The first token is never one.
        weights: of each token as a target; None where all weigh 1.
    """

    tokens: Int32[np.ndarray, "n"]
    loss_mask: Bool[np.ndarray, "n"]
    weights: Float32[np.ndarray, "n"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    """A row as the string to tokenize.

    Attributes:
        text: the string.
        special: whether the tokenizer's own first tokens come before it (a chat template writes
            them itself).
        close: whether the end-of-text token is to follow.
        spans: character ranges that are targets; None for all.
        weights: character ranges with weights in the loss other than 1.
    """

    text: str
    special: bool
    close: bool = False
    spans: tuple[Span, ...] | None = None
    weights: tuple[tuple[Span, float], ...] = ()


def encode_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    loss_on: Literal["all", "completion"] = "all",
    template: Literal["auto", "chat", "plain"] = "auto",
    add_eos: bool = True,
) -> list[Example]:
    """Encode each row to one example, in order.

    - ``text`` is encoded with the special tokens that the tokenizer adds by itself (its
      beginning-of-text token if it has that habit), and ends with its end-of-text token. A blank
      text gives an example of no tokens.
    - ``messages`` are written by the tokenizer's chat template, which alone decides on special
      tokens. Without one, and for ``template="plain"``, they are written as paragraphs headed
      ``### Instruction:`` and ``### Response:``, the end-of-text token after each answer.
    - ``instruction``, ``input`` and ``output`` become the messages of a user (instruction, a blank
      line, input) and of an assistant (output).

    Args:
        rows: a ``datasets.Dataset`` or any mappings.
        tokenizer: gives ids and offsets.
        loss_on: ``all`` makes every token but the first a target; ``completion`` only what the
            assistant says, with the end-of-turn token that follows it, in every turn.
        template: ``chat`` insists on the tokenizer's template, ``plain`` ignores it.
        add_eos: whether texts and plain answers end with the end-of-text token, if there is one.

    Raises:
        UserError: if a row has no accepted form, the chat template is missing or rejects a row or
            leaves a part of it out, or ``loss_on="completion"`` meets a row without an answer or a
            template whose answers cannot be located.
    """
    _check_choice("loss_on", loss_on, ("all", "completion"))
    _check_choice("template", template, ("auto", "chat", "plain"))
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(
            "template is 'chat' but the tokenizer has no chat template; accepted: 'auto', 'plain', "
            "or a tokenizer with one; use template='plain'"
        )
    chat = bool(tokenizer.chat_template) and template != "plain"
    eos: Any = tokenizer.eos_token_id if add_eos else None
    examples: list[Example] = []
    numbered = enumerate(rows, 1)
    while chunk := list(itertools.islice(numbered, _CHUNK)):
        rendered = [
            render_row(row, f"row {number}", tokenizer, chat, loss_on == "completion", add_eos)
            for number, row in chunk
        ]
        for (number, row), example in zip(chunk, _tokenize(rendered, tokenizer, eos), strict=True):
            if loss_on == "completion" and not example.loss_mask.any():
                raise UserError(
                    f"row {number} has no answer to learn from; --loss-on completion accepts rows "
                    "with an assistant's answer; remove the row or use --loss-on all"
                )
            examples.append(_weighted(example, row_weight(row, f"row {number}")))
    return examples


def _weighted(example: Example, weight: float) -> Example:
    """Return the example with all its weights multiplied by the row's."""
    if weight == 1:
        return example
    ones = np.ones(len(example.tokens), np.float32)
    weights = ones if example.weights is None else example.weights
    return dataclasses.replace(example, weights=weights * np.float32(weight))


def _check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise UserError(
            f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}; choose one of these"
        )


def render_row(
    row: Mapping[str, Any],
    where: str,
    tokenizer: PreTrainedTokenizerFast,
    chat: bool,
    completion: bool,
    add_eos: bool,
) -> Rendered:
    """Write a row as one string, with the character ranges of its targets."""
    form = row_form(row, where)
    if form == "text":
        if completion:
            raise UserError(
                f"{where} is a plain text, which has no completion; --loss-on completion accepts "
                "chats, prompts with completions and instructions; use --loss-on all"
            )
        return Rendered(text=row["text"], special=True, close=True)
    if form == "completion":
        prompt, text = row["prompt"], row["prompt"] + row["completion"]
        spans = ((len(prompt), len(text) + 1),) if completion else None
        return Rendered(text=text, special=True, close=True, spans=spans)
    said = conversation(row, where)
    if not chat:
        return _plain(
            said, str((tokenizer.eos_token if add_eos else None) or ""), where, completion
        )
    rendered = render_chat(tokenizer, said.messages, said.tools, where)
    spans, weights = None, ()
    if completion:
        answers = answer_spans(rendered)
        targets = [i for i in answers if i >= said.first and said.weights[i]]
        spans = tuple(span for i in targets for span in answers[i])
        weights = tuple((span, said.weights[i]) for i in targets for span in answers[i])
    elif any(weight != 1 for weight in said.weights):
        weights = tuple(zip(turn_spans(rendered), said.weights, strict=True))
    weights = tuple((span, weight) for span, weight in weights if weight != 1)
    return Rendered(text=rendered.text, special=False, spans=spans, weights=weights)


def _plain(said: Conversation, eos: str, where: str, completion: bool) -> Rendered:
    """Write messages as headed paragraphs."""
    text, spans, weights = "", [], []
    if said.tools:
        raise UserError(
            f"{where} has tools, which only a chat template can write; remove them, or use a "
            "tokenizer with a chat template"
        )
    for i, (message, weight) in enumerate(zip(said.messages, said.weights, strict=True)):
        role = message["role"]
        if role not in _HEADS:
            raise UserError(
                f"{where} has the role {role!r}; without a chat template the accepted roles are "
                f"{', '.join(map(repr, _HEADS))}; rename it or use a tokenizer with a chat template"
            )
        for key in ("tool_calls", *REASONING):
            if message.get(key):
                raise UserError(
                    f"{where} has {key!r}, which only a chat template can write; remove it, or use "
                    "a tokenizer with a chat template"
                )
        text += ("\n\n" if text else "") + _HEADS[role]
        start = len(text)
        text += message["content"] + (eos if role == "assistant" else "")
        if role == "assistant" and i >= said.first and weight:
            spans.append((start, len(text)))
        if weight != 1:
            weights.append(((start, len(text)), weight))
    targets = tuple(spans) if completion else None
    return Rendered(text=text, special=True, spans=targets, weights=tuple(weights))


def _tokenize(
    rendered: list[Rendered], tokenizer: PreTrainedTokenizerFast, eos: int | None
) -> list[Example]:
    """Encode the strings in at most two calls: with the tokenizer's first tokens, and without."""
    examples: dict[int, Example] = {}
    for special in (False, True):
        picked = [i for i, r in enumerate(rendered) if r.special is special and r.text.strip()]
        texts = [rendered[i].text for i in picked]
        offsets = any(rendered[i].spans is not None or rendered[i].weights for i in picked)
        encoded = encode(tokenizer, texts, bos=special, offsets=offsets)
        for i, (ids, pairs) in zip(picked, encoded, strict=True):
            examples[i] = example_of(rendered[i], ids, pairs, tokenizer, eos)
    nothing = Example(tokens=np.zeros(0, np.int32), loss_mask=np.zeros(0, np.bool_))
    return [examples.get(i, nothing) for i in range(len(rendered))]


def example_of(
    row: Rendered,
    ids: list[int],
    offsets_n2: np.ndarray | None,
    tokenizer: PreTrainedTokenizerFast,
    eos: int | None,
) -> Example:
    """Mark as targets the tokens that share a character with a span, or all, but the first.

    The end-of-text token is put after a text to be closed that does not end with it.
    """
    if row.close and eos is not None and not row.text.rstrip().endswith(str(tokenizer.eos_token)):
        ids = [*ids, eos]
        if offsets_n2 is not None:
            end = np.array([[len(row.text), len(row.text) + 1]])
            offsets_n2 = np.concatenate([offsets_n2, end])

    def inside(start: int, stop: int) -> np.ndarray:
        assert offsets_n2 is not None
        return (offsets_n2[:, 1] > start) & (offsets_n2[:, 0] < stop)

    mask = np.full(len(ids), row.spans is None)
    for start, stop in row.spans or ():
        mask |= inside(start, stop)
    mask[:1] = False
    weights = np.ones(len(ids), np.float32) if row.weights else None
    for (start, stop), weight in row.weights:
        assert weights is not None
        weights[inside(start, stop)] = weight
    return Example(tokens=np.array(ids, np.int32), loss_mask=mask, weights=weights)
