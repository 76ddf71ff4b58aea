"""SIGTERM and Ctrl-C, from before the first slow import on: none is lost.

Only the standard library is imported here: the command line listens before it imports the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Literal

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 5.0  # seconds that what is under way has to end by itself
_REST = "; go on with --resume where the verb has it"

# exit: end the process at once. raise: raise `Stopped` in the main thread, and end the process if
# it goes on for all that (code that catches or ignores the error, a long call into C). note: only
# set a flag, for a loop that looks at it.
Mode = Literal["exit", "raise", "note"]


class Stopped(KeyboardInterrupt):
    """End a run that a signal asked to end.

    The command line prints its line and exits with ``exit_code``: 128 and the signal's number, 143
    for SIGTERM and 130 for SIGINT.
    """

    def __init__(self, number: int, rest: str = _REST) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{rest}")
        self.exit_code = 128 + number


class Listener:
    """What has been heard; a second signal ends the process at once.

    Python runs a handler in the main thread, between two of its instructions. A thread of our own
    hears of a signal at once, through the wake-up descriptor, whatever the main thread does.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.mode: Mode = "exit"
        self._written = self._handled = 0  # signals that the thread, the main thread heard of
        self._timer: threading.Timer | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # A signal that the process was started to ignore stays ignored.
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._handlers = {n: h for n, h in handlers.items() if h is not signal.SIG_IGN}
        self.install()
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def install(self) -> None:
        """Take the signals, also from a handler that a package set since: XLA's, with --hosts."""
        for number in self._handlers:
            signal.signal(number, self._handle)

    def close(self) -> None:
        """Give the signals back."""
        signal.set_wakeup_fd(self._before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # pyright: ignore[reportArgumentType]
        os.close(self._write)
        self._thread.join()
        os.close(self._read)
        if self._timer is not None:
            self._timer.cancel()

    def _listen(self) -> None:
        while byte := os.read(self._read, 1):
            if byte[0] in self._handlers:
                self._written += 1
                self._hear(byte[0])

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._handled += 1
        self._hear(number)
        if self.mode == "raise":
            raise Stopped(number)

    def _hear(self, number: int) -> None:
        """Do what can be done in any thread; a signal is heard of twice, in either order."""
        self.number = self.number or number
        if self.mode == "exit" or max(self._written, self._handled) > 1:
            end(number)
        if self.mode == "raise" and self._timer is None:
            self._timer = threading.Timer(GRACE, end, [number])
            self._timer.daemon = True
            self._timer.start()


_ending = threading.RLock()


def end(number: int) -> None:
    """End the process, without another word of Python's."""
    _ending.acquire()  # never released: of two threads the first one says it
    with contextlib.suppress(OSError):
        os.write(2, f"{Stopped(number)}\n".encode())
    os._exit(128 + number)


_listener: Listener | None = None


def is_command() -> bool:
    """Return whether this process is the command line, and not a program that imports us."""
    name = os.path.basename(sys.argv[0] if sys.argv else "")
    return name == "jaxdistill" or (name == "-m" and sys.orig_argv[1:3] == ["-m", "jaxdistill"])


def listen() -> None:
    """Listen until the process ends; it ends at once until ``heard`` says otherwise."""
    global _listener
    if _listener is None and threading.current_thread() is threading.main_thread():
        _listener = Listener()


@contextlib.contextmanager
def heard(mode: Mode) -> Iterator[Listener | None]:
    """Treat signals in one way within the context.

    Python gives signals to the main thread; in another one nothing is heard: None.
    """
    global _listener
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    own = _listener is None
    listener = _listener = _listener or Listener()
    before, listener.mode = listener.mode, mode
    listener.install()
    try:
        yield listener
    finally:
        listener.mode = before
        if own:
            _listener = None
            listener.close()
