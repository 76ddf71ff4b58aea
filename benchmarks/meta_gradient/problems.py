"""The two problems: an MLP with Adam inside, and a small transformer with SGD inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.dd.classification import classification_loss
from jaxdistill.dd.inner import inner_adam, inner_sgd
from jaxdistill.dd.language import objective_loss
from jaxdistill.dd.unroll import Unroll, make_unroll
from jaxdistill.kd.objective import kd_objective
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import init_params, make_apply

INPUTS, WIDTH, CLASSES, EXAMPLES, REAL = 768, 256, 10, 50, 256
ROWS, REAL_ROWS, LENGTH = 8, 16, 64
DECODER = ModelConfig(
    model_type="llama",
    vocab_size=512,
    hidden_size=192,
    intermediate_size=512,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=48,
    max_position_embeddings=LENGTH,
    tie_embeddings=True,
)


class Problem(NamedTuple):
    """Hold arrays and functions of one problem.

    Attributes:
        params: the network's start.
        inputs: what is learned: features ``[M, D]`` or embeddings ``[M, T, D]``.
        targets: labels ``[M]`` or tokens ``[M, T]``.
        real: (inputs, targets) that are scored after training.
        loss: ``(params, batch) -> scalar``.
        batch: ``(inputs, targets) -> batch``.
        adam: whether Adam is inside; SGD else.
        rate: inner learning rate.
    """

    params: Any
    inputs: Any
    targets: Any
    real: tuple[Any, Any]
    loss: Callable[..., Any]
    batch: Callable[..., Any]
    adam: bool
    rate: float


def mlp() -> Problem:
    """Return the MLP: 768 features, 256 wide, 10 classes, 50 synthetic examples, Adam."""
    rng = np.random.default_rng(0)

    def layer(i: int, o: int) -> dict[str, Any]:
        kernel = (rng.normal(size=(i, o)) * i**-0.5).astype(np.float32)
        return {"kernel": kernel, "bias": np.zeros(o, np.float32)}

    def apply(params, x):
        y = x @ params["first"]["kernel"] + params["first"]["bias"][None]
        return jax.nn.relu(y) @ params["second"]["kernel"] + params["second"]["bias"][None]

    def some(rows: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(rows) % CLASSES
        return rng.normal(size=(rows, INPUTS)).astype(np.float32), labels.astype(np.int32)

    inputs, labels = some(EXAMPLES)
    return Problem(
        params={"first": layer(INPUTS, WIDTH), "second": layer(WIDTH, CLASSES)},
        inputs=inputs,
        targets=labels,
        real=some(REAL),
        loss=classification_loss(apply),
        batch=lambda x, y: {"inputs": x, "labels": y},
        adam=True,
        rate=1e-3,
    )


def transformer() -> Problem:
    """Return the transformer: 3 layers of 192, 8 rows of 64 embeddings, SGD."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.asarray(x) * (2.0 if x.ndim > 1 and x.shape[-1] > 1 else 1.0),
        init_params(DECODER, jax.random.key(0)),
    )
    tokens = rng.integers(0, 512, (ROWS, LENGTH)).astype(np.int32)
    real = rng.integers(0, 512, (REAL_ROWS, LENGTH)).astype(np.int32)
    apply = make_apply(DECODER, unroll=DECODER.num_layers)

    def batch(x, y):
        read = {"embeddings": x} if jnp.issubdtype(x.dtype, jnp.floating) else {}
        return {"tokens": y, "loss_mask": jnp.ones(y.shape, bool)} | read

    return Problem(
        params=params,
        inputs=np.asarray(params["embed_tokens"]["embedding"])[tokens],
        targets=tokens,
        real=(real, real),
        loss=objective_loss(kd_objective(apply, None, "ce", fused=False, chunk=ROWS * LENGTH)),
        batch=batch,
        adam=False,
        rate=0.1,
    )


PROBLEMS = {"mlp": mlp, "transformer": transformer}
WAYS: dict[str, dict[str, Any]] = {
    "plain reverse": {"mixed_mode": False, "levels": 0},
    "mixed mode": {"mixed_mode": True, "levels": 1},
    "checkpoints, 2 levels": {"mixed_mode": False, "levels": 2},
    "both, 2 levels": {"mixed_mode": True, "levels": 2},
    "both, 3 levels": {"mixed_mode": True, "levels": 3},
}


def meta_gradient(problem: Problem, steps: int, way: str) -> Any:
    """Return the compiled ``(inputs, params, targets, real) -> gradient by the inputs``."""
    tx = inner_adam() if problem.adam else inner_sgd()
    train = make_unroll(problem.loss, tx, Unroll(steps=steps, **WAYS[way]))

    def value(inputs, params, targets, real):
        rates = jnp.full((steps,), problem.rate, jnp.float32)
        trained = train(params, problem.batch(inputs, targets), rates, jax.random.key(0))
        return problem.loss(trained, problem.batch(*real))

    given = (problem.inputs, problem.params, problem.targets, problem.real)
    return jax.jit(jax.grad(value)).lower(*given).compile()
