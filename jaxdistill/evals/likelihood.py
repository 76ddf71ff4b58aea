"""Log-likelihood of continuations given contexts: encoding, batching by length, scoring.

Text becomes tokens by the rule of the lm-evaluation-harness, so that numbers agree with it. The
model runs once over each distinct input: pairs whose input is the beginning of another's share its
row, so the choices "yes" and "no" after one passage cost one row. Logits are made for the places
of continuations alone, a chunk at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.errors import UserError
from jaxdistill.losses.chunked import CHUNK
from jaxdistill.losses.divergences import ce
from jaxdistill.mesh import fetch
from jaxdistill.models.token_ids import encode_text
from jaxdistill.models.tokenizer import Tokenizer


class Pair(NamedTuple):
    """Hold the token ids of a context (at least one) and of the continuation to be scored."""

    context: list[int]
    continuation: list[int]


class Likelihoods(NamedTuple):
    """Hold, for each pair, the continuation's log-likelihood and whether greedy decoding gives it.

    Log-likelihoods are natural logarithms, summed over the continuation's tokens.
    """

    log_likelihood: Float[np.ndarray, "N"]
    greedy: Bool[np.ndarray, "N"]


def prefix_token(tokenizer: Tokenizer) -> int:
    """Return the token that stands before a text without context: BOS, or else EOS.

    Raises:
        UserError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return cast(int, token)
    raise UserError(
        "the tokenizer has neither a BOS nor an EOS token to stand before a text without context; "
        "set one of them in the tokenizer's files, or give rows with a context"
    )


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Split a text into the tokens of its context and those of its continuation.

    The rule of the lm-evaluation-harness (``TemplateLM._encode_pair`` and ``loglikelihood``):
    white space at the end of the context goes over to the continuation; the continuation's tokens
    are those of the whole text after as many as the context has by itself; without a context, or
    with white space alone, BOS or else EOS stands for it.
    """
    kept, whole = context.rstrip(), context + continuation
    if not kept:
        tokens, first = encode_text(tokenizer, whole, bos=False), prefix_token(tokenizer)
        return Pair(tokens[:1], tokens[1:]) if tokens[:1] == [first] else Pair([first], tokens)
    before = encode_text(tokenizer, kept)
    return Pair(before, encode_text(tokenizer, whole)[len(before) :])


class _Target(NamedTuple):
    """Say which places of a row predict a pair's continuation."""

    pair: int
    start: int  # the place that predicts the first token
    tokens: list[int]


class _Row(NamedTuple):
    """Hold one distinct input of the model and all continuations that it predicts."""

    tokens: tuple[int, ...]
    targets: list[_Target]


def _rows(pairs: Sequence[Pair], max_length: int) -> list[_Row]:
    """Return the distinct inputs, longest first; an input that begins another is part of it."""
    inputs = []
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 1 <= len(continuation) <= max_length:
            raise UserError(
                f"text {number} has {len(context)} context and {len(continuation)} continuation "
                f"tokens; accepted: a context, and 1 to {max_length} continuation tokens, the "
                "model's positions; shorten or remove it"
            )
        tokens = tuple([*context, *continuation][-(max_length + 1) : -1])
        start = len(tokens) - len(continuation)
        inputs.append((tokens, _Target(number, start, continuation)))
    inputs.sort(key=lambda item: item[0])
    rows: list[_Row] = []
    for tokens, target in reversed(inputs):  # what begins with A follows A in this order
        if rows and rows[-1].tokens[: len(tokens)] == tokens:
            rows[-1].targets.append(target)
        else:
            rows.append(_Row(tokens, [target]))
    return sorted(rows, key=lambda row: -len(row.tokens))


def _width(length: int) -> int:
    """Return the bucket of a length: 8, 12, 16, 24, 32, 48, 64, 96 and so on."""
    half = 1 << max(2, (length - 1).bit_length() - 2)
    return max(8, -(-length // half) * half)


def _batches(rows: list[_Row], batch_tokens: int, max_length: int) -> Iterator[tuple[Any, ...]]:
    """Yield (rows, tokens [B, T]); T is the bucket of the longest, B follows from it."""
    done = 0
    while done < len(rows):
        width = min(_width(len(rows[done].tokens)), max_length)
        height = max(1, batch_tokens // width)
        eighth = -(-height // 8)
        height = min(height, -(-(len(rows) - done) // eighth) * eighth)  # the last batch is smaller
        part = rows[done : done + height]
        tokens = np.zeros((height, width), np.int32)
        for i, row in enumerate(part):
            tokens[i, : len(row.tokens)] = row.tokens
        yield part, tokens
        done += height


@functools.partial(jax.jit, static_argnames=("apply", "chunk"))
def _score(
    params: Any,
    tokens_BT: Int[Array, "B T"],
    places_N: Int[Array, "N"],
    targets_N: Int[Array, "N"],
    count: Int[Array, ""],
    *,
    apply: Callable[..., Any],
    chunk: int,
) -> tuple[Float[Array, "N"], Bool[Array, "N"]]:
    """Return each target's log-probability at its place, and whether it is the most likely token.

    ``places`` index the flat ``[B*T]`` batch; those from ``count`` on are padding and cost nothing.
    """
    out = apply(params, tokens_BT)
    hidden_ND = out.hidden.reshape(-1, out.hidden.shape[-1])

    def one(i, carry):
        start = i * chunk
        place = lax.dynamic_slice_in_dim(places_N, start, chunk)
        target = lax.dynamic_slice_in_dim(targets_N, start, chunk)
        logits = jnp.einsum(
            "nd,vd->nv", hidden_ND[place], out.head, preferred_element_type=jnp.float32
        )
        new = (-ce(logits, target), jnp.argmax(logits, axis=-1) == target)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return tuple(put(old, x) for old, x in zip(carry, new, strict=True))

    empty = (jnp.zeros(places_N.shape, jnp.float32), jnp.zeros(places_N.shape, bool))
    return lax.fori_loop(0, (count + chunk - 1) // chunk, one, empty)


def log_likelihoods(
    apply: Callable[..., Any],
    params: Any,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    batch_tokens: int | None = None,
    chunk: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> Likelihoods:
    """Score every pair: ``sum_i log p(continuation_i | context, continuation_<i)``.

    Args:
        apply: an ``ApplyFn``; the same function is compiled once a shape, over all calls.
        params: its params.
        pairs: contexts and continuations, in any order.
        max_length: tokens the model can read; what is longer loses tokens from the left.
        batch_tokens: places of a batch, padding included; by default 1024 on a CPU, else 16384.
        chunk: places whose logits exist at once.
        progress: told the number of pairs done after each batch.

    Returns:
        float64 sums of float32 log-probabilities, in the order of ``pairs``.

    Raises:
        UserError: a continuation has no token or more than the model can read, or the model gives
            something that is no number.
    """
    if batch_tokens is None:
        batch_tokens = 1024 if jax.default_backend() == "cpu" else 16384
    rows = _rows(pairs, max_length)
    sums, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)
    for part, tokens in _batches(rows, batch_tokens, max_length):
        width = tokens.shape[1]
        wanted = [(i * width, target) for i, row in enumerate(part) for target in row.targets]
        places = [first + t.start + k for first, t in wanted for k in range(len(t.tokens))]
        targets = [token for _, t in wanted for token in t.tokens]
        owners = [t.pair for _, t in wanted for _ in t.tokens]
        size = -(-tokens.size // chunk) * chunk
        while size < len(places):  # many continuations of few inputs
            size *= 2
        filled = np.zeros((2, size), np.int32)
        filled[:, : len(places)] = places, targets
        scores = _score(
            params, tokens, filled[0], filled[1], np.int32(len(places)), apply=apply, chunk=chunk
        )
        log_p, best = (fetch(x)[: len(places)] for x in scores)
        np.add.at(sums, owners, log_p.astype(np.float64))
        np.logical_and.at(greedy, owners, best)
        if progress is not None:
            progress(len(wanted))
    if not np.isfinite(sums).all():
        raise UserError(
            "the model gives log-likelihoods that are not finite; its weights are damaged or "
            "too large for its float type: load or train it again"
        )
    return Likelihoods(sums, greedy)
