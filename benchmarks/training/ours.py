"""One training step of this package, as a user builds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.smollm2 import SMOLLM2
from benchmarks.training.shapes import CACHED, SHAPES
from jaxdistill._memory import keep_pages
from jaxdistill.kd.freeze import ov_freeze
from jaxdistill.kd.objective import kd_objective
from jaxdistill.kd.rollout import make_rollout
from jaxdistill.kd.step import adamw, init_state, make_step
from jaxdistill.losses.chunked import CHUNK
from jaxdistill.models.attention import Implementation
from jaxdistill.models.decoder import init_params, make_apply
from jaxdistill.models.generate import Sampling
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
    chunk: int = CHUNK,
    remat: Literal["none", "minimal", "full"] = "none",
    unroll: int = 1,
    attention: Implementation = "xla",
) -> tuple[Callable[[], None], dict[str, Any]]:
    """Build a step.

    Args:
        shape: of the model, a key of ``SHAPES``; its weights are random.
        work: ``ce``, ``kd`` (a teacher of the same shape, forward KL), ``kd_qat`` (4 bits too),
            ``cache`` (the teacher's likeliest tokens are given), or ``on_policy`` (the student
            writes the second half of each row first).
        rows: of the batch.
        seq_len: tokens of a row.
        dtype: of products' operands.
        group: weights that share a scale; None for a whole channel.
        freeze: ov-freeze.
        chunk: tokens whose logits exist at once.
        remat: see ``make_apply``.
        unroll: see ``make_apply``.
        attention: see ``make_apply``.
    """
    config = dataclasses.replace(SMOLLM2, **SHAPES[shape])
    keep_pages()
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    policy = default_policy(
        QuantSpec(bits=4, group_size=group, ranges="absmax"), tied=config.tie_embeddings
    )
    quantized = work == "kd_qat"
    transform = fake_quant_params(policy) if quantized else None
    read: dict[str, Any] = {"dtype": jnp.dtype(dtype), "unroll": unroll, "attention": attention}
    student = make_apply(config, transform=transform, remat=remat, **read)
    alone = work in ("ce", "cache")
    teacher = None if alone else make_apply(config, **read)
    loss = "forward_kl" if work == "cache" else None
    objective = kd_objective(student, teacher, loss, chunk=chunk)
    tx = adamw(1e-5, 1000)
    tx = ov_freeze(tx) if freeze else tx
    state = init_state(add_scales(params, policy) if quantized else params, tx)
    guide = None if alone else params
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, seq_len), np.int32)
    batch = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.ones(tokens.shape, bool)}
    rollout = None
    if work == "cache":
        log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (CACHED + 1,)))
        shape_BTK = (*tokens.shape, CACHED)
        ids = jax.random.randint(jax.random.key(2), shape_BTK, 0, config.vocab_size)
        batch |= {
            "teacher_log_probs": jnp.broadcast_to(log_probs[1:], shape_BTK),
            "teacher_indices": ids,
            "teacher_log_tail": jnp.broadcast_to(log_probs[0], tokens.shape),
        }
    if work == "on_policy":
        half = seq_len // 2
        batch["loss_mask"] = batch["loss_mask"].at[:, :half].set(False)
        how = Sampling(max_new_tokens=seq_len - half, temperature=1.0)
        asked = {"prompt_length": half, "how": how, "stop": (), "share": 1}
        rollout = make_rollout(student, config, **asked, dtype=jnp.dtype(dtype))
    compiled = make_step(objective, tx, rollout=rollout).lower(state, guide, batch).compile()
    held = compiled.memory_analysis()

    def go() -> None:
        nonlocal state
        state, metrics = compiled(state, guide, batch)
        jax.block_until_ready((state, metrics))

    return go, {"temporaries_mib": held.temp_size_in_bytes / 2**20}
