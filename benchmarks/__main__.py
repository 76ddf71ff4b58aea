"""Time the package beside its peers: ``python -m benchmarks [CASE ...] [--full | --large]``.

Writes ``results/speed-SIZE.md`` and the same as ``.json``, SIZE being quick, full or large; a case
that is measured again takes its old place in them.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from benchmarks.cases import cases
from benchmarks.harness import measure, table

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure the cases that were asked for, by default all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="SmolLM2-135M's shapes, not tiny ones")
    size.add_argument("--large", action="store_true", help="a 1B model's shapes, for a large GPU")
    parser.add_argument("--only", nargs="*", help="variants; all by default, each holds its model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object a case, no files")
    given = parser.parse_args()
    name = "full" if given.full else "large" if given.large else "quick"
    known = cases(name)
    if unknown := [name for name in given.cases if name not in known]:
        parser.error(f"no case {unknown[0]!r}; accepted: {', '.join(known)}")
    chosen = [known[name] for name in given.cases or known]
    variants = {name for case in chosen for name in (*case.ours, *case.peers)}
    if unknown := [name for name in given.only or () if name not in variants]:
        parser.error(f"no variant {unknown[0]!r}; accepted: {'; '.join(sorted(variants))}")
    where = RESULTS / f"speed-{name}.json"
    kept = json.loads(where.read_text()) if where.is_file() else {}
    for case in chosen:
        result = measure(case.of(given.only), given.rounds)
        if given.json:
            print(json.dumps(result), flush=True)
            continue
        print(table(result), flush=True)
        kept[case.name] = result
        where.write_text(json.dumps(kept, indent=1) + "\n")
        head = f"# Steps beside PyTorch's\n\n{result['device']}, jax {version('jax')}. Medians of "
        head += "interleaved rounds, each variant in a process of its own.\n\n"
        where.with_suffix(".md").write_text(head + "\n".join(map(table, kept.values())))


if __name__ == "__main__":
    main()
