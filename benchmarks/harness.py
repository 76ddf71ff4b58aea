"""Time ours beside its peers: fresh processes, one step of each in turn, medians and ratios.

A variant is a function ``f(**settings) -> (go, facts)`` that builds one way to do the work: ``go``
does it once and returns when it is done; ``facts`` are what it knows of itself
(``temporaries_mib``). Each variant has a process of its own; the parent lets one after the other do
a round, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Describe one comparison.

    Attributes:
        name: of the case.
        ours: variants of this package, ``name -> "module:function"``.
        peers: others that do the same work.
        settings: what every variant is called with.
        own: settings of single variants, by their name.
        tokens: of one round, for tokens a second; 0 where there is none.
        flops: of one round of a variant, by its name, counted by the shapes.
    """

    name: str
    ours: Mapping[str, str]
    peers: Mapping[str, str]
    settings: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def of(self, names: Collection[str] | None) -> Case:
        """Return the case with these variants alone; None for all."""
        if names is None:
            return self
        ours, peers = (
            {name: where for name, where in group.items() if name in names}
            for group in (self.ours, self.peers)
        )
        return dataclasses.replace(self, ours=ours, peers=peers)


class Variant:
    """Run one variant in a process of its own, round by round."""

    def __init__(self, name: str, where: str, settings: Mapping[str, Any]) -> None:
        self.name, self.seconds = name, list[float]()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness", where, json.dumps(dict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # several share a GPU
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"harness"'):
                return json.loads(line)["harness"]
        return {"absent": f"ended with {self._process.wait()}"}

    def go(self) -> None:
        """Do one round."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.seconds.append(self._answer()["seconds"])

    def end(self) -> None:
        """Let the process end, and take its peak of resident memory."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.facts |= self._answer()
        self._process.wait()


def serve(where: str, settings: str) -> None:
    """Be a variant's process: build it, warm it up, and do a round for every line that comes."""
    module, function = where.split(":")
    began = time.perf_counter()
    try:
        go, facts = getattr(importlib.import_module(module), function)(**json.loads(settings))
        go()
    except Exception as failed:  # absent or out of memory: the others go on, and the table says so
        return _say({"absent": f"{type(failed).__name__}: {failed}".splitlines()[0][:200]})
    _say(facts | {"setup_seconds": time.perf_counter() - began})
    for _ in sys.stdin:
        began = time.perf_counter()
        go()
        _say({"seconds": time.perf_counter() - began})
    _say({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def _say(what: dict[str, Any]) -> None:
    print(json.dumps({"harness": what}), flush=True)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Return the case's settings and, of every variant, times, memory and ratios.

    ``ratio`` of a variant is the fastest peer's median time over its own: above 1 it is faster.
    ``mfu`` is its rate of FLOPs over the ``roofline``'s, the faster of both sides' matrix products,
    taken in the same rounds.
    """
    where = {**case.ours, **case.peers}
    roofs = {"jax": "benchmarks.roofline:jax", "torch": "benchmarks.roofline:torch"}
    variants: list[Variant] = []
    absent: dict[str, str] = {}
    for name, function in (where | roofs).items():
        of_roof = {"dtype": case.settings.get("dtype", "float32")}
        settings = of_roof if name in roofs else {**case.settings, **case.own.get(name, {})}
        variant = Variant(name, function, settings)
        if "absent" in variant.facts:
            absent[name] = variant.facts["absent"]
        else:
            variants.append(variant)
            print(f"  {name}: ready in {variant.facts['setup_seconds']:.1f} s", file=sys.stderr)
    for number in range(rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            variant.go()
    for variant in variants:
        variant.end()
    roofline = max(
        v.facts["flops"] / statistics.median(v.seconds) for v in variants if v.name in roofs
    )
    found: dict[str, Any] = {}
    for v in variants:
        if v.name in roofs:
            continue
        median = statistics.median(v.seconds)
        found[v.name] = v.facts | {
            "ms": 1e3 * median,
            "spread": (max(v.seconds) - min(v.seconds)) / median,
            "peer": v.name in case.peers,
        }
        if case.tokens:
            found[v.name]["tokens_per_second"] = case.tokens / median
        if v.name in case.flops:
            found[v.name]["mfu"] = case.flops[v.name] / median / roofline
    peers = [v for v in variants if v.name in case.peers]
    best = min(peers, key=lambda v: statistics.median(v.seconds), default=None)
    least = min((f["peak_mib"] for f in found.values() if f["peer"]), default=None)
    for v in variants:
        if v.name in found and best is not None and least is not None:
            ratio = statistics.median(best.seconds) / statistics.median(v.seconds)
            found[v.name] |= {"ratio": ratio, "memory_ratio": found[v.name]["peak_mib"] / least}
    return {
        "case": case.name,
        "settings": dict(case.settings),
        "rounds": rounds,
        "roofline_gflops": roofline / 1e9,
        "load": os.getloadavg()[0],
        "device": next(v.facts["device"] for v in variants if v.name == "jax"),
        "variants": found,
        "absent": absent,
    }


def table(result: Mapping[str, Any]) -> str:
    """Return a case's result as markdown."""
    settings = ", ".join(f"{k} {v}" for k, v in result["settings"].items())
    lines = [
        f"## {result['case']}",
        "",
        f"{settings}; {result['rounds']} rounds, roofline {result['roofline_gflops']:,.0f} "
        f"GFLOP/s, load {result['load']:.1f}.",
        "",
        "| variant | ms | spread | tokens/s | of the roofline | best peer / this | "
        "peak RSS, MiB | over the least peer's | XLA temporaries, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, f in result["variants"].items():
        cells = [
            f"{f['ms']:,.0f}",
            f"{f['spread']:.0%}",
            f"{f['tokens_per_second']:,.0f}" if "tokens_per_second" in f else "",
            f"{f['mfu']:.0%}" if "mfu" in f else "",
            f"{f['ratio']:.2f}" if "ratio" in f else "",
            f"{f['peak_mib']:,.0f}",
            f"{f['memory_ratio']:.2f}" if "memory_ratio" in f else "",
            f"{f['temporaries_mib']:,.0f}" if "temporaries_mib" in f else "",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"\n{name}: left out, {why}." for name, why in result["absent"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One variant's process; the harness starts it.")
    parser.add_argument("where")
    parser.add_argument("settings")
    given = parser.parse_args()
    serve(given.where, given.settings)
