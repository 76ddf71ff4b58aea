"""How much memory does the chunked vocabulary head save?

Compiles the KD-QAT step at SmolLM2-135M's shapes (30 layers, V = 49,152) on 4 x 512 tokens from
abstract shapes, with the dense head and with chunks of 1,024 to 128 tokens, and reads XLA's
temporary bytes. Nothing is run. Writes ``results/chunked_head.md``.

    python benchmarks/chunked_head.py
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from smollm2 import SMOLLM2, abstract_params

from jaxdistill.kd.freeze import ov_freeze
from jaxdistill.kd.objective import kd_objective, next_token_targets
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.losses.divergences import ce, forward_kl
from jaxdistill.models.decoder import make_apply
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import default_policy, fake_quant_params

ROWS, SEQ = 4, 512


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


def temporary_mib(chunk: int | None, remat: bool) -> float:
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


def main() -> None:
    """Compile every form and write the table."""
    block = ROWS * SEQ * SMOLLM2.vocab_size * 4 / 2**20
    lines = [
        "# Temporary memory of the KD-QAT step, dense and chunked head\n",
        f"SmolLM2-135M shapes, {ROWS} x {SEQ} tokens, float32, layers scanned, ov-freeze, AdamW; "
        f"one whole `[B*T, V]` block is {block:.0f} MiB.\n",
        "| head | no remat (MiB) | remat (MiB) |\n| --- | ---: | ---: |",
    ]
    for chunk in (None, 1024, 512, 256, 128):
        name = "dense" if chunk is None else f"chunks of {chunk}"
        sizes = [temporary_mib(chunk, remat) for remat in (False, True)]
        lines.append(f"| {name} | {sizes[0]:,.0f} | {sizes[1]:,.0f} |")
        print(lines[-1], flush=True)
    (Path(__file__).parent / "results" / "chunked_head.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
