"""Progress of a known number of items: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import datetime
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY = 10.0  # seconds between lines


class ItemProgress(Progress):
    """A bar of description, items done, time elapsed and time left.

    Where there is no terminal (a batch job, nohup, a pipe), each task prints a plain line instead:
    at its first step, every ten seconds, and at its end.
    """

    def __init__(self, console: Console | None = None, *, fields: tuple[str, ...] = ()) -> None:
        """Make the bar.

        Args:
            console: where it is shown; standard error by default.
            fields: fields of the tasks that are shown too, such as a loss.
        """
        console = console or Console(stderr=True)
        self._fields = fields
        self._plain = not (console.is_terminal or console.is_jupyter)
        self._printed: dict[TaskID, float] = {}
        super().__init__(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *(TextColumn(f"{{task.fields[{name}]}}") for name in fields),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=self._plain,
        )

    def advance(self, task_id: TaskID, advance: int | float = 1) -> None:
        """Count items; see ``rich.progress.Progress.advance``."""
        super().advance(task_id, advance)
        self._print(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Change a task; see ``rich.progress.Progress.update``."""
        super().update(task_id, **changes)
        self._print(task_id)

    def _print(self, task_id: TaskID) -> None:
        if not self._plain:
            return
        now, task = self.get_time(), self._tasks[task_id]
        if task.finished or now - self._printed.get(task_id, -EVERY) >= EVERY:
            self._printed[task_id] = now
            self.console.print(self._line(task), highlight=False, soft_wrap=True, markup=False)

    def _line(self, task: Task) -> str:
        done = f"{task.description}: {task.completed:,.0f}"
        done += "" if task.total is None else f" of {task.total:,.0f}"
        texts = [done, *(str(task.fields[name]) for name in self._fields if task.fields.get(name))]
        if task.finished or task.time_remaining is None:
            elapsed = datetime.timedelta(seconds=round(task.elapsed or 0))
            return ", ".join([*texts, f"{elapsed} elapsed"])
        left = datetime.timedelta(seconds=round(task.time_remaining))
        return ", ".join([*texts, f"ETA {left}"])
