"""Turn rows into tokens, and mark which of the tokens are targets."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os.path
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32
from transformers import PreTrainedTokenizerFast

from jaxdistill.errors import UserError

FORMS = (
    "'text', or 'messages' (a list of {role, content}), or 'instruction' and 'output' (and 'input')"
)
_MOST = 1e6  # a weight; more would leave float32 in a sum
_STANDIN = "jaxdistill-stands-in-for-a-turn"  # rendered in the place of an answer, then looked for
_CHUNK = 1024  # rows that the tokenizer sees at once, over its own threads

Message = dict[str, Any]
Span = tuple[int, int]


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
    """Hold a row as the string to tokenize.

    Attributes:
        special: whether the tokenizer adds its own special tokens (a chat template wrote them).
        close: whether the end-of-text token is to follow.
        spans: character ranges that are targets; None for all.
    """

    text: str
    special: bool
    close: bool = False
    spans: tuple[Span, ...] | None = None


def row_form(row: Any, where: str) -> Literal["text", "messages", "instruction"]:
    """Tell which form a row has: messages if they are there, else instruction and output, or text.

    Args:
        row: a mapping; a field that is None counts as missing, others beyond the forms are ignored.
        where: the row's place, which begins the error: ``train.jsonl:3`` or ``row 3``.

    Raises:
        UserError: if the row has no form, or a field has another type than the form asks for.
    """
    if not isinstance(row, Mapping):
        raise UserError(
            f"{where} is a {type(row).__name__}; accepted: an object with {FORMS}; correct the row"
        )
    have = {name for name, value in row.items() if value is not None}
    if "messages" in have:
        _check_messages(row["messages"], where)
        return "messages"
    form = "instruction" if {"instruction", "output"} <= have else "text"
    if form == "text" and "text" not in have:
        raise UserError(
            f"{where} has the fields {', '.join(map(repr, row)) or '(none)'} with values in "
            f"{', '.join(sorted(map(repr, have))) or '(none)'}; accepted: {FORMS}; "
            "rename the fields or fill them"
        )
    for name in ("text",) if form == "text" else ("instruction", "input", "output"):
        if name in have and not isinstance(row[name], str):
            raise UserError(
                f"{where} has a {type(row[name]).__name__} in {name!r}; "
                "accepted: a string; correct the row"
            )
    return form


def _check_messages(messages: Any, where: str) -> None:
    """Raise unless messages are a list of mappings with a role and a content, both strings."""
    good = isinstance(messages, Sequence) and not isinstance(messages, str) and len(messages)
    for message in messages if good else ():
        good = isinstance(message, Mapping) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not good:
            break
    if not good:
        raise UserError(
            f"{where} has 'messages' of another shape; accepted: a non-empty list of "
            "{role, content} with two strings; correct the row"
        )


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
        UserError: if a row has no accepted form, the chat template is missing or rejects a row, or
            ``loss_on="completion"`` meets a row without an answer.
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
        chunk_examples = [
            _weighted(example, _weight(row, f"row {number}"))
            for (number, row), example in zip(
                chunk, _tokenize(rendered, tokenizer, eos), strict=True
            )
        ]
        if loss_on == "completion":
            for (number, _), example in zip(chunk, chunk_examples, strict=True):
                if not example.loss_mask.any():
                    raise UserError(
                        f"row {number} has no answer to learn from; loss_on='completion' accepts "
                        "rows with an assistant's answer; remove the row or use loss_on='all'"
                    )
        examples += chunk_examples
    return examples


def _weight(row: Mapping[str, Any], where: str) -> float:
    """Return a row's weight in the loss, 1 where it gives none."""
    weight = row.get("weight")
    if weight is None:
        return 1.0
    if type(weight) not in (int, float) or not 0 <= weight <= _MOST:
        raise UserError(
            f"{where} has the weight {weight!r}; accepted: a number from 0 to {_MOST:g}; correct it"
        )
    return float(weight)


def _weighted(example: Example, weight: float) -> Example:
    if weight == 1:
        return example
    weights = np.full(len(example.tokens), weight, np.float32)
    return dataclasses.replace(example, weights=weights)


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
                f"{where} is a plain text, which has no completion; loss_on='completion' accepts "
                "'messages', or 'instruction' and 'output'; use loss_on='all'"
            )
        return Rendered(text=row["text"], special=True, close=True)
    messages = _messages(row, form)
    if not chat:
        eos = tokenizer.eos_token if add_eos else None
        text, spans = _plain(messages, str(eos or ""), where)
        return Rendered(text=text, special=True, spans=spans if completion else None)
    render = functools.partial(_chat, tokenizer, where)
    text = render(messages)
    spans = _answer_spans(messages, text, render, where) if completion else None
    return Rendered(text=text, special=False, spans=spans)


def _messages(row: Mapping[str, Any], form: str) -> list[Message]:
    """Give a row as messages; keys that are None, as a data set's other rows cause, are dropped."""
    if form == "messages":
        return [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
    extra = f"\n\n{row['input']}" if row.get("input") else ""
    return [
        {"role": "user", "content": row["instruction"] + extra},
        {"role": "assistant", "content": row["output"]},
    ]


def _plain(messages: list[Message], eos: str, where: str) -> tuple[str, tuple[Span, ...]]:
    """Write messages as headed paragraphs; also give the ranges of the answers."""
    heads = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
    text, spans = "", []
    for message in messages:
        role = message["role"]
        if role not in heads:
            raise UserError(
                f"{where} has the role {role!r}; without a chat template the accepted roles are "
                f"{', '.join(map(repr, heads))}; rename it or use a tokenizer with a chat template"
            )
        text += ("\n\n" if text else "") + heads[role]
        start = len(text)
        text += message["content"]
        if role == "assistant":
            text += eos
            spans.append((start, len(text)))
    return text, tuple(spans)


def _chat(
    tokenizer: PreTrainedTokenizerFast, where: str, messages: list[Message], prompt: bool = False
) -> str:
    """Render messages through the chat template, up to the next answer's start if ``prompt``."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program: it can fail in every way
        detail = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where} is rejected by the tokenizer's chat template ({detail}); accepted: the roles "
            "and the order that the template knows; correct the row or use template='plain'"
        ) from error
    return str(text)


def _answer_spans(
    messages: list[Message], text: str, render: functools.partial[str], where: str
) -> tuple[Span, ...]:
    """Find what the assistant says, with the end of turn, in the rendered conversation.

    An answer starts where the rendering of what came before it ends, the generation prompt
    included. Rendering a stand-in for the answer shows what the template puts around it: a lead,
    which only some turns may have (Qwen3's empty thought before the last answer), and an end of
    turn. White space after the end of turn belongs to no answer.
    """
    found: list[tuple[int, int, str, str]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:index]
        probe = render([*before, {**message, "content": _STANDIN}])
        prompt = render(before, prompt=True)
        start = os.path.commonprefix([prompt, probe])
        lead, standin, tail = probe[len(start) :].partition(_STANDIN)
        steady = start == prompt or start.startswith(render(before))
        if not (standin and steady and text.startswith(start)):
            raise _unlocatable(where)
        found.append((index, len(start), lead, tail.rstrip()))
    spans = []
    for number, (index, start, lead, end) in enumerate(found, 1):
        content = messages[index]["content"]
        at = start + (len(lead) if text.startswith(lead, start) else 0)
        said = next((c for c in (content, content.strip()) if text.startswith(c, at)), None)
        if said is not None:  # some templates end the last turn only
            at += len(said)
            stop = at + (len(end) if text.startswith(end, at) else 0)
        else:  # the template changed the answer: look for its end before what comes next
            limit = found[number][1] if number < len(found) else len(text)
            if index + 1 < len(messages) and messages[index + 1]["role"] != "assistant":
                limit = text.rfind(messages[index + 1]["content"].strip(), at, limit)
            at = text.find(end, at, max(limit, at))
            if not end or at < 0:
                raise _unlocatable(where)
            stop = at + len(end)
        spans.append((start, stop))
    return tuple(spans)


def _unlocatable(where: str) -> UserError:
    return UserError(
        f"{where} is rendered by the tokenizer's chat template so that its answers are not found; "
        "loss_on='completion' accepts templates that keep the turns in order; use template='plain' "
        "or loss_on='all'"
    )


def _tokenize(
    rendered: list[Rendered], tokenizer: PreTrainedTokenizerFast, eos: int | None
) -> list[Example]:
    """Encode the strings in at most two calls: with the tokenizer's special tokens, and without."""
    examples: dict[int, Example] = {}
    for special in (False, True):
        picked = [i for i, r in enumerate(rendered) if r.special is special and r.text.strip()]
        if not picked:
            continue
        offsets = any(rendered[i].spans is not None for i in picked)
        try:
            encoded = tokenizer(
                [rendered[i].text for i in picked],
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
                f"the tokenizer cannot read a text ({' '.join(str(error).split())}); give the "
                "model's own tokenizer.json"
            ) from error
        for k, i in enumerate(picked):
            offsets_n2 = np.array(encoded["offset_mapping"][k]).reshape(-1, 2) if offsets else None
            ids = list(encoded["input_ids"][k])
            if rendered[i].close and eos is not None and ids[-1:] != [eos]:
                ids.append(eos)
            examples[i] = _example(ids, rendered[i].spans, offsets_n2)
    nothing = _example([], None, None)
    return [examples.get(i, nothing) for i in range(len(rendered))]


def _example(
    ids: list[int], spans: tuple[Span, ...] | None, offsets_n2: np.ndarray | None
) -> Example:
    """Mark as targets the tokens that share a character with a span, or all, but the first."""
    mask = np.full(len(ids), spans is None)
    if spans is not None and offsets_n2 is not None:
        for start, stop in spans:
            mask |= (offsets_n2[:, 1] > start) & (offsets_n2[:, 0] < stop)
    mask[:1] = False
    return Example(tokens=np.array(ids, np.int32), loss_mask=mask)
