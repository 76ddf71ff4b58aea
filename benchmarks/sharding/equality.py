"""Do runs on many devices end as runs on one do?

stories260K (a real Llama of 5 layers) is distilled by the command line on one device, on
eight simulated ones in three meshes, and on two processes of four; the loss of every step and the
finished student are compared. Results go to ``results``; what is stored there is not run again.

    python -m benchmarks.sharding.equality
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.stories260k import load_stories
from jaxdistill.dd.stored_set import load_set
from jaxdistill.models.hf import save_hf
from jaxdistill.models.hub import load_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DATA = ROOT.parent / "shared" / "data"
WORK = ROOT / "runs" / "sharding"
OUT, STORED = (HERE / "results" / f"equality.{kind}" for kind in ("md", "json"))
MESHES = ("data=8", "fsdp=8", "data=2,fsdp=2,tensor=2")
STEPS = 20


def jobs(model: str, text: str, cache: str, rows: str) -> dict[str, list[str]]:
    """Return each job's command line, its --out and mesh left out."""
    common = [
        *("--data", text, "--steps", str(STEPS), "--batch-size", "16", "--seq-len", "64"),
        *("--eval-tokens", "4096", "--signal-every", "-1", "--lr", "1e-3"),
    ]
    condense = ["condense", "--data", rows, "--per-class", "2", "--architecture", "mlp"]
    condense += ["--steps", str(STEPS)]
    short = ["--student-init", "cut:layers=3"]
    return {
        "KD-QAT, ov-freeze": ["quantize", "--model", model, *common],
        "KD, cached teacher": [
            *("distill", "--teacher", model, "--cache", cache, "--student", model),
            *(*short, *common),
        ],
        "KD, on-policy": [
            *("distill", "--teacher", model, *short, *common),
            *("--on-policy", "1", "--prompt-length", "16"),
        ],
        "DD, Adam inside": [*condense, "--inner-optimizer", "adam", "--inner-rate", "0.01"],
        "DD, SGD inside": [*condense, "--inner-optimizer", "sgd", "--inner-rate", "0.01"],
    }


def run(arguments: list[str], out: Path, devices: int, *, hosts: int = 1) -> None:
    """Run the command line in as many processes, each with its devices; raise if one fails."""
    shutil.rmtree(out, ignore_errors=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    started = []
    for i in range(hosts):
        told = ["--hosts", f"127.0.0.1:{port},{hosts},{i}"] if hosts > 1 else []
        code = "import sys; from jaxdistill.cli import main; main(sys.argv[1:])"
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *arguments, "--out", str(out), *told],
                env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in started:
        _, said = process.communicate(timeout=1200)
        if process.returncode:
            raise RuntimeError(said[-2000:])


def losses(out: Path) -> np.ndarray:
    """Return the loss of every step."""
    return np.asarray([json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()])


def finished(out: Path) -> list[np.ndarray]:
    """Return the arrays that a run ends with."""
    if (out / "set").is_dir():
        tree: Any = load_set(out / "set").synthetic.learned
    else:
        tree = load_model(out).floats().params
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def main() -> None:
    """Run all jobs on all meshes."""
    WORK.mkdir(parents=True, exist_ok=True)
    stories = load_stories(DATA / "models" / "stories260K")
    save_hf(WORK / "model", stories.config, stories.params, stories.tokenizer)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4, dtype=np.int32), 40)
    inputs = rng.normal(size=(160, 12)) + 2 * rng.normal(size=(4, 12))[labels]
    np.savez(WORK / "rows.npz", inputs=inputs.astype(np.float32), labels=labels)
    text = str(DATA / "text" / "tinystories_lower.jsonl.gz")
    source = WORK / "text.jsonl"
    with gzip.open(text, "rt") as file:
        source.write_text("".join(line for line, _ in zip(file, range(600), strict=False)))
    cache = WORK / "cache"
    model = str(WORK / "model")
    run(
        ["cache-teacher", "--teacher", model, "--data", str(source), "--seq-len", "64"],
        cache,
        8,
    )
    found = json.loads(STORED.read_text()) if STORED.is_file() else {}
    for name, arguments in jobs(model, str(source), str(cache), str(WORK / "rows.npz")).items():
        ways = [(mesh, 8, 1) for mesh in MESHES]
        ways.append(("data=2,fsdp=4", 4, 2))
        missing = [way for way in ways if f"{name}: {said(*way)}" not in found]
        if not missing:
            continue
        alone, out = WORK / "alone", WORK / "sharded"
        run(arguments, alone, 1)
        expected, ended = losses(alone), finished(alone)
        size = np.sqrt(sum((b**2).sum() for b in ended))
        for mesh, devices, hosts in missing:
            run([*arguments, "--mesh", mesh], out, devices, hosts=hosts)
            apart = sum(((a - b) ** 2).sum() for a, b in zip(finished(out), ended, strict=True))
            found[f"{name}: {said(mesh, devices, hosts)}"] = {
                "loss": float(np.abs(losses(out) / expected - 1).max()),
                "arrays": float(np.sqrt(apart) / size),
            }
            STORED.write_text(json.dumps(found, indent=1) + "\n")
            print(list(found.items())[-1], flush=True)
    lines = [
        "| job | devices | largest relative difference of a loss | of the finished arrays (L2) |",
        "| --- | --- | ---: | ---: |",
    ]
    for key, value in found.items():
        name, where = key.split(": ")
        lines.append(f"| {name} | {where} | {value['loss']:.1e} | {value['arrays']:.1e} |")
    OUT.write_text("\n".join(lines) + "\n")


def said(mesh: str, devices: int, hosts: int) -> str:
    """Name a mesh and its processes."""
    return mesh if hosts == 1 else f"{hosts} processes x {devices}, {mesh}"


if __name__ == "__main__":
    main()
