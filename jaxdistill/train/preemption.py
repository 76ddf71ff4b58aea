"""SIGTERM and Ctrl-C: a run ends after the step under way, its state saved."""

from __future__ import annotations

import contextlib
import signal

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdistill._signals import Listener, Stopped, heard


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

    In another thread than the main one nothing is caught. A signal that the process was started to
    ignore stays ignored.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._stack = contextlib.ExitStack()
        self._listener: Listener | None = None

    def __enter__(self) -> StopRequest:
        self._listener = self._stack.enter_context(heard("note"))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        number = self._heard()
        self._stack.close()
        self._number, self._listener = number, None
        # A signal that came after the last look at the flag.
        if kind is None and self.asked():
            raise self.stopped("; go on with --resume")

    def _heard(self) -> int | None:
        return self._number if self._listener is None else self._listener.number

    def asked(self) -> bool:
        """Return whether a signal came, to this process or to another one of the run."""
        return agreed(self._heard() is not None)

    def stopped(self, rest: str) -> Stopped:
        """Return the error that ends the run; ``rest`` goes on after the signal's name."""
        return Stopped(self._heard() or signal.SIGTERM, rest)
