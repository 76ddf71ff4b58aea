"""Sequence-level distillation: train on the teacher's text (Kim and Rush, arXiv 1606.07947).

The teacher's answers stand in for the data's, once, before training; the loss is then ``ce``, or
any divergence on the teacher's text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from jaxdistill.errors import UserError
from jaxdistill.kd.rollout import own_answers
from jaxdistill.mesh import fetch, place_batch
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Params
from jaxdistill.models.generate import Sampling


def teacher_text(
    apply: Callable[..., Any],
    params: Params,
    config: ModelConfig,
    rows: Mapping[str, Shaped[np.ndarray, "N T"]],
    *,
    prompt_length: int,
    how: Sampling,
    stop: Sequence[int],
    batch_size: int,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Shaped[np.ndarray, "N T"]]:
    """Replace the answers of all rows by the teacher's.

    Args:
        apply: the teacher, as ``make_apply`` builds it.
        params: its params; dequantize once beforehand.
        config: its shape.
        rows: a prompt and an answer a row, as ``train.prompts`` lays them out.
        prompt_length: see ``kd.rollout.own_answers``.
        how: greedy is the mode that the paper approximates by beam search.
        stop: ids that end an answer.
        batch_size: rows sampled at once.
        seed: of the sampling.
        dtype: of ``apply``'s activations.
        progress: called after each batch with the number of rows done.

    Returns:
        the same fields, shapes and types.

    Raises:
        UserError: there are no rows, the batch size is below 1, or as ``own_answers`` does.
    """
    number = len(rows["tokens"])
    if batch_size < 1 or not number:
        raise UserError(
            f"{number} rows in batches of {batch_size} given; accepted: at least 1 of each"
        )

    @jax.jit
    def answers(params: Params, batch: dict[str, Any], at: Any) -> dict[str, Any]:
        rng = jax.random.fold_in(jax.random.key(seed), at)
        options = {"prompt_length": prompt_length, "how": how, "stop": tuple(stop), "dtype": dtype}
        return own_answers(apply, config, params, batch, rng, **options)[0]

    size, parts = min(batch_size, number), []
    for at in range(0, number, size):
        part = {name: x[at : at + size] for name, x in rows.items()}
        missing = size - len(part["tokens"])
        # Rows of padding have no target, so nothing is kept of what is sampled for them.
        part = {name: np.pad(x, ((0, missing), (0, 0))) for name, x in part.items()}
        done = answers(params, place_batch(part), at)
        parts.append({name: fetch(x)[: size - missing] for name, x in done.items()})
        if progress:
            progress(min(at + size, number))
    return {name: np.concatenate([part[name] for part in parts]) for name in rows}
