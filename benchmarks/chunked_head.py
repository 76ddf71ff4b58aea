"""How much memory does the chunked vocabulary head save, and at what cost in time?

The whole KD-QAT step at SmolLM2-135M's shapes (30 layers, V = 49,152) on 4 x 512 tokens is compiled
from abstract shapes, with the dense head and with chunks of 1,024 to 128 tokens, and XLA's
temporary bytes are read. The head alone, forward KL with its gradients by hidden states and table,
is run as well, at V = 128,256. Writes ``results/chunked_head.md`` and ``chunked_head_alone.md``.

    python benchmarks/chunked_head.py [step] [head]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from smollm2 import SMOLLM2, abstract_params

from jaxdistill._memory import keep_pages
from jaxdistill.kd.freeze import ov_freeze
from jaxdistill.kd.objective import kd_objective, next_token_targets
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.losses.chunked import Head, chunked_sums
from jaxdistill.losses.divergences import ce, forward_kl
from jaxdistill.models.decoder import Remat, make_apply
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import default_policy, fake_quant_params

ROWS, SEQ = 4, 512
HEAD, ROUNDS = (4 * 2048, 128_256, 256), 3  # tokens, vocabulary, width


def dense_objective(student, teacher):
    """The same loss with whole logits of student and teacher."""

    def objective(params, teacher_params, batch):
        targets, mask = next_token_targets(batch)
        z_s = student(params, batch["tokens"]).logits().reshape(-1, SMOLLM2.vocab_size)
        z_t = teacher(teacher_params, batch["tokens"]).logits().reshape(-1, SMOLLM2.vocab_size)
        count = jnp.sum(mask, dtype=jnp.float32)
        kl = jnp.sum(jnp.where(mask, forward_kl(z_s, z_t), 0.0))
        nll = jnp.sum(jnp.where(mask, ce(z_s, targets), 0.0))
        same = jnp.sum((jnp.argmax(z_s, -1) == jnp.argmax(z_t, -1)) & mask, dtype=jnp.float32)
        metrics = {"loss": (kl, count), "nll": (nll, count), "agreement": (same, count)}
        return kl, count, metrics

    return objective


def temporary_mib(chunk: int | None, remat: Remat) -> float:
    """Return the compiled step's temporary memory in MiB; ``chunk`` None is the dense head."""
    policy = default_policy(QuantSpec(), tied=True)
    student = make_apply(SMOLLM2, transform=fake_quant_params(policy), remat=remat)
    teacher = make_apply(SMOLLM2)
    objective = (
        dense_objective(student, teacher)
        if chunk is None
        else kd_objective(student, teacher, chunk=chunk)
    )
    tx = ov_freeze(adamw(1e-4, 100))
    teacher_params, student_params = abstract_params()
    state = jax.eval_shape(lambda p: init_state(p, tx), student_params)
    tokens = jax.ShapeDtypeStruct((ROWS, SEQ), jnp.int32)
    batch = {"tokens": tokens, "loss_mask": jax.ShapeDtypeStruct((ROWS, SEQ), jnp.bool_)}
    compiled = make_step(objective, tx).lower(state, teacher_params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def head_alone(chunk: int | None) -> tuple[Callable[[], Any], float]:
    """Return the head's loss and gradients at a vocabulary of 128k, and its temporary MiB."""
    tokens, vocabulary, width = HEAD
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = [jax.random.normal(key, (tokens, width)) for key in keys[:2]]
    tables = [0.02 * jax.random.normal(key, (vocabulary, width)) for key in keys[2:]]

    def rows(z, guides, mask, shared):
        kl = forward_kl(z, guides[0])
        return {"loss": jnp.sum(jnp.where(mask, kl, jnp.zeros_like(kl)))}

    def loss(hidden, table, guide):
        student, teacher, mask = Head(hidden, table), Head(*guide), jnp.ones(tokens, bool)
        if chunk is None:
            return rows(student.logits(), (teacher.logits(),), mask, None)["loss"]
        return chunked_sums(rows, student, (teacher,), mask, chunk=chunk)["loss"]

    args = (hidden[0], tables[0], (hidden[1], tables[1]))
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile()
    held = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return lambda: jax.block_until_ready(compiled(*args)), held


def timed_heads() -> list[str]:
    """Return the table of the head alone: medians of rounds in turn, and their ratios."""
    tokens, vocabulary, width = HEAD
    forms = {chunk: head_alone(chunk) for chunk in (None, 1024, 512, 256)}
    seconds: dict[int | None, list[float]] = {chunk: [] for chunk in forms}
    for number in range(ROUNDS + 1):
        for chunk, (go, _) in forms.items():
            began = time.perf_counter()
            go()
            if number:
                seconds[chunk].append(time.perf_counter() - began)
    lines = [
        "# The vocabulary head alone, dense and in chunks\n",
        f"V = {vocabulary:,}, {tokens:,} tokens, width {width}, forward KL and its gradients, "
        f"float32; medians of {ROUNDS} rounds in turn on {jax.devices()[0].device_kind}.\n",
        "| head | temporaries (MiB) | dense / this | seconds | spread | time over dense |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    median = {chunk: statistics.median(found) for chunk, found in seconds.items()}
    for chunk, (_, held) in forms.items():
        name = "dense" if chunk is None else f"chunks of {chunk}"
        spread = (max(seconds[chunk]) - min(seconds[chunk])) / median[chunk]
        lines.append(
            f"| {name} | {held:,.0f} | {forms[None][1] / held:.1f} | {median[chunk]:.1f} | "
            f"{spread:.0%} | {median[chunk] / median[None]:.2f} |"
        )
        print(lines[-1], flush=True)
    return lines


def step_table() -> list[str]:
    """Return the table of the whole step's temporary memory."""
    block = ROWS * SEQ * SMOLLM2.vocab_size * 4 / 2**20
    lines = [
        "# Temporary memory of the KD-QAT step, dense and chunked head\n",
        f"SmolLM2-135M shapes, {ROWS} x {SEQ} tokens, float32, layers scanned, ov-freeze, AdamW; "
        f"one whole `[B*T, V]` block is {block:.0f} MiB. By `remat`:\n",
        "| head | none (MiB) | minimal (MiB) | full (MiB) |\n| --- | ---: | ---: | ---: |",
    ]
    for chunk in (None, 1024, 512, 256, 128):
        name = "dense" if chunk is None else f"chunks of {chunk}"
        sizes = [temporary_mib(chunk, remat) for remat in ("none", "minimal", "full")]
        lines.append(f"| {name} | {' | '.join(f'{size:,.0f}' for size in sizes)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure what was asked for, by default both, and write the tables."""
    keep_pages()
    tables = {"step": ("chunked_head", step_table), "head": ("chunked_head_alone", timed_heads)}
    for name in sys.argv[1:] or tables:
        file, measured = tables[name]
        text = "\n".join(measured()) + "\n"
        (Path(__file__).parent / "results" / f"{file}.md").write_text(text)


if __name__ == "__main__":
    main()
