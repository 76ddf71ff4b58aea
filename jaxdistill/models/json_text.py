"""JSON that others wrote: parsed strictly, so that what is read is plain data of a sane shape."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MAX_DEPTH = 100
MAX_BYTES = 64 * 2**20  # of a file that is one JSON object; the largest indices have 10 MB
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes, *, constants: bool = False) -> Any:
    """Parse JSON in UTF-8.

    Args:
        text: one JSON value.
        constants: whether ``NaN``, ``Infinity`` and ``-Infinity``, which Python writes, are read.

    Raises:
        ValueError: it is no JSON; a key stands twice in an object; lists and objects are nested
            deeper than ``MAX_DEPTH``; or a string holds half a character (a lone surrogate).
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    hooks: dict[str, Any] = {} if constants else {"parse_constant": _no_number}
    try:
        value = json.loads(text, object_pairs_hook=_unique, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it holds half a character") from None
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that is one JSON object.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than ``MAX_BYTES``, or ``parse_json`` refuses it, or it is a list,
            a number or a string.
    """
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    value = parse_json(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice[:100]!r} stands twice in an object")
    return found


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
