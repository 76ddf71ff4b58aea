"""Text files that others wrote, plain or gzip-compressed, read within limits."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdistill._memory import check_memory
from jaxdistill.errors import UserError

MAX_LINE = 16 * 2**20  # characters
MAX_RATIO, EXEMPT = 100, 16 * 2**20  # text shrinks to a third or a tenth, a bomb to a thousandth
_PIECE = 2**20
# Bytes of memory that a byte of a file takes, measured: rows as Python objects and as columns; one
# document, which is tokenized whole, at 4 bytes a token.
ROWS, DOCUMENT = 8, 60


def read_lines(path: Path, memory: int = ROWS) -> Iterator[str]:
    """Yield the lines of a UTF-8 file; gzip where the name ends in .gz, byte order mark skipped.

    Args:
        path: the file.
        memory: bytes of memory that a byte of it takes, by the time that it is made use of.

    Raises:
        UserError: a line has more than ``MAX_LINE`` characters, the compressed file unpacks to more
            than ``MAX_RATIO`` times its bytes (``EXEMPT`` bytes are read in any case), or the file
            takes more memory than there is.
        OSError, EOFError, zlib.error, UnicodeDecodeError: the file cannot be read.
    """
    with _opened(path, memory) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise UserError(
                    f"{path}:{number} has more than {MAX_LINE} characters; accepted: one row a "
                    "line; cut the text into several rows"
                )
            yield line


def read_text(path: Path, memory: int = ROWS) -> str:
    """Return a whole file; see ``read_lines`` for what is accepted, but for the lines' length."""
    with _opened(path, memory) as file:
        return file.read()


def _opened(path: Path, memory: int) -> Any:
    """Open a file for reading, after one compressed was unpacked once to see how large it is."""
    if not path.is_file():
        raise UserError(f"{str(path)!r} is no file; give the path of an existing file")
    size = path.stat().st_size
    if not path.name.lower().endswith(".gz"):
        check_memory(repr(str(path)), size, memory)
        return path.open(encoding="utf-8-sig")
    left = max(EXEMPT, MAX_RATIO * size)
    with gzip.open(path, "rb") as file:
        while piece := file.read(_PIECE):
            left -= len(piece)
            if left < 0:
                raise UserError(
                    f"{str(path)!r} has {size} bytes and unpacks to more than {MAX_RATIO} times as "
                    "many; give the file uncompressed if you trust it"
                )
    check_memory(f"{str(path)!r}, unpacked,", max(EXEMPT, MAX_RATIO * size) - left, memory)
    return gzip.open(path, "rt", encoding="utf-8-sig")
