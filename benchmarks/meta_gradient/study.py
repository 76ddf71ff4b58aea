"""What do time and memory of a meta-gradient cost as inner steps grow, beside PyTorch?

The gradient, by the synthetic inputs, of the real loss after K inner steps. All ways run in one
process, in interleaved rounds, and medians are reported; peak memory is that of a process of its
own that computes the gradient twice, over that of one that only imported and built the problem.
Writes ``results/meta_gradient.md``, ``.json`` and a picture.

    pip install torch==2.13.0 torchopt higher
    python -m benchmarks.meta_gradient.study
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.meta_gradient.peers import (
    PEERS,
    classes_loss,
    decoder_from,
    mlp_from,
    tokens_loss,
)
from benchmarks.meta_gradient.problems import DECODER, LENGTH, PROBLEMS, WAYS, meta_gradient

STEPS = {"mlp": (10, 50, 200, 500), "transformer": (10,)}
ROUNDS = 3
RESULTS = Path(__file__).parent / "results"


def runner(name: str, way: str, steps: int) -> tuple[Any, float | None]:
    """Return a function that computes the gradient as numpy, and XLA's temporaries in MiB."""
    problem = PROBLEMS[name]()
    if way in WAYS:
        compiled = meta_gradient(problem, steps, way)
        given = (problem.inputs, problem.params, problem.targets, problem.real)
        temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
        on_device = jax.device_put(given)
        return lambda: np.asarray(compiled(*on_device)), temporaries
    net = (
        mlp_from(problem.params) if name == "mlp" else decoder_from(DECODER, problem.params, LENGTH)
    )
    loss = classes_loss if name == "mlp" else tokens_loss
    gradient = PEERS[way](net, loss, problem.adam, steps, problem.rate)
    arrays = [torch.tensor(x) for x in (problem.inputs, problem.targets, *problem.real)]
    given = [x if x.is_floating_point() else x.long() for x in arrays]
    return lambda: gradient(*given).detach().numpy(), None


def rss(name: str, way: str, steps: int, times: int) -> float:
    """Return the peak RSS in MiB of a process that computes the gradient so many times."""
    given = ["--one", name, way, str(steps), str(times)]
    command = [sys.executable, "-m", "benchmarks.meta_gradient.study", *given]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return float(done.stdout.split()[-1])


def one(name: str, way: str, steps: str, times: str) -> None:
    """Print this process's peak RSS in MiB."""
    run = runner(name, way, int(steps))[0]
    for _ in range(int(times)):
        run()
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text().split()
    print(int(status[status.index("VmHWM:") + 1]) / 2**10)


def measure(name: str, steps: int) -> dict[str, dict[str, float]]:
    """Return, for every way that runs, milliseconds, memory, and distance from plain reverse."""
    runners: dict[str, Any] = {}
    found: dict[str, dict[str, float]] = {}
    for way in (*WAYS, *PEERS):
        try:
            runners[way], temporaries = runner(name, way, steps)
        except ImportError as missing:
            print(f"{way} left out: {missing}", flush=True)
            continue
        found[way] = {} if temporaries is None else {"temporaries_mib": temporaries}
    for way in runners:  # while this process is still small
        found[way]["peak_mib"] = rss(name, way, steps, 2) - rss(name, way, steps, 0)
    times: dict[str, list[float]] = {way: [] for way in runners}
    reference = np.zeros(())
    for number in range(1 + ROUNDS):
        for way, run in runners.items():
            began = time.perf_counter()
            gradient = run()
            taken = 1e3 * (time.perf_counter() - began)
            if number:
                times[way].append(taken)
                continue
            reference = gradient if way == "plain reverse" else reference
            largest = np.abs(gradient - reference).max() / np.abs(reference).max()
            found[way]["difference"] = float(largest)
    for way, values in times.items():
        found[way]["ms"] = statistics.median(values)
    ctypes.CDLL(None).malloc_trim(0)  # else PyTorch's gigabytes stay with this process
    return found


def table(results: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """Return the results as markdown."""
    lines = []
    for name, by_steps in results.items():
        inside = "Adam" if name == "mlp" else "SGD"
        lines += [f"## {name}, {inside} inside", ""]
        lines += [
            "| K | way | ms | XLA temporaries, MiB | peak RSS over the start, MiB | difference |"
        ]
        lines += ["| ---: | --- | ---: | ---: | ---: | ---: |"]
        for steps, found in by_steps.items():
            for way, v in found.items():
                held = f"{v['temporaries_mib']:,.0f}" if "temporaries_mib" in v else ""
                cells = (steps, way, f"{v['ms']:,.0f}", held, f"{v['peak_mib']:,.0f}")
                lines.append(f"| {' | '.join(map(str, cells))} | {v['difference']:.0e} |")
        last = list(by_steps.values())[-1]
        peers = [way for way in last if way in PEERS]
        same = [way for way in peers if last[way]["difference"] < 0.01]
        plain = last["plain reverse"]
        lines += ["", f"At K={list(by_steps)[-1]}, beside plain reverse and the fastest peers:", ""]
        for way in list(WAYS)[1:]:
            less = plain["temporaries_mib"] / last[way]["temporaries_mib"]
            fast = " and ".join(
                f"{last[peer]['ms'] / last[way]['ms']:.2f} times as fast as {peer}"
                for peer in dict.fromkeys(
                    min(some, key=lambda peer: last[peer]["ms"]) for some in (same, peers)
                )
            )
            lines.append(
                f"- {way}: temporaries {less:.1f} times below plain reverse's, "
                f"{last[way]['ms'] / plain['ms']:.2f} of its time, {fast}"
            )
        lines.append("")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw milliseconds and memory against inner steps, both logarithmic."""
    import matplotlib.pyplot as plt

    results = {name: by_steps for name, by_steps in results.items() if len(by_steps) > 1}
    figure, axes = plt.subplots(2, len(results), figsize=(6 * len(results), 7), squeeze=False)
    for column, (name, by_steps) in enumerate(results.items()):
        for way in (*WAYS, *PEERS):
            rows = [(int(k), v[way]) for k, v in by_steps.items() if way in v]
            style = {"ls": "--" if way in PEERS else "-", "marker": "o", "ms": 4, "label": way}
            for row, what in enumerate(("ms", "peak_mib")):
                points = [(k, max(v[what], 1)) for k, v in rows]
                axes[row, column].loglog(*zip(*points, strict=True), **style)
        axes[0, column].set(title=name, ylabel="milliseconds")
        axes[1, column].set(xlabel="inner steps K", ylabel="peak memory over the start, MiB")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure all, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("PROBLEM", "WAY", "STEPS", "TIMES"))
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    given = parser.parse_args()
    if given.one:
        return one(*given.one)
    # Processes that measure memory load what this one compiled: compiling takes memory too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", cache := tempfile.mkdtemp())
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    RESULTS.mkdir(exist_ok=True)
    cells = RESULTS / "meta_gradient.json"  # what is there is not measured again
    results: dict[str, Any] = json.loads(cells.read_text()) if cells.is_file() else {}
    for name in given.problems:
        for steps in map(str, STEPS[name]):
            if steps not in results.setdefault(name, {}):
                results[name][steps] = measure(name, int(steps))
                cells.write_text(json.dumps(results, indent=1) + "\n")
                print(name, steps, json.dumps(results[name][steps], indent=1), flush=True)
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    head = (
        "# Meta-gradients: time and memory against inner steps\n\n"
        f"{device}, jax {jax.__version__}, torch {torch.__version__}, float32; medians of {ROUNDS} "
        "interleaved rounds. `difference` is the largest difference from plain reverse's gradient, "
        "over its largest entry; higher's Adam has its epsilon outside the root, and its gradient "
        "is another one. Made by "
        "`python -m benchmarks.meta_gradient.study`.\n\n![](meta_gradient.png)\n\n"
    )
    (RESULTS / "meta_gradient.md").write_text(head + table(results) + "\n")
    draw(results, RESULTS / "meta_gradient.png")
    return None


if __name__ == "__main__":
    main()
