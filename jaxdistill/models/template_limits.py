"""Bounds on what a chat template may take: a template is a program, written by others.

Jinja's sandbox keeps it from files and from loops over more than 100,000 numbers. Loops in loops
and doubled texts remain.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

SECONDS = 10.0
MEMORY = 2**30  # bytes beyond what the process has
LENGTH = 2**24  # characters of a rendered text


class LimitError(Exception):
    """A template that takes too long, or too much."""


class _Expired(BaseException):
    """The timer's exception. Jinja passes over an ``Exception`` while it compiles."""


@contextlib.contextmanager
def template_limits() -> Iterator[None]:
    """Bound the time and memory of a ``with`` block.

    Time is bounded in the main thread, by a timer's signal, unless the program has set that timer
    for itself. Memory is bounded on Linux, by the limit of the address space.

    Raises:
        LimitError: the block went beyond one of them.
    """
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_timer(SECONDS))
        stack.enter_context(_address_space())
        try:
            yield
        except MemoryError:
            raise LimitError(f"it takes more than {MEMORY / 2**30:g} GiB of memory") from None


def checked_length(text: str) -> str:
    """Return a rendered text; raise ``LimitError`` if it is too long."""
    if len(text) > LENGTH:
        raise LimitError(f"it writes {len(text)} characters, accepted: up to {LENGTH}")
    return text


@contextlib.contextmanager
def _timer(seconds: float) -> Iterator[None]:
    if signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def end(*_: object) -> None:
        raise _Expired

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Expired:
        raise LimitError(f"it takes more than {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _address_space() -> Iterator[None]:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    least = pages * os.sysconf("SC_PAGESIZE") + MEMORY
    if soft != resource.RLIM_INFINITY and soft <= least:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
