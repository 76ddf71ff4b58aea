"""Reads inputs one after the other and says of each what came of it, one JSON object a line.

Started by the campaign as a process of its own, for what it reads may kill it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

MEMORY, SPACE, SECONDS = 256 * 2**20, 2 * 2**30, 10.0  # bytes beyond the start; of wall clock
REPOSITORY = Path(__file__).resolve().parents[2]
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
FORBIDDEN += ("pickle.find_class",)
_OWN = b"Ignored unknown kwarg option"  # tokenizers prints it itself, for each strange key


def status(field: str) -> int:
    """Returns a field of /proc/self/status in bytes."""
    with open("/proc/self/status") as lines:
        line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


class Watch:
    """Sees which files are opened, and whether anything is run."""

    def __init__(self, allowed: list[str]) -> None:
        self.allowed, self.on, self.seen = tuple(allowed), False, ""
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.seen = self.seen or f"{event} {args}"[:200]
        elif event == "open" and isinstance(args[0], str | bytes):
            path = os.path.abspath(os.fsdecode(args[0]))
            source = path.endswith((".py", ".pyx"))  # looked for by a traceback that is printed
            if not source and not path.startswith(self.allowed):
                self.seen = self.seen or f"open {path}"[:200]


def outcome(read: Any, folder: Path, watch: Watch, said: Path, loud: bool) -> dict[str, Any]:
    """Reads one input under limits; returns what came of it.

    Orbax's own threads print what a coroutine raised, at any time after; with ``loud`` that counts
    for nothing.
    """
    from jaxdistill.errors import UserError

    finding = ""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted from here
    before, began = status("VmRSS"), time.perf_counter()
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + SPACE, resource.RLIM_INFINITY))
    watch.on, watch.seen = True, ""
    kind = "accepted"
    try:
        read(folder)
    except UserError as e:
        kind = "refused"
        if len(str(e).splitlines()) != 1 or not str(e).isprintable():
            finding = f"not one line: {str(e)[:300]!r}"
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        watch.on = False
        finding = f"{type(e).__name__}: {str(e)[:300]}\n" + "".join(traceback.format_exc()[-3000:])
    watch.on = False
    seconds = time.perf_counter() - began
    memory = max(status("VmHWM") - before, 0)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sys.stdout.flush()
    sys.stderr.flush()
    printed = said.read_bytes()
    os.truncate(said, 0)
    if watch.seen:
        finding = finding or f"reaches out: {watch.seen}"
    if len([line for line in printed.splitlines() if line and _OWN not in line]) > 1 and not loud:
        finding = finding or f"prints: {printed[:1500]!r}"
    if memory > MEMORY:
        finding = finding or f"memory: {memory / 2**20:.0f} MiB"
    if seconds > SECONDS:
        finding = finding or f"time: {seconds:.1f} s"
    if finding:
        kind = "finding"
    return {"kind": kind, "finding": finding, "seconds": seconds, "memory": memory}


def prepared(name: str, root: Path) -> Any:
    """Makes the valid files and reads them once, which also loads what is loaded lazily."""
    from tests.fuzz.inputs import Inputs

    inputs = Inputs(name, root)
    for number in range(len(inputs.valid)):
        inputs.reader.read(inputs.copy(number))
    return inputs


def main() -> None:
    """Reads inputs START to STOP of a reader, bombs first; keeps those that are findings."""
    name, seed, start, stop, keep = sys.argv[1:]
    faulthandler.enable(open(os.devnull, "w"))
    root = Path(tempfile.mkdtemp(prefix="jaxdistill-fuzz-"))
    report = os.fdopen(os.dup(1), "w", buffering=1)
    said = root / "said"
    into = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(into, 1)
    os.dup2(into, 2)
    try:
        inputs = prepared(name, root)
    except BaseException as e:
        print(json.dumps({"broken": f"{type(e).__name__}: {e} {said.read_text()}"}), file=report)
        raise
    prefixes = [sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", str(REPOSITORY)]
    prefixes += ["/etc/localtime", "/usr/share/zoneinfo", "/usr/lib"]
    watch = Watch([str(root), *map(os.path.realpath, prefixes), *prefixes])
    os.truncate(said, 0)
    for number in range(int(start), int(stop)):
        print(json.dumps({"begin": number}), file=report)
        if number < len(inputs.bombs):
            folder, what = inputs.bomb(number)
        else:
            folder, what = inputs.damaged(int(seed), number)
        kept = Path(keep) / f"{name}-{seed}-{number}"
        found = outcome(inputs.reader.read, folder, watch, said, inputs.reader.slow)
        if found["finding"]:
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder, kept)
            (kept / "finding.txt").write_text(f"{what}\n{found['finding']}\n", errors="replace")
        print(json.dumps({"number": number, "what": what} | found), file=report)
    shutil.rmtree(root, ignore_errors=True)
    report.flush()
    os._exit(0)  # background threads of readers are not waited for


if __name__ == "__main__":
    main()
