"""SIGTERM and Ctrl-C: a run ends after the step under way, its state saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """End a run that a signal asked to end.

    The command line prints its line and exits with ``exit_code``: 128 and the signal's number, 143
    for SIGTERM and 130 for SIGINT.
    """

    def __init__(self, number: int, rest: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{rest}")
        self.exit_code = 128 + number


def agreed(flag: bool) -> bool:
    """Return whether any process says yes; every process of a run must ask at the same place.

    A step of a run on several processes is a collective operation, so all must stop after the same
    one. (Orbax's ``reached_preemption`` agrees too, but on a later step, and hears only signals
    that jax's own handler catches: SIGTERM, and not where Python handles it.)
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


class StopRequest(contextlib.AbstractContextManager):
    """Turn SIGTERM and SIGINT into a flag while a loop runs; a second signal ends at once.

    Python hands signals to the main thread; in another one nothing is caught. A signal that the
    process was started to ignore stays ignored.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # pyright: ignore[reportArgumentType]
        # A signal that came after the last look at the flag.
        if kind is None and self.asked():
            raise self.stopped("; go on with --resume")

    def _note(self, number: int, _: FrameType | None) -> None:
        self._number = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)

    def asked(self) -> bool:
        """Return whether a signal came, to this process or to another one of the run."""
        return agreed(self._number is not None)

    def stopped(self, rest: str) -> Stopped:
        """Return the error that ends the run; ``rest`` goes on after the signal's name."""
        return Stopped(self._number or signal.SIGTERM, rest)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end what is under way as Ctrl-C does, by an error: what is open is closed.

    It is for work that leaves nothing half written; a second signal ends at once.
    """

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number, "; go on with --resume where the verb has it")

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
