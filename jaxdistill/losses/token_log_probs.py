"""The log-probability of each token, without all the logits at once."""

from __future__ import annotations

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxdistill.losses.chunked import CHUNK, Head, join_chunks, pad_and_split
from jaxdistill.losses.divergences import target_log_probs


def chunked_log_probs(
    head: Head, targets: Int[Array, "N"], *, chunk: int = CHUNK
) -> Float[Array, "N"]:
    """Return ``log softmax(z)[target]`` of each place, float32.

    The logits of ``chunk`` places exist at a time, in the backward pass too, where they are made
    again. Differentiable any number of times by hidden states and kernel.
    """
    n = targets.shape[0]
    chunk = min(chunk, n)

    @jax.checkpoint
    def one(x):
        hidden, targets = x
        return target_log_probs(head._replace(hidden=hidden).logits(), targets)

    rows = pad_and_split(head.hidden, chunk), pad_and_split(targets, chunk)
    return join_chunks(lax.map(one, rows), n)
