"""Is a signal lost? SIGTERM and Ctrl-C at random moments of a run's first seconds.

    python -m benchmarks.faults.early_signals --signals 60

Each run is a fresh process, imports included. It must end within a few seconds, by the signal or
with its exit code, and must not have finished.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.faults.job import Job

PATIENCE = 12.0  # seconds to end in: the grace of a run, and a busy machine


def main() -> None:
    """Send the signals, print each run's end and the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--signals", type=int, default=60)
    parser.add_argument("--within", type=float, default=20.0, help="seconds of a run's life")
    o = parser.parse_args()
    # A shell's background jobs ignore Ctrl-C, and what they start would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng, ends = np.random.default_rng(0), collections.Counter()
    slowest, lost = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder))
        for i in range(o.signals):
            number = (signal.SIGTERM, signal.SIGINT)[i % 2]
            out = Path(folder) / f"run{i}"
            with (out.with_suffix(".err")).open("wb") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-m", "jaxdistill", *job.arguments, "--out", str(out)],
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                )
                moment = float(rng.uniform(0.1, o.within))
                time.sleep(moment)
                early = process.poll() is None
                began = time.monotonic()
                if early:
                    os.kill(process.pid, number)
                try:
                    code = process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    code = process.wait()
                    lost += 1
                    print(f"LOST: {number.name} after {moment:.2f} s", flush=True)
                    continue
            seconds = time.monotonic() - began
            if not early:
                ends["ended before its signal"] += 1
                continue
            slowest = max(slowest, seconds)
            ends[f"{number.name}: code {code}"] += 1
            if code == 0 or "Traceback" in out.with_suffix(".err").read_text(errors="replace"):
                lost += code == 0
                print(f"code {code}: {number.name} after {moment:.2f} s; {out.name}", flush=True)
                print(out.with_suffix(".err").read_text(errors="replace")[-600:], flush=True)
    for end, count in sorted(ends.items()):
        print(f"{end}: {count}")
    print(f"{lost} of {o.signals} lost; the slowest ended after {slowest:.1f} s")


if __name__ == "__main__":
    main()
