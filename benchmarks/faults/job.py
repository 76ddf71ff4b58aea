"""The small real run that is hurt: starting it, reading what it left, comparing two of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill.cli import main
from jaxdistill.models.hub import load_model
from jaxdistill.paths import walk
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.manifest import damage
from jaxdistill.train.run_directory import read_metrics
from tests import tiny

STEPS, EVERY = 40, 5
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["benchmarks.faults.job", "matplotlib.pyplot", "transformers", "datasets", "tensorboardX"]
)


class Run:
    """A process that runs the command line: a fork of one that has imported all and begun nothing.

    Importing takes longer than the run; the rest is as a user starts it.
    """

    def __init__(self, arguments: list[str], errors: Path) -> None:
        self._process = _CONTEXT.Process(target=_main, args=(arguments, str(errors)))
        self._process.start()

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 600) -> int:
        """Wait for the end; return the exit code, below 0 for the signal that ended it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, "a run does not end"
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def _main(arguments: list[str], errors: str) -> None:
    """Be the command line."""
    with Path(errors).open("wb") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main(arguments)


class Job:
    """One configuration of `jaxdistill quantize` on a tiny model, started as its users start it."""

    def __init__(self, work: Path) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work = work
        model, data = tiny.save_model(work / "model"), tiny.save_text(work / "text.jsonl", 300)
        self.arguments = ["quantize", "--model", model, "--data", data, "--steps", str(STEPS)]
        self.arguments += ["--batch-size", "8", "--seq-len", "128", "--group-size", "32"]
        self.arguments += ["--lr", "1e-3", "--checkpoint-every", str(EVERY), "--signal-every", "-1"]
        self.arguments += ["--eval-every", "20", "--eval-tokens", "256"]
        # Compiled once, by the first run; the others start in seconds.
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HUB_OFFLINE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def start(self, out: Path) -> Run:
        """Start the run, or go on with it where there is one; its words go to ``OUT.err``."""
        resume = ["--resume"] if (out / "config.json").is_file() else []
        return Run([*self.arguments, "--out", str(out), *resume], words(out))

    def finish(self, out: Path) -> int:
        """Run to the end; return the exit code."""
        return self.start(out).wait()


def words(out: Path) -> Path:
    """Return where a run's standard error is: beside it, or beside the small disk it is on."""
    beside = out.parent if out.parent.is_mount() else out
    return beside.with_name(beside.name + ".err")


def last_line(out: Path) -> str:
    """Return the last line a run said."""
    lines = words(out).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def wait_for(process: Run, happened: Callable[[], bool]) -> bool:
    """Return whether something happened before the process ended."""
    while process.poll() is None:
        if happened():
            return True
        time.sleep(0.001)
    return False


def checkpoints_of(out: Path) -> list[int]:
    """Return the steps of the checkpoints that count."""
    return sorted(int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdigit())


def being_written(out: Path) -> list[Path]:
    """Return the checkpoints under way."""
    return list((out / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def last_step(out: Path) -> int:
    """Return the last step in the metrics."""
    rows = read_metrics(out)
    return rows[-1]["step"] if rows else 0


def damaged(out: Path) -> list[int]:
    """Return the checkpoints that count and are not what was written."""
    where = out / "checkpoints"
    return [step for step in checkpoints_of(out) if damage(where / str(step)) is not None]


def state_of(out: Path, step: int) -> list[bytes]:
    """Return every array of a checkpoint, as bytes."""
    with Checkpoints(out / "checkpoints", keep=9) as saved:
        like = jax.tree.map(
            lambda m: np.zeros(m.shape, m.dtype),
            saved._orbax.metadata(step).metadata,
            is_leaf=lambda m: hasattr(m, "shape"),
        )
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(saved._orbax.load(step, like))]


def differences(out: Path, other: Path) -> list[str]:
    """Return what of two finished runs is not bit for bit the same; times apart."""
    found = []
    student = [dict(walk(load_model(run).params)) for run in (out, other)]
    same = student[0].keys() == student[1].keys() and all(
        np.asarray(a).tobytes() == np.asarray(student[1][name]).tobytes()
        for name, a in student[0].items()
    )
    found += [] if same else ["student"]
    found += [] if state_of(out, STEPS) == state_of(other, STEPS) else ["optimizer state"]

    def timeless(run: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if "second" not in k} for r in read_metrics(run)]

    found += [] if timeless(out) == timeless(other) else ["metrics.jsonl"]
    results = [json.loads((run / "results.json").read_text()) for run in (out, other)]
    return found + ([] if results[0] == results[1] else ["results.json"])
