"""Which characters of a rendered conversation the assistant says.

An answer begins where the generation prompt ends and ends with the end of turn that the template
writes. Nothing is guessed: a template whose answers cannot be located is refused.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxdistill.errors import UserError
from jaxdistill.models.chat_template import (
    Marked,
    Span,
    TemplateError,
    generation_spans,
    render,
    render_marked,
    source_of,
)
from jaxdistill.models.tokenizer import Tokenizer

Message = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")  # one thing, by three names
_PIECE = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|.", re.DOTALL)
_PROBE = "jaxdistillprobe{}x"
_REMEDY = "use --loss-on all, or a template with {% generation %} marks"


class Chat(NamedTuple):
    """A conversation as the template takes it, and the text that the template makes of it.

    Attributes:
        tokenizer: owner of the template.
        messages: with tool arguments and empty contents in the form that the template accepts.
        tools: JSON schemas, None for none.
        text: the rendered text.
        where: the row's place, for messages.
    """

    tokenizer: Tokenizer
    messages: list[Message]
    tools: list[Any] | None
    text: str
    where: str


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: list[Any] | None, where: str
) -> Chat:
    """Render a conversation, and check that the template writes all of it.

    Templates differ in whether they take the arguments of a tool call as an object or as JSON text,
    and a missing content as missing or as empty: the first form that the template accepts is used.

    Raises:
        UserError: the template rejects every form, or leaves out a message, a tool or a tool call.
    """
    first: TemplateError | None = None
    for form in _forms(messages):
        try:
            text = render(tokenizer, form, tools=tools)
        except TemplateError as error:
            first = first or error
            continue
        chat = Chat(tokenizer, form, tools, text, where)
        _check_written(chat)
        return chat
    raise UserError(
        f"{where} is rejected by the tokenizer's chat template ({first}); accepted: the roles and "
        "the order that the template knows"
    ) from first


def _forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the messages in each form that a template may ask for, without repeats."""
    done: list[list[Message]] = []
    for as_text, empty in itertools.product((False, True), repeat=2):
        form = [_form(message, as_text, empty) for message in messages]
        if form not in done:
            done.append(form)
            yield form


def _form(message: Message, as_text: bool, empty: bool) -> Message:
    if empty and "content" not in message:
        message = message | {"content": ""}
    if "tool_calls" not in message:
        return message
    return message | {"tool_calls": [_call(call, as_text) for call in message["tool_calls"]]}


def _call(call: Any, as_text: bool) -> Any:
    """Return a tool call with its arguments as an object, or as JSON text."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], as_text)}
    arguments = call.get("arguments")
    if as_text and not isinstance(arguments, str | None):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except ValueError:
            return call
        return {**call, "arguments": value} if isinstance(value, dict) else call
    return call


def _check_written(chat: Chat) -> None:
    """Raise ``UserError`` where the template leaves out something that the row says."""
    source = source_of(chat.tokenizer, chat.tools)

    def left_out(what: str) -> UserError:
        return UserError(
            f"{chat.where} has {what}, which the tokenizer's chat template does not write; remove "
            "it from the row, or use a tokenizer whose template writes it"
        )

    for tool in chat.tools or []:
        if (name := _name(tool)) and name not in chat.text:
            raise left_out(f"the tool {name!r}")
    missing = []
    for number, message in enumerate(chat.messages):
        for call in message.get("tool_calls", ()):
            if (name := _name(call)) and name not in chat.text:
                raise left_out(f"a call of {name!r} in message {number + 1}")
        if any(message.get(key) for key in REASONING) and not any(
            key in source for key in REASONING
        ):
            raise left_out(f"reasoning in message {number + 1}")
        if message.get("content", "").strip() not in chat.text:
            missing.append(number)
    if missing:  # the template changes these: does it write them at all?
        probe = _probe(chat, missing)
        for number in missing:
            if probe is not None and _PROBE.format(number) not in probe.text:
                raise left_out(
                    f"a content in message {number + 1} ({chat.messages[number]['role']})"
                )


def _name(item: Any) -> str:
    """Return the name of a tool or of a tool call, empty if it has none."""
    function = item.get("function", item) if isinstance(item, Mapping) else {}
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _probe(chat: Chat, numbers: Sequence[int]) -> Marked | None:
    """Render the conversation with other contents in some messages; None if that is rejected."""
    changed = [
        message | {"content": _PROBE.format(number)} if number in numbers else message
        for number, message in enumerate(chat.messages)
    ]
    try:
        marked = render_marked(chat.tokenizer, changed, tools=chat.tools)
        return marked or Marked(render(chat.tokenizer, changed, tools=chat.tools), [])
    except TemplateError:
        return None


def turn_spans(chat: Chat) -> list[Span]:
    """Return for each message the characters that the template writes for it, headers included.

    Raises:
        UserError: the template does not write the messages one after the other.
    """
    marked = render_marked(chat.tokenizer, chat.messages, tools=chat.tools)
    if marked is None or any(len(turn) > 1 for turn in marked.turns):
        raise _unlocatable(chat, "the template does not write the messages one by one")
    spans, at = [], 0
    for turn in marked.turns:
        start, stop = turn[0] if turn else (at, at)
        if start < at:
            raise _unlocatable(chat, "the template does not keep the messages in order")
        spans.append((start, stop))
        at = stop
    return spans


def answer_spans(chat: Chat) -> dict[int, tuple[Span, ...]]:
    """Return for each message of the assistant the characters that it says, with its end of turn.

    Where a template marks them with ``{% generation %}``, they are what transformers' assistant
    mask covers. Otherwise an answer is what the template writes for the message, without the
    generation prompt before it and the white space after its end of turn.

    Raises:
        UserError: an answer is empty, lacks its end of turn, or cannot be located.
    """
    turns = turn_spans(chat)
    said = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    _check_own(chat, turns, said)
    try:
        marked = generation_spans(chat.tokenizer, chat.messages, chat.tools)
    except TemplateError as error:
        raise _unlocatable(chat, str(error)) from error
    ends = _ends(chat)
    found = {}
    for i in said:
        start, stop = turns[i]
        limit = next(
            (turns[j][0] for j in range(i + 1, len(turns)) if turns[j][1] > turns[j][0]), None
        )
        if start == stop:
            raise _unlocatable(
                chat, f"the template does not write message {i + 1} as a turn of its own"
            )
        stop = _with_end(chat, i, start, stop, limit, ends)
        if marked is None:
            found[i] = ((_beginning(chat, turns, i), stop),)
        else:
            found[i] = tuple((a, b) for a, b in marked if start <= a < stop)
            rest = chat.text[max((b for _, b in found[i]), default=start) : stop]
            if found[i] and rest.strip():
                raise _unlocatable(
                    chat,
                    f"its {{% generation %}} marks leave out the end of turn {rest.strip()[:40]!r}",
                )
        if not "".join(chat.text[a:b] for a, b in found[i]).strip():
            raise _unlocatable(chat, f"the template writes nothing for message {i + 1}")
    if said and marked is None and said[-1] == len(turns) - 1:
        _check_end(chat, found[said[-1]][0], said[-1])
    return found


def _check_own(chat: Chat, turns: list[Span], said: list[int]) -> None:
    """Raise ``UserError`` if another message's text is written inside an assistant's turn."""
    suspects = set()
    for i, j in itertools.product(said, range(len(turns))):
        content = chat.messages[j].get("content", "").strip()
        own = json.dumps(chat.messages[i], ensure_ascii=False)
        if (
            j not in said
            and content
            and content in chat.text[slice(*turns[i])]
            and content not in own
        ):
            suspects.add(j)
    probe = _probe(chat, sorted(suspects)) if suspects else None
    if suspects and (probe is None or not probe.turns):
        raise _unlocatable(chat, "the template does not write the messages one by one")
    for i, j in itertools.product(said, sorted(suspects)):
        assert probe is not None
        if any(_PROBE.format(j) in probe.text[slice(*turn)] for turn in probe.turns[i]):
            raise _unlocatable(
                chat, f"the template writes message {j + 1} inside of message {i + 1}"
            )


def _ends(chat: Chat) -> list[str]:
    """Return the tokens that can end a turn, special and added ones, longest first."""
    added = {str(token.content) for token in chat.tokenizer.added_tokens_decoder.values()}
    return sorted(added | set(chat.tokenizer.all_special_tokens), key=len, reverse=True)


def _with_end(
    chat: Chat, i: int, start: int, stop: int, limit: int | None, ends: Sequence[str]
) -> int:
    """Return where an answer ends, with an end that the template writes after the turn's loop."""
    text = chat.text
    own = text[start:stop].rstrip()
    stop = start + len(own) if own.endswith(tuple(ends)) else stop
    gap = text[stop : len(text) if limit is None else limit]
    after, at = 0, len(gap) - len(gap.lstrip())
    while token := next((t for t in ends if t and gap.startswith(t, at)), None):
        after = at = at + len(token)
        at += len(gap[at:]) - len(gap[at:].lstrip())
    if gap[at:].strip():
        raise _unlocatable(
            chat,
            f"the template writes {gap[at:].strip()[:40]!r} between message {i + 1} and the next",
        )
    stop += after
    eos = chat.tokenizer.eos_token
    if limit is not None and eos and text[stop:].lstrip().startswith(str(eos)):
        stop = text.index(str(eos), stop) + len(str(eos))
    return stop


def _check_end(chat: Chat, span: Span, i: int) -> None:
    """Raise ``UserError`` if the template ends the last answer with nothing at all."""
    content = chat.messages[i].get("content", "")
    if content.strip() and chat.text[slice(*span)].endswith((content, content.strip())):
        raise _unlocatable(chat, f"the template writes no end of turn after message {i + 1}")


def _beginning(chat: Chat, turns: list[Span], i: int) -> int:
    """Return where an answer begins: after as much of the generation prompt as the text repeats."""
    start, stop = turns[i]
    before = next((j for j in reversed(range(i)) if turns[j][1] > turns[j][0]), None)
    header = _header(chat, chat.messages[:i], before, chat.text[:start]) if i else None
    if header is not None:
        at = start if before is None else turns[before][1]
        return max(start, _repeated(chat.text, header, at, stop))
    # The conversation begins here, or the template takes no shorter one.
    header = _header(chat, [{"role": "user", "content": "?"}], 0, None) or ""
    pieces = _PIECE.findall(header.strip())
    if pieces:  # before it may be BOS, or a system message of the template's own
        places = re.finditer(re.escape(pieces[0]), chat.text[start:stop])
        ends = [
            (_repeated(chat.text, header, at, stop), at)
            for at in (start + m.start() for m in places)
        ]
        if ends:
            return max(ends, key=lambda end: (end[0] - end[1], -end[1]))[0]
    bos = str(chat.tokenizer.bos_token or "")
    at = start + len(bos) if bos and chat.text.startswith(bos, start) else start
    content = chat.messages[i].get("content", "").strip()
    if pieces or not chat.text[at:stop].lstrip().startswith(content):
        raise _unlocatable(chat, f"the generation prompt is not written before message {i + 1}")
    return at


def _repeated(text: str, header: str, at: int, stop: int) -> int:
    """Return where a text stops to repeat a generation prompt, in whole words and tags."""
    for piece in _PIECE.findall(header):
        if not text.startswith(piece, at) or at + len(piece) > stop:
            break
        at += len(piece)
    return at


def _header(chat: Chat, messages: list[Message], last: int | None, head: str | None) -> str | None:
    """Return what the generation prompt adds after the last of some messages."""
    try:
        marked = render_marked(chat.tokenizer, messages, tools=chat.tools, prompt=True)
    except TemplateError:
        marked = None
    if marked is not None and last is not None and marked.turns[last]:
        return marked.text[marked.turns[last][-1][1] :]
    if marked is not None and head is not None and marked.text.startswith(head):
        return marked.text[len(head) :]
    if head is not None:
        return None
    raise _unlocatable(chat, "the template writes no generation prompt after a question")


def _unlocatable(chat: Chat, why: str) -> UserError:
    return UserError(
        f"{chat.where} is rendered by the tokenizer's chat template so that its answers are not "
        f"located ({why}); {_REMEDY}"
    )
