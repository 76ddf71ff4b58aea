"""The directory a run leaves behind: what was asked, what happened, and where everything lies."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxdistill._disk import (
    LOCK,
    DirectoryLock,
    append,
    is_full,
    reason_of,
    retried,
    write_whole,
)
from jaxdistill._orbax import check_array_path
from jaxdistill.errors import UserError
from jaxdistill.mesh import is_primary, on_primary
from jaxdistill.models.json_text import parse_json, read_object
from jaxdistill.train.board import Board

# Options that name a model or data: what counts is what they hold, where a run knows it.
_SOURCES = ("model", "teacher", "student", "data", "eval_data", "cache", "mix")
_PACKAGES = ("jaxdistill", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read_metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Read every whole row of one of a run's logs; one cut off by a kill is left out.

    So is what is no object with a whole number as its ``step``.
    """
    path = run / name
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line, constants=True)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to one of a run's logs, on the first process, for all.

    Raises:
        UserError: it cannot be written, for another reason than room; that is an ``OSError``, of
            which the run's end makes a line.
    """

    def write() -> None:
        try:
            retried(lambda: append(path, json.dumps(row) + "\n"))
        except OSError as e:
            if is_full(e):
                raise
            raise UserError(
                f"{path} cannot be written ({reason_of(e)}); look at the disk, then go on with "
                "--resume"
            ) from None

    on_primary(write, f"write {path}")


class RunDirectory(contextlib.AbstractContextManager):
    """Keep one run's ``config.json``, ``metrics.jsonl``, TensorBoard events and results.

    A directory belongs to one configuration: to open it again needs ``resume`` and the same
    options. It has one writer at a time, from the opening to ``close`` or the context's end; of
    several processes the first one writes, and stands for all.
    """

    def __init__(
        self,
        path: Path,
        options: Mapping[str, Any],
        *,
        resume: bool,
        contents: Mapping[str, str] | None = None,
    ) -> None:
        """Open it.

        Args:
            path: the directory.
            options: what makes the run what it is.
            resume: continue the run that is there.
            contents: fingerprints of the models and data, by what they are called. With them a
                resumed run may find its files in other places, but not with other contents.
        """
        self.path, self._contents = path, dict(contents or {})
        self._board: Board | None = None
        self._lock: DirectoryLock | None = None
        try:
            on_primary(lambda: self._open(options, resume), f"open {path}")
        except UserError:
            self.close()
            raise

    def _open(self, options: Mapping[str, Any], resume: bool) -> None:
        path = self.path
        began = _check(path, options, resume, self._contents)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = DirectoryLock(path)
            if not began:
                _check(path, options, resume, {})  # as it is now, with no other writer
                known = {"options": dict(options), "environment": _environment()}
                known |= {"contents": self._contents} if self._contents else {}
                write_json(path / "config.json", known)
        except OSError as e:
            raise UserError(
                f"{path} cannot be written ({e.strerror or e}); choose another --out"
            ) from None

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self.close()
        if error is not None and not isinstance(error, UserError) and is_full(error):
            raise UserError(no_space(self.path, error)) from None

    @property
    def checkpoints(self) -> Path:
        """Return where the training states lie."""
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """Return where the finished student lies, in the stored form."""
        return self.path / "student"

    def rewind(self, step: int) -> None:
        """Drop what the logs hold of steps after ``step``: the resumed run will write it again."""
        on_primary(lambda: self._rewind(step), f"write {self.path}")

    def _rewind(self, step: int) -> None:
        for log in {"metrics.jsonl", *(path.name for path in self.path.glob("*.jsonl"))}:
            kept = [row for row in read_metrics(self.path, log) if row["step"] <= step]
            try:
                write_whole(self.path / log, "".join(json.dumps(row) + "\n" for row in kept))
            except OSError as e:
                raise UserError(
                    f"{self.path / log} cannot be written ({reason_of(e)}); move it away"
                ) from None
        if self._board is not None:  # the next row begins a file that drops the later steps
            self._board.close()
            self._board = None

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Append one row to ``metrics.jsonl`` and to TensorBoard."""
        append_row(
            self.path / "metrics.jsonl", {"step": step} | {k: float(v) for k, v in values.items()}
        )
        if not is_primary():
            return
        if self._board is None:
            self._board = Board(self.path / "tensorboard", step)
        self._board.add(step, values)

    def close(self) -> None:
        """Flush TensorBoard's events, and let the next writer in."""
        if self._board is not None:
            self._board.close()
        if self._lock is not None:
            self._lock.close()
        self._board = self._lock = None


def no_space(run: Path, error: BaseException) -> str:
    """Say in one line that the disk is full, what is kept of a run, and what to do."""
    names = [p.name for p in (run / "checkpoints").glob("*")]
    kept = max((int(name) for name in names if name.isdigit()), default=None)
    what = "no checkpoint was saved yet" if kept is None else f"checkpoint {kept} is kept"
    return f"{run} has no room ({reason_of(error)}); {what}; free space, then go on with --resume"


def _check(
    path: Path, options: Mapping[str, Any], resume: bool, contents: Mapping[str, str]
) -> bool:
    """Return whether a directory holds this run; raise ``UserError`` if it can be neither."""
    check_array_path(path)
    known = path / "config.json"
    if known.is_file():
        before, stored = _started_with(known)
        compared = options.keys() - (_SOURCES if stored and contents else ())
        differs = [k for k, v in options.items() if k in compared and before.get(k) != v]
        if not resume:
            raise UserError(
                f"{path} already holds a run; pass --resume to go on with it, or choose "
                "another --out"
            )
        if differs:
            name = differs[0]
            raise UserError(
                f"{path} was started with {name}={before.get(name)!r}, now {options[name]!r} "
                "is given; resume with the same options, or choose another --out"
            )
        changed = [k for k in {**stored, **contents} if stored.get(k) != contents.get(k)]
        if stored and contents and changed:
            prints = (
                f"{k} {stored.get(k, 'none')}, now {contents.get(k, 'none')}" for k in changed
            )
            raise UserError(
                f"{path} was started with another {' and '.join(changed)} (fingerprint of the "
                f"{'; '.join(prints)}); resume with the same, or choose another --out"
            )
        return True
    if resume:
        raise UserError(f"{path} holds no run to resume; start it without --resume")
    # Left by a run that was killed before it began.
    ours = (LOCK, "config.json.part")
    if path.exists() and (not path.is_dir() or any(p.name not in ours for p in path.iterdir())):
        raise UserError(f"{path} exists and is not a run; choose another --out")
    return False


def _started_with(config: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a run's options and contents; raise ``UserError`` where it is not a run's file."""
    try:
        found = read_object(config)
        return dict(found["options"]), dict(found.get("contents", {}))
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{config.parent} exists and is not a run; choose another --out") from None


def _environment() -> dict[str, Any]:
    def installed(name: str) -> str:
        try:
            return version(name)
        except ModuleNotFoundError:
            return "not installed"

    return {
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "packages": {name: installed(name) for name in _PACKAGES},
    }
