"""The log-probability of each token, without all the logits at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxdistill.losses.chunked import Head
from jaxdistill.losses.divergences import target_log_probs


def chunked_log_probs(
    head: Head, targets: Int[Array, "N"], *, chunk: int = 256
) -> Float[Array, "N"]:
    """Return ``log softmax(z)[target]`` of each place, float32.

    The logits of ``chunk`` places exist at a time, in the backward pass too, where they are made
    again. Differentiable any number of times by hidden states and kernel.
    """
    n = targets.shape[0]
    chunk = min(chunk, n)
    extra = -n % chunk
    hidden = jnp.pad(head.hidden, ((0, extra), (0, 0))).reshape(-1, chunk, head.hidden.shape[-1])

    @jax.checkpoint
    def one(x):
        hidden, targets = x
        return target_log_probs(head._replace(hidden=hidden).logits(), targets)

    return lax.map(one, (hidden, jnp.pad(targets, (0, extra)).reshape(-1, chunk))).reshape(-1)[:n]
