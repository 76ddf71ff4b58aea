"""The loss and the accuracy of a classifier on a batch of examples, hard or soft labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# (params, inputs [B, ...]) -> logits [B, C]
ClassifierFn = Callable[[Any, Any], Any]


def label_probs(batch: dict[str, Any], num_classes: int) -> Float[Array, "B C"]:
    """Return each example's label as probabilities: of ``label_logits``, else of ``labels``."""
    if "label_logits" in batch:
        return jax.nn.softmax(batch["label_logits"], axis=-1)
    return jax.nn.one_hot(batch["labels"], num_classes)


def classification_loss(apply: ClassifierFn) -> Callable[[Any, dict[str, Any]], Array]:
    """Return ``(params, batch) -> mean cross-entropy``, weighted where the batch has ``weights``.

    A batch has ``inputs`` ``[B, ...]``, and ``labels`` int ``[B]`` or ``label_logits`` ``[B, C]``.
    Weights ``[B]`` make it ``sum(w * ce) / B``, so that its gradient by a weight is an example's
    share.
    """

    def loss(params: Any, batch: dict[str, Any]) -> Array:
        logits = apply(params, batch["inputs"])
        target = label_probs(batch, logits.shape[-1]).astype(logits.dtype)
        each = -jnp.sum(target * jax.nn.log_softmax(logits, axis=-1), axis=-1)
        return jnp.mean(each * batch["weights"] if "weights" in batch else each)

    return loss


def accuracy(apply: ClassifierFn, params: Any, batch: dict[str, Any]) -> Float[Array, ""]:
    """Return the share of a batch whose likeliest class is its label."""
    right = jnp.argmax(apply(params, batch["inputs"]), axis=-1) == batch["labels"]
    return jnp.mean(right.astype(jnp.float32))
