"""Projection of embeddings onto likely text: a beam search with a language model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.dd.text import nearest_rows
from jaxdistill.errors import UserError
from jaxdistill.models.decoder import Output


def perplexity_projected(
    embeddings: Float[Array, "M T D"],
    table: Float[Array, "V D"],
    apply: Callable[..., Output],
    params: Any,
    *,
    weight: float | int,
    rho: float | int = 1.0,
    candidates: int = 32,
    beam: int = 4,
    prefix: Int[Array, "M P"] | None = None,
    allowed: Bool[Array, "V"] | None = None,
    batch_size: int = 8,
) -> Int[Array, "M T"]:
    """Return token sequences that are near the embeddings and likely under a language model.

    A beam search, left to right, for the tokens y of each example that make largest

        sum_t  -rho/2 |x_t - E[y_t]|^2  +  weight * log p(y_t | prefix, y_<t),

    y_t among the ``candidates`` tokens whose embeddings E are nearest to x_t (least squared
    distance): the projection of GRADMM (arXiv 2502.17607), the proximal map of the text's NLL. The
    search is exact where ``beam`` holds all prefixes; ``weight=0`` gives the nearest tokens.

    Args:
        embeddings: the points x to project, in the table's own scale.
        table: input embeddings of V tokens, those of the language model's vocabulary.
        apply: the language model, causal, ``(params, tokens [B, T]) -> Output``; every step reads
            the whole prefix again. Compiled once for one function and one set of shapes.
        params: its params.
        weight: of the log-likelihood in nats.
        rho: of the squared distance, as in ADMM.
        candidates: tokens tried at each place.
        beam: sequences kept.
        prefix: tokens before the text, such as a start token or a prompt that names the class;
            without one the first token is judged by its distance alone.
        allowed: tokens to choose from; all, if None.
        batch_size: examples searched at once; ``batch_size * beam`` rows go through the model.

    Raises:
        UserError: numbers out of range, or a model with fewer tokens than the table.
    """
    if candidates < 1 or beam < 1 or batch_size < 1 or weight < 0 or rho < 0:
        raise UserError(
            f"candidates={candidates}, beam={beam}, batch_size={batch_size}, weight={weight}, "
            f"rho={rho} given; accepted: whole numbers from 1, weights from 0; correct them"
        )
    M, T, D = embeddings.shape
    k = min(candidates, table.shape[0])
    ids, distances = nearest_rows(embeddings.reshape(M * T, D), table, allowed, k=k, metric="l2")
    near = -0.5 * rho * distances
    if allowed is not None:  # fewer than k may be
        near = jnp.where(allowed[ids], near, -jnp.inf)
    before = jnp.zeros((M, 0), jnp.int32) if prefix is None else prefix.astype(jnp.int32)
    return _search(
        apply,
        params,
        ids.reshape(M, T, k),
        near.reshape(M, T, k),
        before,
        jnp.float32(weight),
        table.shape[0],
        beam,
        batch_size,
    )


@functools.partial(jax.jit, static_argnames=("apply", "vocab_size", "beam", "batch_size"))
def _search(
    apply: Callable[..., Output],
    params: Any,
    ids_MTK: Array,
    near_MTK: Array,
    prefix_MP: Array,
    weight: Array,
    vocab_size: int,
    beam: int,
    batch_size: int,
) -> Array:
    P, (T, K) = prefix_MP.shape[1], ids_MTK.shape[1:]

    def log_probs(tokens: Array, t: Array) -> Array:
        """Return log p of each token at place P + t, given those before, ``[beam, V]``."""
        out = apply(params, tokens)
        if out.head.shape[0] < vocab_size:
            raise UserError(
                f"embeddings of {vocab_size} tokens given beside a language model of "
                f"{out.head.shape[0]}; accepted: one vocabulary; take the table of that model"
            )
        last = lax.dynamic_slice_in_dim(out.hidden, jnp.maximum(P + t - 1, 0), 1, axis=1)
        found = jax.nn.log_softmax(out._replace(hidden=last).logits()[:, 0], axis=-1)
        return jnp.where(P + t > 0, found, 0.0)

    def one(example: tuple[Array, Array, Array]) -> Array:
        ids_TK, near_TK, prefix_P = example

        def place(t: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            tokens, scores = carry
            likely = weight * log_probs(tokens, t)[:, ids_TK[t]]
            total = scores[:, None] + near_TK[t][None] + likely
            scores, chosen = lax.top_k(total.reshape(beam * K), beam)
            tokens = tokens[chosen // K].at[:, P + t].set(ids_TK[t][chosen % K])
            return tokens, scores

        start = jnp.pad(prefix_P, (0, T))
        tokens = jnp.broadcast_to(start[None], (beam, P + T))
        scores = jnp.full(beam, -jnp.inf).at[0].set(0.0)  # one prefix, not the same beam times
        return lax.fori_loop(0, T, place, (tokens, scores))[0][0, P:]

    return lax.map(one, (ids_MTK, near_MTK, prefix_MP), batch_size=batch_size)
