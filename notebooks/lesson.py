"""What the lessons share: a small language model of Python's documentation, and three spirals."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxdistill as jd
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import init_params

Batch = dict[str, jax.Array]


def topics() -> tuple[list[str], list[str]]:
    """Return Python's documentation topics as (training texts, held-out texts)."""
    found = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    return [t for i, t in enumerate(found) if i % 8 != 7], found[7::8]


def config(**changes: Any) -> ModelConfig:
    """Return the shape of a small Llama that reads bytes."""
    shape = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_embeddings": True,
    }
    return ModelConfig(**(shape | changes))


def batches(texts: list[str], rows: int = 16, length: int = 64) -> Callable[[int], Batch]:
    """Return ``number -> batch`` of random places in texts."""
    data = np.frombuffer("\n".join(texts).encode(), np.uint8)

    def batch(number: int) -> Batch:
        random = np.random.default_rng(number)
        starts = random.integers(0, len(data) - length, rows)
        tokens = jnp.asarray(data[starts[:, None] + np.arange(length)], jnp.int32)
        return {"tokens": tokens, "loss_mask": jnp.ones_like(tokens, bool).at[:, 0].set(False)}

    return batch


def trained(
    shape: ModelConfig, batch: Callable[[int], Batch], steps: int = 300, rate: float = 4e-3
) -> Any:
    """Return params trained to say the next byte."""
    objective = jd.kd_objective(jd.make_apply(shape), None, "ce")
    tx = jd.freeze(optax.adam(optax.cosine_decay_schedule(rate, steps)))
    step, state = (
        jd.make_step(objective, tx),
        jd.init_state(init_params(shape, jax.random.key(0)), tx),
    )
    for number in range(steps):
        state, _ = step(state, None, batch(number))
    return state.params


def spirals(
    count: int, seed: int, classes: int = 3, turns: float = 0.75, noise: float = 0.25
) -> Batch:
    """Return points on the arms of spirals, one a class: ``inputs`` [N, 2], ``labels`` [N]."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    radius = random.uniform(0.2, 1.0, count)
    angle = 2 * np.pi * (turns * radius + labels / classes) + random.normal(0, noise, count)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return {"inputs": jnp.asarray(points, jnp.float32), "labels": jnp.asarray(labels, jnp.int32)}


def mean(metric: tuple[jax.Array, jax.Array]) -> float:
    """Return the mean of a metric's (sum, count)."""
    return float(metric[0] / metric[1])
