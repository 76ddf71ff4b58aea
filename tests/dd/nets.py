"""A small smooth network, its data, and central differences, in whatever type they are given."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

CLASSES = 3


def init(key, width: int = 5, inputs: int = 4):
    """Fresh weights of two layers, of the type that floats have now."""
    return jax.jit(_init, static_argnums=(1, 2))(key, width, inputs)


def _init(key, width, inputs):
    a, b = jax.random.split(key)
    dtype = jnp.result_type(float)
    return {
        "w1": jax.random.normal(a, (inputs, width), dtype) * 0.7,
        "b1": jnp.zeros((width,), dtype),
        "w2": jax.random.normal(b, (width, CLASSES), dtype) * 0.7,
    }


def loss(params, batch):
    hidden = jnp.tanh(batch["inputs"] @ params["w1"] + params["b1"][None])
    log_probs = jax.nn.log_softmax(hidden @ params["w2"], axis=-1)
    hard = jax.nn.one_hot(batch["labels"], CLASSES, dtype=log_probs.dtype)
    target = jax.nn.softmax(batch["label_logits"], -1) if "label_logits" in batch else hard
    return -jnp.mean(jnp.sum(target * log_probs, axis=-1))


def data(seed: int, rows: int, inputs: int = 4):
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % CLASSES
    centres = np.eye(CLASSES, inputs) * 2
    return {
        "inputs": jnp.asarray(centres[labels] + rng.normal(size=(rows, inputs))),
        "labels": jnp.asarray(labels, jnp.int32),
    }


def central_differences(f, at, step: float = 1e-6):
    """The gradient of a scalar function of a tree; all entries are moved in one vmap."""
    x, tree_of = ravel_pytree(at)
    moves = step * np.eye(x.size)
    x = np.asarray(x)[None]
    values = jax.jit(jax.vmap(lambda x: f(tree_of(x))))(np.concatenate([x + moves, x - moves]))
    up, down = np.split(np.asarray(values), 2)
    return tree_of(jnp.asarray((up - down) / (2 * step)))
