"""The directory a run leaves behind: what was asked, what happened, and where everything lies."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxdistill.errors import UserError
from jaxdistill.models.json_text import parse_json, read_object

_PACKAGES = ("jaxdistill", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)


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


class RunDirectory:
    """Keep one run's ``config.json``, ``metrics.jsonl``, TensorBoard events and results.

    A directory belongs to one configuration: to open it again needs ``resume`` and the same
    options.
    """

    def __init__(self, path: Path, options: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        known = path / "config.json"
        if known.is_file():
            before = _options_of(known)
            differs = [k for k, v in options.items() if before.get(k) != v]
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
        elif resume:
            raise UserError(f"{path} holds no run to resume; start it without --resume")
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not a run; choose another --out")
        else:
            try:
                path.mkdir(parents=True, exist_ok=True)
                write_json(known, {"options": dict(options), "environment": _environment()})
            except OSError as e:
                raise UserError(
                    f"{path} cannot be written ({e.strerror or e}); choose another --out"
                ) from None
        self._board: Any = None

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
        for log in {"metrics.jsonl", *(path.name for path in self.path.glob("*.jsonl"))}:
            kept = [row for row in read_metrics(self.path, log) if row["step"] <= step]
            part = self.path / f"{log}.part"
            try:
                part.write_text("".join(json.dumps(row) + "\n" for row in kept))
                os.replace(part, self.path / log)
            except OSError as e:
                raise UserError(
                    f"{self.path / log} cannot be written ({e.strerror or e}); move it away"
                ) from None

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Append one row to ``metrics.jsonl`` and to TensorBoard."""
        row = {"step": step} | {k: float(v) for k, v in values.items()}
        with (self.path / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(row) + "\n")
        if self._board is None:
            from tensorboardX import SummaryWriter  # here, for it imports torch where that is

            self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush TensorBoard's events."""
        if self._board is not None:
            self._board.close()


def _options_of(config: Path) -> dict[str, Any]:
    """Return the options a run was started with; raise ``UserError`` where it is no run's file."""
    try:
        return dict(read_object(config)["options"])
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
