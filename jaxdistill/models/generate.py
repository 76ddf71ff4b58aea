"""Greedy and sampled generation with a key/value cache, the whole loop under one jit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.errors import UserError
from jaxdistill.mesh import fetch
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Output, Params, init_cache, unstack

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


class Samples(NamedTuple):
    """Hold what was drawn: each row's first ``lengths`` tokens, a stop token among them."""

    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    log_probs: Float[Array, "B M"]  # of each token, under the distribution it was drawn from


def shaped(logits_BV: Float[Array, "B V"], how: Sampling) -> Float[Array, "B V"]:
    """Return logits of the distribution that ``how`` draws from; its temperature is above 0."""
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
    return logits


def draw(
    logits_BV: Float[Array, "B V"], rng: Array, how: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draw one token a row by ``how``; return it and its log-probability (greedy: 0)."""
    if how.temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return token_B, jnp.zeros(token_B.shape, jnp.float32)
    logits = shaped(logits_BV, how)
    token_B = jax.random.categorical(rng, logits, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen - jax.nn.logsumexp(logits, axis=-1)


def sample(
    apply: Callable[..., Any],
    config: ModelConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    valid_BT: Int[Array, "B T"],
    rng: Array,
    *,
    how: Sampling,
    stop: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
) -> Samples:
    """Continue left-padded prompts; a pure function, to be called inside jit.

    It ends when every row has drawn a stop token or ``how.max_new_tokens``. There is no gradient.

    Args:
        apply: what ``make_apply`` builds.
        config: gives the cache's shape.
        params: its params; every token reads all of them, so transform them once beforehand. Of
            stacked layers a copy is made, one by one (``decoder.unstack``).
        tokens_BT: prompts, their last tokens in the last column; a row of padding alone is filled
            with anything, and not waited for.
        valid_BT: 1 for a prompt's tokens, 0 for padding.
        rng: of the sampling.
        how: see ``Sampling``.
        stop: ids that end a row.
        dtype: of keys and values in the cache; that of ``apply``'s activations.
    """
    B, T = tokens_BT.shape
    positions = jnp.cumsum(valid_BT, axis=1) - 1
    stops = jnp.asarray(stop, jnp.int32)

    def drawn(out: Output, rng: Array) -> tuple[Array, Array, Array]:
        rng, key = jax.random.split(rng)
        logits_B1V = out._replace(hidden=out.hidden[:, -1:]).logits()
        return rng, *draw(logits_B1V[:, 0], key, how)

    def ended(token_B: Array) -> Array:
        return jnp.any(token_B[:, None] == stops[None], axis=1)

    def put(rows_BM: Array, value_B: Array, i: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(rows_BM, value_B[:, None], i, axis=1)

    def more(carry):
        i, samples = carry[0], carry[2]
        return (i < how.max_new_tokens) & ~jnp.all(samples.stopped)

    def one(carry):
        i, token_B, made, cache, rng = carry
        out, cache = apply(layered, token_B[:, None], positions[:, -1:] + i, None, cache)
        rng, token_B, log_prob_B = drawn(out, rng)
        made = Samples(
            tokens=put(made.tokens, token_B, i),
            lengths=made.lengths + (~made.stopped).astype(jnp.int32),
            stopped=made.stopped | ended(token_B),
            log_probs=put(made.log_probs, log_prob_B, i),
        )
        return i + 1, token_B, made, cache, rng

    cache = init_cache(config, B, T + how.max_new_tokens, dtype)
    layered = unstack(params)
    cache = cache.unstack() if layered is params else cache
    out, cache = apply(params, tokens_BT, positions, valid_BT, cache)
    cache = cache.unstack()
    rng, token_B, log_prob_B = drawn(out, rng)
    empty = jnp.zeros((B, how.max_new_tokens))
    first = Samples(
        tokens=put(empty.astype(jnp.int32), token_B, jnp.int32(0)),
        lengths=jnp.ones(B, jnp.int32),
        stopped=ended(token_B) | ~jnp.any(valid_BT > 0, axis=1),
        log_probs=put(empty, log_prob_B, jnp.int32(0)),
    )
    return jax.lax.while_loop(more, one, (jnp.int32(1), token_B, first, cache, rng))[2]


_sample = jax.jit(sample, static_argnames=("apply", "config", "how", "stop", "dtype"))


def generate(
    apply: Callable[..., Any],
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    how: Sampling | None = None,
    stop: Sequence[int] | None = None,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
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
        dtype: of keys and values in the cache; that of ``apply``'s activations.
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
    samples = _sample(
        apply,
        config,
        params,
        jnp.asarray(tokens),
        jnp.asarray(valid),
        jax.random.key(seed),
        how=how,
        stop=tuple(config.eos_token_ids if stop is None else stop),
        dtype=dtype,
    )
    lengths = fetch(samples.lengths) - fetch(samples.stopped)
    return [row[:n].tolist() for row, n in zip(fetch(samples.tokens), lengths, strict=True)]
