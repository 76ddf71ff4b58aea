"""Gives damaged files to every reader of the library, and counts what is neither read nor refused.

python -m benchmarks.fuzz.campaign [--seconds N | --examples N] [--seed S] [readers...]
python -m benchmarks.fuzz.campaign --replay READER:NUMBER [--seed S]
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.fuzz.worker import MEMORY, REPOSITORY, SECONDS

NAMES = ("gguf", "safetensors", "hf", "config", "tokenizer", "quantized", "teacher_cache", "data")
NAMES += ("labelled", "pairing", "choices", "stored_set", "run_directory", "checkpoint")
SLOW = ("quantized", "checkpoint")  # read by orbax, about a second an input
RESULTS = Path(__file__).parent / "results"
FOUND = REPOSITORY / "runs" / "fuzz"
START, BATCH = 120, 2000  # seconds to start a worker in; inputs of one worker
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}


class Tally:
    """Counts what came of a reader's inputs."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.memory, self.seconds, self.spent = 0, 0.0, 0.0
        self.findings: list[dict[str, Any]] = []

    def add(self, found: dict[str, Any]) -> None:
        """Counts one input."""
        self.counts[found["kind"]] += 1
        self.memory = max(self.memory, found["memory"])
        self.seconds = max(self.seconds, found["seconds"])
        if found["kind"] == "finding":
            self.findings.append(found)
            print(f"  {found['number']} ({found['what']}): {found['finding'][:400]}", flush=True)


def run_worker(name: str, seed: int, start: int, stop: int, tally: Tally, until: float) -> int:
    """Runs one worker on inputs START to STOP, until it is done, dead or out of time.

    Returns the number of the input to go on with.
    """
    command = [sys.executable, "-m", "benchmarks.fuzz.worker", name, str(seed), str(start)]
    worker = subprocess.Popen(
        [*command, str(stop), str(FOUND)],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    at, begun = start, False
    try:
        while True:
            try:
                line = lines.get(timeout=4 * SECONDS if begun else START)
            except queue.Empty:
                worker.kill()
                tally.add(_lost(at, f"time: more than {4 * SECONDS:.0f} s"))
                return at + 1
            if not line:
                worker.wait()
                if not begun:
                    raise SystemExit(f"{name}: the worker ended with {worker.returncode}")
                if at < stop:
                    tally.add(_lost(at, f"the process ended with {worker.returncode}"))
                return at + 1
            said = json.loads(line)
            if "broken" in said:
                raise SystemExit(f"{name}: valid files are not read: {said['broken']}")
            if "begin" in said:
                at, begun = said["begin"], True
                continue
            tally.add(said)
            at += 1
            if at == stop or time.monotonic() > until:
                return at
    finally:
        worker.kill()
        worker.wait()


def _lost(number: int, finding: str) -> dict[str, Any]:
    lost = {"kind": "finding", "memory": 0, "seconds": 0.0, "what": "replay it to see which file"}
    return lost | {"number": number, "finding": finding}


def table(tallies: dict[str, Tally], seed: int) -> str:
    """Writes the counts as a Markdown table."""
    total = sum(sum(t.counts.values()) for t in tallies.values())
    minutes = sum(t.spent for t in tallies.values()) / 60
    lines = [
        f"{total:,} inputs, seed {seed}, {minutes:.0f} minutes. A finding: an exception that is no "
        f"`UserError`, a message or output of more than one line, more than {MEMORY >> 20} MiB or "
        f"{SECONDS:.0f} s for one input, a signal, a file opened elsewhere, anything run.\n",
        "| reader | inputs | accepted | refused | findings | largest memory, MiB | longest, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, t in tallies.items():
        counts = [t.counts[kind] for kind in ("accepted", "refused", "finding")]
        cells = [f"{n:,}" for n in (sum(counts), *counts)]
        lines.append(f"| {name} | {' | '.join(cells)} | {t.memory / 2**20:.0f} | {t.seconds:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the campaign; exits with 1 where there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="reader", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--seconds", type=float, help="of the whole run")
    parser.add_argument(
        "--examples", type=int, default=20_000, help="in all; fewer of slow readers"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", help="READER:NUMBER, one input alone")
    o = parser.parse_args()
    FOUND.mkdir(parents=True, exist_ok=True)
    if o.replay:
        name, number = o.replay.split(":")
        tally = Tally()
        run_worker(name, o.seed, int(number), int(number) + 1, tally, float("inf"))
        print(dict(tally.counts), *(f["finding"] for f in tally.findings), sep="\n")
        return
    names = [name for name in NAMES if name in o.readers or not o.readers]
    weights = {name: 0.02 if name in SLOW else 1.0 for name in names}
    tallies: dict[str, Tally] = {}
    for name in names:
        share = weights[name] / sum(weights.values())
        count = 10**9 if o.seconds else max(1, round(o.examples * share))
        began = time.monotonic()
        until = began + o.seconds / len(names) if o.seconds else float("inf")
        tally, at = Tally(), 0
        while at < count and time.monotonic() < until:
            stop = min(at + BATCH, count)
            at = run_worker(name, o.seed, at, stop, tally, until)
        tally.spent = time.monotonic() - began
        tallies[name] = tally
        print(f"{name}: {dict(tally.counts)} in {tally.spent:.0f} s", flush=True)
    text = table(tallies, o.seed)
    print(text)
    if not o.readers:
        rows = {
            name: {
                "inputs": sum(t.counts.values()),
                **{k: t.counts[k] for k in ("accepted", "refused", "finding")},
                "largest_memory_mib": round(t.memory / 2**20, 1),
                "longest_seconds": round(t.seconds, 3),
            }
            for name, t in tallies.items()
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "fuzz.md").write_text("# What damaged files do to every reader\n\n" + text)
        (RESULTS / "fuzz.json").write_text(
            json.dumps({"seed": o.seed, "readers": rows}, indent=2) + "\n"
        )
    sys.exit(any(t.findings for t in tallies.values()))


if __name__ == "__main__":
    main()
