"""One training step of this package, as a user builds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.smollm2 import SMOLLM2
from benchmarks.training.shapes import SHAPES
from jaxdistill._memory import keep_pages
from jaxdistill.kd.freeze import ov_freeze
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.models.decoder import init_params, make_apply
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, fake_quant_params


def step(
    *,
    shape: str,
    work: str,
    rows: int,
    seq_len: int,
    dtype: str = "float32",
    group: int | None = None,
    freeze: bool = False,
    chunk: int = 256,
    remat: bool = False,
    unroll: int = 1,
) -> tuple[Callable[[], None], dict[str, Any]]:
    """Build a step.

    Args:
        shape: of the model, a key of ``SHAPES``; its weights are random.
        work: ``ce``, ``kd`` (a teacher of the same shape, forward KL) or ``kd_qat`` (4 bits too).
        rows: of the batch.
        seq_len: tokens of a row.
        dtype: of products' operands.
        group: weights that share a scale; None for a whole channel.
        freeze: ov-freeze.
        chunk: tokens whose logits exist at once.
        remat: see ``make_apply``.
        unroll: see ``make_apply``.
    """
    config = dataclasses.replace(SMOLLM2, **SHAPES[shape])
    keep_pages()
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    policy = default_policy(
        QuantSpec(bits=4, group_size=group, ranges="absmax"), tied=config.tie_embeddings
    )
    quantized = work == "kd_qat"
    transform = fake_quant_params(policy) if quantized else None
    read = {"dtype": jnp.dtype(dtype), "remat": remat, "unroll": unroll}
    student = make_apply(config, transform=transform, **read)
    teacher = None if work == "ce" else make_apply(config, dtype=jnp.dtype(dtype), unroll=unroll)
    objective = kd_objective(student, teacher, chunk=chunk)
    tx = adamw(1e-5, 1000)
    tx = ov_freeze(tx) if freeze else tx
    state = init_state(add_scales(params, policy) if quantized else params, tx)
    guide = None if work == "ce" else params
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, seq_len), np.int32)
    batch = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.ones(tokens.shape, bool)}
    compiled = make_step(objective, tx).lower(state, guide, batch).compile()
    held = compiled.memory_analysis()

    def go() -> None:
        nonlocal state
        state, metrics = compiled(state, guide, batch)
        jax.block_until_ready((state, metrics))

    return go, {"temporaries_mib": held.temp_size_in_bytes / 2**20}
