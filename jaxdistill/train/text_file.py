"""Text files that others wrote, plain or gzip-compressed, read within limits."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill.errors import UserError

MAX_LINE = 16 * 2**20  # characters
MAX_RATIO, EXEMPT = 100, 16 * 2**20  # text shrinks to a third or a tenth, a bomb to a thousandth
_PIECE = 2**20


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file; gzip where the name ends in .gz, byte order mark skipped.

    Raises:
        UserError: a line has more than ``MAX_LINE`` characters, or the compressed file unpacks to
            more than ``MAX_RATIO`` times its bytes (``EXEMPT`` bytes are read in any case).
        OSError, EOFError, zlib.error, UnicodeDecodeError: the file cannot be read.
    """
    with _opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise UserError(
                    f"{path}:{number} has more than {MAX_LINE} characters; accepted: one row a "
                    "line; cut the text into several rows"
                )
            yield line


def read_text(path: Path) -> str:
    """Return a whole file; see ``read_lines`` for what is accepted, but for the lines' length."""
    with _opened(path) as file:
        return file.read()


def _opened(path: Path) -> Any:
    """Open a file for reading, after one compressed was unpacked once to see how large it is."""
    if not path.is_file():
        raise UserError(f"{str(path)!r} is no file; give the path of an existing file")
    if not path.name.lower().endswith(".gz"):
        return path.open(encoding="utf-8-sig")
    size = path.stat().st_size
    left = max(EXEMPT, MAX_RATIO * size)
    with gzip.open(path, "rb") as file:
        while piece := file.read(_PIECE):
            left -= len(piece)
            if left < 0:
                raise UserError(
                    f"{str(path)!r} has {size} bytes and unpacks to more than {MAX_RATIO} times as "
                    "many; give the file uncompressed if you trust it"
                )
    return gzip.open(path, "rt", encoding="utf-8-sig")
