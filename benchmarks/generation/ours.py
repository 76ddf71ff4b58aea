"""Generation and scoring by this package, as the command line does them."""

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
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.decoder import init_params, make_apply
from jaxdistill.models.generate import Sampling, sample
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.policy import add_scales, default_policy, quantize_params
from jaxdistill.recipes.generate import held


def decode(
    *, shape: str, rows: int, prompt: int, new: int, weights: str, group: int | None = None
) -> tuple[Callable[[], None], dict[str, Any]]:
    """Continue prompts greedily; ``weights`` are held as ``jaxdistill generate --weights`` says.

    Args:
        shape: of the model, a key of ``SHAPES``; its weights are random.
        rows: prompts at once.
        prompt: tokens of each.
        new: tokens to write.
        weights: see ``recipes.generate``.
        group: weights that share a scale; None for a whole channel.
    """
    keep_pages()
    config = dataclasses.replace(SMOLLM2, **SHAPES[shape])
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    policy = default_policy(QuantSpec(bits=4, group_size=group, ranges="absmax"), tied=True)
    if weights in ("packed", "int8"):
        params = quantize_params(add_scales(params, policy), policy)
    params = held(params, weights)
    dtype = jnp.bfloat16 if weights == "bfloat16" else jnp.float32
    apply, how = make_apply(config, dtype=dtype), Sampling(max_new_tokens=new)
    tokens = jax.random.randint(jax.random.key(1), (rows, prompt), 0, config.vocab_size)

    def written(params: Any, tokens: Any) -> Any:
        rng, valid = jax.random.key(0), jnp.ones_like(tokens)
        return sample(
            apply, config, params, tokens, valid, rng, how=how, stop=(), dtype=dtype
        ).tokens

    compiled = jax.jit(written).lower(params, tokens).compile()
    weigh = sum(x.nbytes for x in jax.tree.leaves(params)) / 2**20

    def go() -> None:
        jax.block_until_ready(compiled(params, tokens))

    held_mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return go, {"temporaries_mib": held_mib, "weights_mib": weigh}


def score(*, shape: str, rows: int, seq_len: int) -> tuple[Callable[[], None], dict[str, Any]]:
    """Take the mean negative log-likelihood of a batch, as ``jaxdistill evaluate`` does."""
    keep_pages()
    config = dataclasses.replace(SMOLLM2, **SHAPES[shape])
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    objective = kd_objective(make_apply(config))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, seq_len), np.int32)
    batch = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.ones(tokens.shape, bool)}
    scored = jax.jit(lambda p, b: objective(p, None, b)[2]).lower(params, batch).compile()

    def go() -> None:
        jax.block_until_ready(scored(params, batch))

    return go, {"temporaries_mib": scored.memory_analysis().temp_size_in_bytes / 2**20}
