"""What the library notes while it reads and writes models, shown by the command line.

Each module logs to its own logger. Packages that we import put a handler on the root logger, whose
lines name the module and the level.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator


class _Notes(logging.Handler):
    """The handler that prints a line for each note, once for equal ones."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self._lines:  # a model may be read twice in a run
            self._lines.add(line)
            print(f"note: {line}", file=sys.stderr)


@contextlib.contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Print the package's notes as plain lines on stderr."""
    logger, handler = logging.getLogger("jaxdistill"), _Notes()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
