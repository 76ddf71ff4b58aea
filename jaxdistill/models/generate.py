"""Greedy and sampled generation with a key/value cache, the whole loop under one jit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdistill.errors import UserError
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Params, init_cache

_BUCKET = 32  # prompts are padded to a multiple of this, so that few shapes are compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Say how the next token is drawn.

    Attributes:
        max_new_tokens: tokens generated at most.
        temperature: 0 is greedy; else logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p (Holtzman et al. 2020).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        sound = self.max_new_tokens >= 1 and self.temperature >= 0 and self.top_k >= 0
        if not sound or not 0 < self.top_p <= 1:
            raise UserError(
                f"{self} given; accepted: max_new_tokens >= 1, temperature >= 0, "
                "top_k >= 0, 0 < top_p <= 1"
            )


def pick(logits_BV: Float[Array, "B V"], rng: Array, how: Sampling) -> Int[Array, "B"]:
    """Draw one token a row by ``how``."""
    if how.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits = logits_BV / how.temperature
    lowest = jnp.finfo(logits.dtype).min
    if how.top_k:
        kth = jax.lax.top_k(logits, min(how.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, lowest, logits)
    if how.top_p < 1:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(
            ordered, axis=-1
        )
        kept = jnp.sum(before < how.top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
        logits = jnp.where(logits < least, lowest, logits)
    return jax.random.categorical(rng, logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("apply", "config", "how", "stop"))
def _generate(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    valid_BT: Int[Array, "B T"],
    rng: Array,
    *,
    apply: Callable[..., Any],
    config: ModelConfig,
    how: Sampling,
    stop: tuple[int, ...],
) -> tuple[Int[Array, "B M"], Int[Array, "B"]]:
    """Return generated tokens and how many of each row count; prompts are left-padded."""
    B, T = tokens_BT.shape
    cache = init_cache(config, B, T + how.max_new_tokens)
    positions = jnp.cumsum(valid_BT, axis=1) - 1
    out, cache = apply(params, tokens_BT, positions, valid_BT, cache)
    stops = jnp.asarray(stop, jnp.int32)

    def logits_of(hidden_BD, head):
        return jnp.einsum("bd,vd->bv", hidden_BD, head, preferred_element_type=jnp.float32)

    def ended(token_B):
        return jnp.any(token_B[:, None] == stops[None], axis=1)

    def more(carry):
        i, done = carry[0], carry[3]
        return (i < how.max_new_tokens) & ~jnp.all(done)

    def one(carry):
        i, token, made, done, lengths, cache, rng = carry
        made = jax.lax.dynamic_update_slice_in_dim(made, token[:, None], i, axis=1)
        lengths = lengths + (~done).astype(jnp.int32)
        place = positions[:, -1:] + 1 + i
        out, cache = apply(params, token[:, None], place, None, cache)
        rng, key = jax.random.split(rng)
        token = pick(logits_of(out.hidden[:, -1], out.head), key, how)
        return i + 1, token, made, done | ended(token), lengths, cache, rng

    rng, key = jax.random.split(rng)
    first = pick(logits_of(out.hidden[:, -1], out.head), key, how)
    made = jnp.zeros((B, how.max_new_tokens), jnp.int32)
    start = (jnp.int32(0), first, made, ended(first), jnp.zeros(B, jnp.int32), cache, rng)
    end = jax.lax.while_loop(more, one, start)
    return end[2], end[4]


def generate(
    apply: Callable[..., Any],
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    how: Sampling | None = None,
    stop: Sequence[int] | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt; return the new token ids, without the stop token.

    Args:
        apply: what ``make_apply`` builds.
        params: its params; dequantize once beforehand, for each token reads all of them.
        config: gives the cache's shape and, without ``stop``, the end-of-text ids.
        prompts: token ids, lengths may differ; none may be empty.
        how: greedy by default.
        stop: ids that end a text.
        seed: of the sampling.
    """
    how = how or Sampling()
    if not prompts or not all(len(p) for p in prompts):
        raise UserError("an empty prompt given; give at least one token")
    longest = max(len(p) for p in prompts)
    if longest + how.max_new_tokens > config.max_position_embeddings:
        raise UserError(
            f"{longest} prompt tokens and {how.max_new_tokens} new ones exceed the model's "
            f"{config.max_position_embeddings} positions; shorten one of them"
        )
    width = -(-longest // _BUCKET) * _BUCKET
    tokens, valid = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        valid[row, width - len(prompt) :] = 1
    made, lengths = _generate(
        params,
        jnp.asarray(tokens),
        jnp.asarray(valid),
        jax.random.key(seed),
        apply=apply,
        config=config,
        how=how,
        stop=tuple(config.eos_token_ids if stop is None else stop),
    )
    return [row[:n].tolist() for row, n in zip(np.asarray(made), np.asarray(lengths), strict=True)]
