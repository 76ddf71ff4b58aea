"""The forms of a row, and how each becomes a text or a conversation.

A data set of Arrow columns gives every object the keys of all the others, as null. So columns that
hold objects travel through a ``datasets.Dataset`` as JSON text, and are parsed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxdistill.errors import UserError
from jaxdistill.models.json_text import parse_json

FORMS = (
    "'text'; 'messages' (a list of {role, content}); 'conversations' (a list of {from, value}); "
    "'prompt' and 'completion'; or 'instruction' and 'output' (and 'input')"
)
NESTED = ("messages", "conversations", "prompt", "completion", "tools")  # may travel as JSON text
FIELDS = (*NESTED, "text", "instruction", "input", "output", "system")
MOST = 1e6  # a weight; more would leave float32 in a sum

Form = Literal["text", "messages", "instruction", "completion"]
Message = dict[str, Any]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# Keys that would change what is trained on, with the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "function_call": (),
    "refusal": (),
    "audio": (),
    "image": (),
    "images": (),
    "videos": (),
    "documents": (),
    "tool_responses": (),
    "prefix": (),
    "mask": (),
    "train": (True, 1),
    "trainable": (True, 1),
    "loss": (True, 1),
}
_UNSUPPORTED_OF_ROW = (
    "functions",
    "chat_template_kwargs",
    "documents",
    "history",
    "image",
    "images",
    "videos",
    "audios",
)


class Conversation(NamedTuple):
    """A row as messages.

    Attributes:
        messages: mappings with a role, and the content as text where there is one.
        tools: JSON schemas of functions; None for none.
        weights: each message's weight in the loss.
        first: number of the first message that is no part of the prompt.
    """

    messages: list[Message]
    tools: list[Any] | None
    weights: list[float]
    first: int = 0


def row_form(row: Any, where: str) -> Form:
    """Tell which form a row has, and check it.

    Of several forms the first counts: messages, prompt and completion, conversations, instruction
    and output, text. A prompt and a completion of messages have the form ``messages``.

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
    form = _form(row, where)
    if form == "messages":
        conversation(row, where)
        return form
    names = {
        "text": ("text",),
        "instruction": ("instruction", "input", "output", "system"),
        "completion": ("prompt", "completion"),
    }
    for name in names[form]:
        if row.get(name) is not None and not isinstance(row[name], str):
            raise UserError(
                f"{where} has a {type(row[name]).__name__} in {name!r}; "
                "accepted: a string; correct the row"
            )
    if form == "instruction":
        _check_row(row, where)
    return form


def _form(row: Mapping[str, Any], where: str) -> Form:
    have = {name for name, value in row.items() if value is not None}
    if "messages" in have:
        return "messages"
    if {"prompt", "completion"} <= have:
        chats = [_is_chat(row[name]) for name in ("prompt", "completion")]
        if chats[0] != chats[1]:
            raise UserError(
                f"{where} has a prompt and a completion of different kinds; accepted: two strings, "
                "or two lists of messages"
            )
        return "messages" if chats[0] else "completion"
    if "conversations" in have:
        return "messages"
    if {"instruction", "output"} <= have:
        return "instruction"
    if "text" in have:
        return "text"
    raise UserError(
        f"{where} has the fields {', '.join(map(repr, row)) or '(none)'} with values in "
        f"{', '.join(sorted(map(repr, have))) or '(none)'}; accepted: {FORMS}; "
        "rename the fields or fill them"
    )


def _is_chat(value: Any) -> bool:
    """Tell whether a prompt or completion is a list of messages, or the JSON text of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value, constants=True)
        except ValueError:
            return False
        return bool(value) and all(isinstance(item, dict) and "role" in item for item in value)
    return isinstance(value, Sequence) and not isinstance(value, str)


def conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """Return a row of the form ``messages`` or ``instruction`` as a conversation.

    Raises:
        UserError: a message is not one, or has a key that would change what is trained on and is
            not supported.
    """
    _check_row(row, where)
    have = {name for name, value in row.items() if value is not None}
    first = 0
    if "messages" in have:
        raw = _listed(row["messages"], "messages", where)
    elif {"prompt", "completion"} <= have:
        prompt = _listed(row["prompt"], "prompt", where)
        first = len(prompt)
        raw = [*prompt, *_listed(row["completion"], "completion", where)]
    elif "conversations" in have:
        turns = _listed(row["conversations"], "conversations", where)
        raw = _system(row) + [_turn(turn, where) for turn in turns]
    else:
        extra = f"\n\n{row['input']}" if row.get("input") else ""
        raw = [
            *_system(row),
            {"role": "user", "content": row["instruction"] + extra},
            {"role": "assistant", "content": row["output"]},
        ]
    weights = [_message_weight(message, where) for message in raw]
    messages = [_message(m, f"{where} has a message {i}") for i, m in enumerate(raw, 1)]
    return Conversation(messages, _tools(row, where), weights, first)


def _check_row(row: Mapping[str, Any], where: str) -> None:
    for name in _UNSUPPORTED_OF_ROW:
        if row.get(name):
            raise UserError(
                f"{where} has a value in {name!r}, which would change the conversation and is not "
                "supported; remove it from the row"
            )


def _listed(value: Any, name: str, where: str) -> list[Any]:
    """Return a field that is a list, or the JSON text of one."""
    if isinstance(value, str):
        try:
            value = parse_json(value, constants=True)
        except ValueError:
            value = None
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value)
    if not good or not all(isinstance(item, Mapping) for item in value):
        raise UserError(
            f"{where} has {name!r} of another shape; accepted: a non-empty list of objects; "
            "correct the row"
        )
    return list(value)


def _system(row: Mapping[str, Any]) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _turn(turn: Mapping[str, Any], where: str) -> Message:
    """Return a {from, value} as a {role, content}."""
    if "role" in turn:
        return dict(turn)
    speaker, value = turn.get("from"), turn.get("value")
    rest = {name: x for name, x in turn.items() if name not in ("from", "value")}
    if speaker == "function_call" and isinstance(value, str):
        try:
            call = parse_json(value)
        except ValueError:
            call = None
        calls = call if isinstance(call, list) else [call]
        if not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
            raise UserError(
                f"{where} has a function_call that is not the JSON of a name and arguments; "
                "correct the row"
            )
        return rest | {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": c} for c in calls],
        }
    if speaker not in _ROLES:
        raise UserError(
            f"{where} has a turn from {speaker!r}; accepted: {', '.join(_ROLES)}, function_call; "
            "rename it"
        )
    return rest | {"role": _ROLES[speaker], "content": value}


def _message(message: Mapping[str, Any], what: str) -> Message:
    """Check a message and return it without its weight and its empty keys."""
    out = {k: v for k, v in message.items() if v is not None and k != "weight"}
    for key, harmless in _UNSUPPORTED.items():
        if out.get(key) and out[key] not in harmless or (harmless and key in out and not out[key]):
            raise UserError(
                f"{what} with {key!r}: {out[key]!r}, which would change what is trained on and is "
                "not supported; remove the key, or give the message a 'weight'"
            )
    if not isinstance(out.get("role"), str):
        raise UserError(f"{what} without a role; accepted: {{role, content}} with two strings")
    calls = out.get("tool_calls")
    if calls is not None and not calls:
        del out["tool_calls"]
    elif calls is not None and not (
        isinstance(calls, Sequence) and all(isinstance(call, Mapping) for call in calls)
    ):
        raise UserError(f"{what} with 'tool_calls' that are not a list of objects; correct the row")
    content = out.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = out["content"] = _joined(content, what)
    if not isinstance(content, str) and not (content is None and "tool_calls" in out):
        kind = "nothing" if content is None else f"a {type(content).__name__}"
        raise UserError(
            f"{what} with {kind} as its content; accepted: a string, a list of text parts, or null "
            "next to tool calls"
        )
    return out


def _joined(parts: Sequence[Any], what: str) -> str:
    """Join the parts of a content; only text can be trained on."""
    texts = []
    for part in parts:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            kind = part.get("type", "text")
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise UserError(f"{what} with a part of type {kind!r}; accepted: parts of type 'text'")
        texts.append(part["text"])
    return "".join(texts)


def _tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    if not row.get("tools") or row["tools"] == "[]":
        return None
    return [dict(tool) for tool in _listed(row["tools"], "tools", where)]


def _message_weight(message: Mapping[str, Any], where: str) -> float:
    return row_weight(message, f"{where} has a message with")


def row_weight(row: Mapping[str, Any], where: str) -> float:
    """Return a row's or a message's weight in the loss, 1 where it gives none."""
    weight = row.get("weight")
    if weight is None:
        return 1.0
    if type(weight) not in (int, float) or not 0 <= weight <= MOST:
        raise UserError(
            f"{where} has the weight {weight!r}; accepted: a number from 0 to {MOST:g}; correct it"
        )
    return float(weight)


def row_text(row: Mapping[str, Any]) -> str:
    """Return all that a row says, whatever its form."""
    match row_form(row, "a row"):
        case "text":
            return row["text"]
        case "completion":
            return row["prompt"] + row["completion"]
        case "instruction":
            parts = (row.get("system"), row["instruction"], row.get("input"), row["output"])
            return "\n".join(part for part in parts if part)
    return "\n".join(m.get("content", "") for m in conversation(row, "a row").messages)


def travelling(row: Mapping[str, Any], *, nulls: bool = True) -> dict[str, Any]:
    """Return a row whose fields of lists and objects are JSON text, as a ``Dataset`` can hold them.

    Args:
        row: any.
        nulls: False drops keys that are null at any depth: Arrow's columns of objects add those.
    """
    out = dict(row)
    for name in NESTED:
        value = out.get(name)
        if value is not None and not isinstance(value, str):
            out[name] = json.dumps(value if nulls else _dense(value))
    return out


def _dense(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _dense(v) for k, v in value.items() if v is not None}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_dense(v) for v in value]
    return value
