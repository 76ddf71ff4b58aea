"""Text files that others wrote, plain or gzip-compressed, read within limits."""

from __future__ import annotations

import contextlib
import gzip
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError

MAX_LINE = 16 * 2**20  # characters
MAX_RATIO, EXEMPT = 200, 64 * 2**20  # text compresses to a third or a tenth, a bomb to a thousandth
_PIECE = 2**20


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file; gzip where the name ends in .gz, byte order mark skipped.

    Raises:
        UserError: a line has more than ``MAX_LINE`` characters, or the compressed file more than
            ``MAX_RATIO`` times its bytes (``EXEMPT`` characters are read in any case).
        OSError, EOFError, zlib.error, UnicodeDecodeError: the file cannot be read.
    """
    with _opened(path) as (file, allowed):
        number, total = 0, 0
        while line := file.readline(MAX_LINE + 1):
            number, total = number + 1, total + len(line)
            if len(line) > MAX_LINE:
                raise UserError(
                    f"{path}:{number} has more than {MAX_LINE} characters; accepted: one row a "
                    "line; cut the text into several rows"
                )
            _check_total(path, total, allowed)
            yield line


def read_text(path: Path) -> str:
    """Return a whole file; see ``read_lines`` for what is accepted, but for the lines' length."""
    with _opened(path) as (file, allowed):
        pieces, total = [], 0
        while piece := file.read(_PIECE):
            pieces.append(piece)
            total += len(piece)
            _check_total(path, total, allowed)
    return "".join(pieces)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, float | int]]:
    """Open a file; also give how many characters of it may be read."""
    if not path.is_file():
        raise UserError(f"{str(path)!r} is no file; give the path of an existing file")
    compressed = path.name.lower().endswith(".gz")
    allowed = max(EXEMPT, MAX_RATIO * path.stat().st_size) if compressed else math.inf
    opened: Any = gzip.open if compressed else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        yield file, allowed


def _check_total(path: Path, total: int, allowed: float | int) -> None:
    if total > allowed:
        raise UserError(
            f"{str(path)!r} has {path.stat().st_size} bytes and unpacks to more than {total}; "
            f"accepted: {MAX_RATIO} times as many; give the file uncompressed if you trust it"
        )
