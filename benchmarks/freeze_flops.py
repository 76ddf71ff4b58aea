"""How many FLOPs and how much optimizer state does ov-freeze leave out of the step?

Compiles the KD-QAT step at SmolLM2-135M shapes on 4 x 128 tokens, straight-line layers (XLA counts
a scan's body once), with ov-freeze and without, and reads XLA's FLOP count. Nothing is run. Writes
``results/freeze_flops.md``.

    python benchmarks/freeze_flops.py
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from smollm2 import SMOLLM2, abstract_params

from jaxdistill.kd.freeze import freeze
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.models.decoder import make_apply
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import default_policy, fake_quant_params

ROWS, SEQ = 4, 128


def count(word: str) -> tuple[float, int]:
    """Return (FLOPs of the compiled step, bytes of optimizer state) of a freeze."""
    c, policy = SMOLLM2, default_policy(QuantSpec(), tied=True)
    student = make_apply(c, transform=fake_quant_params(policy), unroll=c.num_layers)
    objective = kd_objective(student, make_apply(c, unroll=c.num_layers), chunk=ROWS * SEQ)
    tx = freeze(adamw(1e-4, 100), word)
    teacher_params, student_params = abstract_params()
    state = jax.eval_shape(lambda p: init_state(p, tx), student_params)
    batch = {
        "tokens": jax.ShapeDtypeStruct((ROWS, SEQ), jnp.int32),
        "loss_mask": jax.ShapeDtypeStruct((ROWS, SEQ), jnp.bool_),
    }
    compiled = make_step(objective, tx).lower(state, teacher_params, batch).compile()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))
    return compiled.cost_analysis()["flops"], size


def main() -> None:
    """Compile both and write the table."""
    c, found = SMOLLM2, {word: count(word) for word in ("none", "ov")}
    frozen = c.num_layers * c.hidden_size * (c.num_kv_heads + c.num_heads) * c.head_dim
    flops, states = (found["none"][i] - found["ov"][i] for i in (0, 1))
    text = (
        f"# What ov-freeze leaves out\n\nSmolLM2-135M shapes, {ROWS} x {SEQ} tokens, AdamW.\n\n"
        "| freeze | GFLOP a step | optimizer state (bytes) |\n| --- | ---: | ---: |\n"
    )
    for word, (work, size) in found.items():
        text += f"| {word} | {work / 1e9:,.2f} | {size:,} |\n"
    text += f"| left out | {flops / 1e9:,.2f} | {states:,} |\n\n"
    text += (
        f"The frozen kernels hold {frozen:,} weights: their weight gradients are "
        f"2 x {ROWS * SEQ} x {frozen:,} = {2 * ROWS * SEQ * frozen / 1e9:,.2f} GFLOP, and AdamW's "
        f"two moments of them are {8 * frozen:,} bytes.\n"
    )
    (Path(__file__).parent / "results" / "freeze_flops.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
