"""How sure a model is of its next tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.errors import UserError
from jaxdistill.kd.objective import next_token_targets
from jaxdistill.losses.chunked import Head, chunked_sums
from jaxdistill.losses.divergences import log_probs


def teacher_confidence(
    teacher: Callable[..., Any], params: Any, batches: Iterable[Mapping[str, Any]]
) -> float:
    """Return the mean of the teacher's largest probability over the target tokens of batches.

    Source: the constant of BitDistiller's CAKLD (arXiv 2402.10631), here of the top token.
    """

    def rows(z, guides, row, shared):
        top = jnp.exp(jnp.max(log_probs(z), axis=-1))
        kept = jnp.where(row["mask"], top, jnp.zeros_like(top))
        return {"loss": jnp.sum(kept), "count": jnp.sum(row["mask"], dtype=jnp.float32)}

    @jax.jit
    def sums(params, batch):
        out = teacher(params, batch["tokens"], batch.get("positions"), batch.get("segment_ids"))
        head = Head(out.hidden.reshape(-1, out.hidden.shape[-1]), out.head, out.softcap)
        return chunked_sums(rows, head, (), {"mask": next_token_targets(batch)[1]}, fused=False)

    total = count = 0.0
    for batch in batches:
        found = sums(params, batch)
        total, count = total + float(found["loss"]), count + float(found["count"])
    if not count:
        raise UserError("the batches hold no target token; give longer texts")
    return total / count
