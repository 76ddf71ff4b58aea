"""Chat templates: rendering, and where each message is in the rendered text.

A template is a Jinja program. To learn which characters come from which message, its ``for`` loops
are rewritten to write a mark before and after each turn of the loop over messages. The marks are
then cut out, and the rest must be the text that the template itself writes: otherwise no answer is
given.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from jaxdistill.models.template_limits import checked_length, template_limits
from jaxdistill.models.tokenizer import Tokenizer

Message = Mapping[str, Any]
Span = tuple[int, int]

_TURN = "jaxdistill_turn"  # the key under which a message has its number while it is rendered
_OPEN, _CLOSE, _END = "\ufdd0", "\ufdd1", "\ufdd2"  # noncharacters: never in text
_MARK = re.compile(f"([{_OPEN}{_CLOSE}])(\\d+){_END}")
_CLOCK: ContextVar[datetime | None] = ContextVar("template_time", default=None)
_FORMAT = re.compile(r"""strftime_now\(\s*(?:'([^'\\]*)'|"([^"\\]*)")\s*\)""")


class TemplateError(ValueError):
    """A chat template that rejects a conversation, in one line."""


class Marked(NamedTuple):
    """A rendered conversation and its turns.

    Attributes:
        text: the rendered text.
        turns: for each message the characters that its turn of the template's loop wrote; empty
            where it wrote none (templates move the system message elsewhere).
    """

    text: str
    turns: list[list[Span]]


@contextlib.contextmanager
def template_time(when: datetime) -> Iterator[None]:
    """Fix the time that templates write (``strftime_now``) inside a ``with`` block."""
    token = _CLOCK.set(when)
    try:
        yield
    finally:
        _CLOCK.reset(token)


def source_of(tokenizer: Tokenizer, tools: Sequence[Any] | None = None) -> str:
    """Return the template that the tokenizer uses, of several named ones the one for tools."""
    try:
        return str(tokenizer.get_chat_template(None, list(tools) if tools else None))
    except Exception as error:  # none by the default name
        raise TemplateError(_line(error)) from error


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    prompt: bool = False,
    source: str | None = None,
) -> str:
    """Write messages through the chat template, as ``tokenizer.apply_chat_template`` does.

    Args:
        tokenizer: owner of the template.
        messages: at least one.
        tools: JSON schemas of the functions that the model may call.
        prompt: whether the header of the next answer follows.
        source: another template.

    Raises:
        TemplateError: the template rejects the messages, or goes beyond its limits.
    """
    source, table = _dated(source_of(tokenizer, tools) if source is None else source)
    try:
        with template_limits():
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                chat_template=source,
                tokenize=False,
                add_generation_prompt=prompt,
                **table,
            )
        return checked_length(str(text))
    except Exception as error:  # a template is a program: it can fail in every way
        raise TemplateError(_line(error)) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _dated(source: str) -> tuple[str, dict[str, Any]]:
    """Return a template that reads the date from a table, and the table, if the time is fixed."""
    when = _CLOCK.get()
    if when is None or "strftime_now" not in source:
        return source, {}
    formats = {match[1] if match[1] is not None else match[2] for match in _FORMAT.finditer(source)}
    dated = _FORMAT.sub(lambda m: "strftime_table.get" + m[0][len("strftime_now") :], source)
    if "strftime_now(" in dated:
        raise TemplateError("it writes the date in a format that it computes")
    return dated, {"strftime_table": {form: when.strftime(form) for form in formats}}


def writes_date(source: str) -> bool:
    """Tell whether a template writes today's date."""
    return "strftime_now" in source


def generation_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> list[Span] | None:
    """Return what a template puts between ``{% generation %}`` marks; None if it has no marks."""
    source = source_of(tokenizer, tools)
    if not re.search(r"\{%-?\s*generation\s*-?%\}", source):
        return None
    source, table = _dated(source)
    try:
        with template_limits():
            _, spans = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=list(tools) if tools else None,
                chat_template=source,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
                **table,
            )
    except Exception as error:
        raise TemplateError(_line(error)) from error
    return [(int(start), int(stop)) for start, stop in spans[0]]


def render_marked(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    prompt: bool = False,
) -> Marked | None:
    """Render messages and tell where each one is; None where the template cannot be followed."""
    text = render(tokenizer, messages, tools=tools, prompt=prompt)
    numbered = [{**message, _TURN: number} for number, message in enumerate(messages)]
    try:
        source = _with_marks(source_of(tokenizer, tools))
        marked = render(tokenizer, numbered, tools=tools, prompt=prompt, source=source)
    except (TemplateError, jinja2.TemplateError):
        return None
    return _without_marks(marked, text, len(messages))


def _without_marks(marked: str, text: str, count: int) -> Marked | None:
    """Cut the marks out; None unless the rest is the text and every mark has its partner."""
    pieces, at, length = [], 0, 0
    stack: list[tuple[int, int]] = []
    turns: list[list[Span]] = [[] for _ in range(count)]
    for mark in _MARK.finditer(marked):
        pieces.append(marked[at : mark.start()])
        length += mark.start() - at
        at, number = mark.end(), int(mark[2])
        if number >= count:
            return None
        if mark[1] == _OPEN:
            stack.append((number, length))
            continue
        if not stack or stack[-1][0] != number:
            return None
        _, start = stack.pop()
        if length > start:
            turns[number].append((start, length))
    pieces.append(marked[at:])
    return Marked(text, turns) if not stack and "".join(pieces) == text else None


@functools.lru_cache(maxsize=32)
def _with_marks(source: str) -> str:
    """Rewrite a template so that each loop writes marks around the turn of a numbered message.

    Text between tags becomes string literals, so that Jinja's rules for white space, which were
    applied here, do not apply again.
    """
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    out: list[str] = []
    stack: list[int | None] = []  # open blocks: the number of a loop over single names, or None
    loops = 0
    block: list[tuple[str, str]] | None = None
    for _, kind, value in environment.lex(source):
        if kind == "block_begin":
            block = []
        elif kind == "block_end" and block is not None:
            words = [v for k, v in block if k != "whitespace"]
            tag, before, after = words[0] if words else "", "", ""
            match tag:
                case "for":
                    loops += 1
                    stack.append(loops if words[2:3] == ["in"] else None)
                    after = _open(loops, words[1]) if words[2:3] == ["in"] else ""
                case "if":
                    stack.append(None)
                case "else" | "endfor" if stack and stack[-1]:
                    before = _close(stack[-1])
                case "continue" | "break":
                    before = _close(next((n for n in reversed(stack) if n), None))
            if tag in ("endfor", "endif") and stack:
                stack.pop()
            out.append(f"{before}{{% {''.join(v for _, v in block)} %}}{after}")
            block = None
        elif block is not None:
            block.append((kind, value))
        elif kind == "data":
            out.append("{{ " + json.dumps(value, ensure_ascii=False) + " }}")
        elif kind == "variable_begin":
            out.append("{{ ")
        elif kind == "variable_end":
            out.append(" }}")
        elif not kind.startswith(("comment", "raw", "line")):
            out.append(value)
    return "".join(out)


def _open(loop: int, name: str) -> str:
    turn = f"jaxdistill_{loop}"
    return f"{{% set {turn} = {name}.{_TURN} %}}" + _written(turn, _OPEN)


def _close(loop: int | None) -> str:
    return _written(f"jaxdistill_{loop}", _CLOSE) if loop else ""


def _written(turn: str, mark: str) -> str:
    return f'{{% if {turn} is defined %}}{{{{ "{mark}" ~ {turn} ~ "{_END}" }}}}{{% endif %}}'
