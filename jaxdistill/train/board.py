"""TensorBoard's events, written at once and in no thread of their own.

tensorboardX's ``SummaryWriter`` hands events to a thread through a queue of ten; where that
thread's write fails, as on a full disk, the queue fills and the run waits for it for ever.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FLUSH = 30.0  # seconds


class Board:
    """Append scalars to an events file; where one cannot be written, give up for the run.

    The events are a copy of ``metrics.jsonl`` for the eye: no run ends for them.
    """

    def __init__(self, directory: Path, first: int) -> None:
        """Begin a file in a directory; what other files there hold of steps from ``first`` falls.

        Args:
            directory: is made where it is not there.
            first: the step of the first row.
        """
        # Here, for tensorboardX imports torch where that is.
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter

        self._events: Any = event_pb2
        self._writer: Any = None
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{first}"
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(str(directory / name))
        self._write(file_version="brain.Event:2")
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(step=first, session_log=start)
        self._flushed = time.monotonic()

    def add(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write one row."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write(step=step, summary=scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH:
            self._flushed = time.monotonic()
            self._safely("flush")

    def close(self) -> None:
        """Write what is held back."""
        self._safely("close")
        self._writer = None

    def _write(self, **event: Any) -> None:
        made = self._events.Event(wall_time=time.time(), **event)
        self._safely("write", made.SerializeToString())

    def _safely(self, action: str, *arguments: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, action)(*arguments)
        except OSError:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None
