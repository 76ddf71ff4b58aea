"""Does a run survive what happens to runs? Kills, full disks and damaged files, and a count.

    python -m benchmarks.faults.campaign --rounds 50 [--only damages full_disks]

Writes ``results/faults.json`` and ``results/faults.md``. Each finished run is compared bit for bit
with one that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.job import (
    EVERY,
    STEPS,
    Job,
    being_written,
    checkpoints_of,
    damaged,
    differences,
    last_line,
    last_step,
    state_of,
    wait_for,
    words,
)
from jaxdistill.train.manifest import damage

RESULTS = Path(__file__).parent / "results"
PARTS = ("kills", "damages", "full_disks")


def hurt(job: Job, out: Path, how: str, rng: np.random.Generator, life: float) -> dict[str, Any]:
    """Start or resume a run, do one thing to it, and say what it left; ``ended`` if it was done."""
    before, stamp, began = checkpoints_of(out), changed(out), time.monotonic()
    process = job.start(out)
    if how == "kill -9, any time":
        until = began + rng.uniform(0, life)
        hit = wait_for(process, lambda: time.monotonic() > until)
    elif how == "kill -9, in a save":
        first = max(before, default=0) // EVERY + 1
        saves = min(STEPS // EVERY, int(rng.integers(first, first + 3)))
        hit = wait_for(
            process,
            lambda: any(int(p.name.split(".")[0]) >= saves * EVERY for p in being_written(out)),
        )
        time.sleep(rng.uniform(0, 0.03))
    else:
        target = int(rng.integers(min(last_step(out) + 1, STEPS), STEPS + 1))
        hit = wait_for(process, lambda: changed(out) != stamp and last_step(out) >= target)
    if hit and process.poll() is None:
        process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    code = process.wait(300)
    done, kept = last_step(out), checkpoints_of(out)
    newest = max(kept, default=0)
    return {
        "how": how,
        "seconds": round(time.monotonic() - began, 2),
        "code": code,
        "ended": code == 0,
        "said": last_line(out) if code not in (0, -9) else "",
        "last_step": done,
        "checkpoint": newest,
        "lost": done - newest if code != 0 and changed(out) != stamp else 0,
        "in_a_save": bool(being_written(out)),
        "finished_training": newest == STEPS,
        "damaged": damaged(out),
    }


def changed(out: Path) -> int:
    """Return when the metrics were last written; a resumed run first drops what it will redo."""
    path = out / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.is_file() else 0


def kills(job: Job, whole: Path, rounds: int, rng: np.random.Generator, life: float) -> Any:
    """Kill runs, resume and kill them again, until so many kills have hit; compare each end."""
    hits: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    ways = ("kill -9, any time", "kill -9, in a save", "SIGTERM")
    while len(hits) < rounds:
        out, own = job.work / f"chain{len(runs)}", []
        for _ in range(int(rng.integers(4, 10))):
            one = hurt(job, out, ways[len(hits) % 3], rng, life)
            if one["ended"]:
                break
            own.append(one)
            hits.append(one)
            print(f"kill {len(hits)}: {one}", flush=True)
            if one["finished_training"]:
                break
        code = 0 if (out / "results.json").is_file() else job.finish(out)
        runs.append({"kills": len(own), "code": code, "differs": differences(out, whole)})
        print(f"run {len(runs)}: {runs[-1]}", flush=True)
        shutil.rmtree(out)
    return {"hits": hits, "runs": runs}


def full_disks(job: Job, whole: Path, rounds: int, rng: np.random.Generator) -> Any:
    """Let a run fill a disk of a random size, then make it larger and resume."""
    size = sum(p.stat().st_size for p in whole.rglob("*") if p.is_file())
    found = []
    for i in range(rounds):
        place = job.work / f"disk{i}"
        place.mkdir()
        given = int(size * rng.uniform(0.05, 1.1))
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={given}", "tmpfs", str(place)],
            capture_output=True,
            check=False,
        )
        if mounted.returncode:
            return {"skipped": "mounting a small disk needs root"}
        try:
            out = place / "run"
            code = job.finish(out)
            text = words(out).read_text(errors="replace")
            one = {
                "bytes": given,
                "code": code,
                "said": last_line(out).replace(str(job.work), ""),
                "traceback": "Traceback" in text,
                "checkpoint": max(checkpoints_of(out), default=0),
                "half": len(being_written(out)),
                "damaged": damaged(out),
            }
            subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
            one["resumed"] = code and job.finish(out)
            one["differs"] = differences(out, whole)
            found.append(one)
            print(f"disk {i}: {one}", flush=True)
        finally:
            subprocess.run(["umount", str(place)], check=True)
    return {"rounds": found}


def files_of(step: Path) -> list[Path]:
    """Return the files of a checkpoint."""
    return sorted(p for p in step.rglob("*") if p.is_file())


def spoil(step: Path, how: str, rng: np.random.Generator) -> str:
    """Do one thing to a random file of a checkpoint; return its name."""
    files = [p for p in files_of(step) if p.stat().st_size]
    file = files[int(rng.integers(len(files)))]
    data = bytearray(file.read_bytes())
    if how == "a bit flipped":
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
    elif how == "a file cut off":
        file.write_bytes(data[: int(rng.integers(len(data)))])
    else:
        file.unlink()
    return file.relative_to(step).as_posix()


def damages(job: Job, whole: Path, rounds: int, rng: np.random.Generator) -> Any:
    """Damage the newest checkpoint of a stopped run, or both, and resume."""
    stopped = job.work / "stopped"
    process = job.start(stopped)
    assert wait_for(process, lambda: last_step(stopped) >= 22)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 143, last_line(stopped)
    kept = checkpoints_of(stopped)
    found = []
    for i in range(rounds):
        out = job.work / f"damaged{i}"
        shutil.copytree(stopped, out)
        how = ("a bit flipped", "a file cut off", "a file gone")[i % 3]
        both = i % 4 == 3
        spoiled = [spoil(out / "checkpoints" / str(step), how, rng) for step in kept[-1 - both :]]
        bad = damaged(out)
        code = job.finish(out)
        text = words(out).read_text(errors="replace")
        one = {
            "how": how,
            "files": spoiled,
            "noticed": bad,
            "code": code,
            "said": [line for line in text.splitlines() if "damaged" in line][:1],
            "traceback": "Traceback" in text,
            "differs": differences(out, whole) if code == 0 else None,
        }
        one["said"] = [line.replace(str(job.work), "") for line in one["said"]]
        found.append(one)
        print(f"damage {i}: {one}", flush=True)
        shutil.rmtree(out)
    return {"rounds": found, "bits": bits(stopped, kept[-1], rng)}


def bits(run: Path, step: int, rng: np.random.Generator) -> dict[str, int]:
    """Flip single bits all over a checkpoint: who notices, tensorstore or the manifest?"""
    where, arrays = run / "checkpoints" / str(step), state_of(run, step)
    count = {"flipped": 0, "manifest": 0, "tensorstore": 0, "silent": 0, "silent_and_unseen": 0}
    files = [p for p in files_of(where) if p.stat().st_size]
    sizes = np.array([p.stat().st_size for p in files], float)
    for _ in range(200):
        file = files[int(rng.choice(len(files), p=sizes / sizes.sum()))]
        good = file.read_bytes()
        data = bytearray(good)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        seen = damage(where) is not None
        try:
            wrong = state_of(run, step) != arrays
            count["silent"] += wrong
            count["silent_and_unseen"] += wrong and not seen
        except Exception:  # of many kinds
            count["tensorstore"] += 1
        count["manifest"] += seen
        count["flipped"] += 1
        file.write_bytes(good)
    return count


def tables(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of faults.md."""
    yield "# What happened to runs, and what became of them\n"
    yield (
        f"`jaxdistill quantize` on a tiny Llama, {STEPS} steps, a checkpoint every {EVERY}; "
        f"{report['life']:.1f} s left alone; {os.cpu_count()} CPU cores. `--rounds "
        f"{report['rounds']} --seed {report['seed']}`.\n"
    )
    hits, runs = report["kills"]["hits"], report["kills"]["runs"]
    yield (
        f"**{len(hits)} kills in {len(runs)} runs.** Ended runs that differ from the one left "
        f"alone: {sum(bool(r['differs'] or r['code']) for r in runs)}. Checkpoints that counted "
        f"and were damaged: {sum(len(h['damaged']) for h in hits)}.\n"
    )
    yield "| how | kills | while a checkpoint was written | steps lost, mean | most |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for how in sorted({h["how"] for h in hits}):
        own = [h for h in hits if h["how"] == how]
        held = sum(h["in_a_save"] for h in own)
        lost = [h["lost"] for h in own]
        yield f"| {how} | {len(own)} | {held} | {np.mean(lost):.1f} | {max(lost)} |"
    codes = sorted({h["code"] for h in hits if h["how"] == "SIGTERM"})
    yield f"\nExit codes after SIGTERM: {codes}.\n"
    disks = report["full_disks"]
    if "rounds" in disks:
        rounds = disks["rounds"]
        full = [r for r in rounds if r["code"]]
        yield (
            f"**{len(rounds)} disks** of 5 to 110 % of the room a run takes: {len(full)} ran full, "
            f"{sum(r['code'] == 2 for r in full)} of these runs ended with code 2, "
            f"{sum(r['traceback'] for r in full)} with a traceback, {sum(r['half'] for r in full)} "
            "half checkpoints left. With more room and `--resume` "
            f"{sum(not r['resumed'] and not r['differs'] for r in full)} ended bit-equal. "
            f"Last checkpoints: {sorted(r['checkpoint'] for r in full)}.\n"
        )
    else:
        yield f"Full disks: {disks['skipped']}.\n"
    rounds = report["damages"]["rounds"]
    yield "| damage | runs | bit-equal at the end | refused, code 2 | anything else |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for how in sorted({r["how"] for r in rounds}):
        own = [r for r in rounds if r["how"] == how]
        equal = sum(r["code"] == 0 and not r["differs"] for r in own)
        refused = sum(r["code"] == 2 and not r["traceback"] for r in own)
        yield f"| {how} | {len(own)} | {equal} | {refused} | {len(own) - equal - refused} |"
    b = report["damages"]["bits"]
    yield (
        f"\n**{b['flipped']} single bits flipped** in a checkpoint, by size of the files: "
        f"{b['tensorstore']} made the load fail, {b['silent']} made it return other values without "
        f"a word; the manifest noticed {b['manifest']} in all and missed {b['silent_and_unseen']} "
        "of the silent ones. The rest are in files with times and marks alone."
    )


def main() -> None:
    """Run all parts and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=50, help="kills at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="a directory to work in")
    parser.add_argument("--into", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    o = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        job = Job(o.work or Path(folder))
        whole, again = job.work / "whole", job.work / "again"
        for out in (whole, again):  # the first one compiles
            began = time.monotonic()
            assert job.finish(out) == 0, last_line(out)
            life = time.monotonic() - began
        assert not differences(again, whole), "two runs left alone differ: nothing to compare with"
        print(f"left alone: {life:.1f} s", flush=True)
        for part in o.only:
            rng = np.random.default_rng([o.seed, PARTS.index(part)])
            match part:
                case "kills":
                    found = kills(job, whole, o.rounds, rng, life)
                case "damages":
                    found = damages(job, whole, max(12, o.rounds // 4), rng)
                case _:
                    found = full_disks(job, whole, max(6, o.rounds // 8), rng)
            keep(o.into, {part: found, "rounds": o.rounds, "seed": o.seed, "life": life})


def keep(into: Path, found: dict[str, Any]) -> None:
    """Put what was found in the place of what the results held of it."""
    into.mkdir(exist_ok=True)
    path = into / "faults.json"
    report = (json.loads(path.read_text()) if path.is_file() else {}) | found
    path.write_text(json.dumps(report, indent=1) + "\n")
    if all(part in report for part in PARTS):
        (into / "faults.md").write_text("\n".join(tables(report)) + "\n")


if __name__ == "__main__":
    main()
