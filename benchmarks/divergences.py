"""What does each divergence cost beside forward KL, through the chunked vocabulary head?

Value and gradient (by hidden states and head) of every registered divergence, with the metrics that
training reports, at SmolLM2's vocabulary and width. Rounds are interleaved: each runs every
divergence once, and ratios are taken within a round. Writes ``results/divergences.md``.

    python benchmarks/divergences.py
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.kd.objective import kd_objective
from jaxdistill.losses.registry import REGISTRY
from jaxdistill.models.decoder import Output

V, D, TOKENS, CHUNK, ROUNDS, TOP_K = 49152, 576, 256, 128, 5, 64
FIRST = "forward_kl"


def forms() -> dict[str, tuple[str, int]]:
    """Return what is timed: by its name in the table, the loss and top_k."""
    given = {"taid": "taid:t=0.7", "cakld": "cakld:confidence=0.6"}
    names = [name for name, entry in REGISTRY.items() if entry.kind == "divergence"]
    found = {name: (given.get(name, name), 0) for name in names}
    return found | {f"{FIRST}, top {TOP_K} and tail": (FIRST, TOP_K)}


def head(params, tokens, positions=None, segment_ids=None) -> Output:
    """Stand in for a model whose final hidden states are its params."""
    return Output(params["h"], params["e"])


def main() -> None:
    """Compile, run the rounds and write the table."""
    rng = np.random.default_rng(0)
    student, teacher = (
        {
            "h": jnp.asarray(rng.normal(size=(1, TOKENS + 1, D)), jnp.float32),
            "e": jnp.asarray(rng.normal(size=(V, D)) * 0.1, jnp.float32),
        }
        for _ in range(2)
    )
    batch = {
        "tokens": jnp.asarray(rng.integers(0, V, (1, TOKENS + 1)), jnp.int32),
        "loss_mask": jnp.ones((1, TOKENS + 1), bool),
    }
    runs, memory = {}, {}
    for name, (text, top_k) in forms().items():
        objective = kd_objective(head, head, text, top_k=top_k, chunk=CHUNK)

        def loss(params, teacher, batch, objective=objective):
            total, count, metrics = objective(params, teacher, batch)
            return total / count, metrics

        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        runs[name] = gradient.lower(student, teacher, batch).compile()
        memory[name] = runs[name].memory_analysis().temp_size_in_bytes / 2**20
        jax.block_until_ready(runs[name](student, teacher, batch))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run(student, teacher, batch))
            seconds[name].append(time.perf_counter() - start)
    lines = [
        "# The cost of each divergence\n",
        f"Value and gradient through the chunked head: V = {V:,}, D = {D}, {TOKENS} tokens in "
        f"chunks of {CHUNK}, float32, {os.cpu_count()} CPU cores, the metrics of training "
        f"included. Medians of {ROUNDS} interleaved rounds; the ratio to {FIRST} is taken within a "
        "round, its median and its range are given: where the range holds 1, no difference was "
        "measured. Memory is XLA's temporary bytes (`memory_analysis`).\n",
        f"| divergence | ms | ratio to {FIRST} | range | temporary MiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, found in seconds.items():
        ratios = sorted(a / b for a, b in zip(found, seconds[FIRST], strict=True))
        lines.append(
            f"| {name} | {1e3 * statistics.median(found):,.0f} | {statistics.median(ratios):.2f} | "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f} | {memory[name]:,.0f} |"
        )
        print(lines[-1], flush=True)
    (Path(__file__).parent / "results" / "divergences.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
