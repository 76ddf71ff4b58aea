"""Kernel ridge regression on a network's features: a set by which real labels are predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from jaxdistill.dd.classification import label_probs
from jaxdistill.dd.condense import Batch, MetaLoss
from jaxdistill.dd.synthetic import Synthetic


def kernel_ridge_predict(
    support: Float[Array, "M F"],
    targets: Float[Array, "M C"],
    queries: Float[Array, "B F"],
    *,
    ridge: float | int = 1e-6,
) -> Float[Array, "B C"]:
    """Predict by ridge regression: ``Q S^T (S S^T + r I)^-1 Y``, ``r = ridge * trace(S S^T) / M``.

    The ridge is a share of the mean squared norm of the support, so that scaling the features
    changes nothing. Where F < M the same is solved as ``Q (S^T S + r I)^-1 S^T Y``. The triangular
    factor comes from ``[S; sqrt(r) I]``, whose condition is the root of the kernel's, so that
    float32 holds a ridge that a Cholesky factor of the kernel would not; derivatives go through
    the solution, not the factor.

    Args:
        support: S, features of the examples.
        targets: Y.
        queries: Q.
        ridge: above 0.
    """
    scale = ridge * jnp.mean(jnp.sum(support**2, axis=1)) + jnp.finfo(support.dtype).tiny
    dual = support.shape[0] <= support.shape[1]
    tall = support.T if dual else support  # the regularized Gram matrix is tall.T @ tall + r I

    def gram(x: Array) -> Array:
        return tall.T @ (tall @ x) + scale * x

    eye = jnp.eye(tall.shape[1], dtype=tall.dtype)
    factor = jnp.linalg.qr(lax.stop_gradient(jnp.concatenate([tall, jnp.sqrt(scale) * eye])), "r")

    def solve(_: Any, b: Array) -> Array:
        return solve_triangular(factor, solve_triangular(factor, b, trans=1))

    if dual:
        return queries @ (tall @ lax.custom_linear_solve(gram, targets, solve, symmetric=True))
    return queries @ lax.custom_linear_solve(gram, tall.T @ targets, solve, symmetric=True)


def centred_labels(batch: Batch, num_classes: int) -> Float[Array, "B C"]:
    """Return label probabilities less ``1 / C``, the targets of the regression."""
    return label_probs(batch, num_classes) - 1 / num_classes


def kernel_ridge(
    features: Callable[..., Any],
    init: Callable[..., Any],
    *,
    num_classes: int,
    ridge: float | int = 1e-6,
) -> MetaLoss:
    """Build the squared error on real data of ridge regression fitted to the set.

    ``mean_{b,c} (prediction - y)^2``, ``y`` centred labels. KIP (Nguyen et al., arXiv 2011.00050)
    with the finite features of fresh networks for its kernel; FRePo (Zhou et al., arXiv 2206.00719)
    with fresh networks for its pool. Inputs and soft labels of the set are learned.

    Args:
        features: ``(params, inputs) -> [B, F]``.
        init: ``key -> params``.
        num_classes: C.
        ridge: see ``kernel_ridge_predict``.

    Returns:
        the ``MetaLoss``; its metrics have the predictions' ``accuracy`` on the real batch.
    """

    def meta_loss(synthetic: Synthetic, real: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        params, batch = init(key), synthetic.batch()
        support, queries = (features(params, b["inputs"]) for b in (batch, real))
        ours, theirs = (centred_labels(b, num_classes).astype(support.dtype) for b in (batch, real))
        predicted = kernel_ridge_predict(support, ours, queries, ridge=ridge)
        right = jnp.argmax(predicted, axis=-1) == jnp.argmax(theirs, axis=-1)
        metrics = {"accuracy": jnp.mean(right.astype(jnp.float32))}
        return jnp.mean((predicted - theirs) ** 2), metrics

    return meta_loss
