"""What a language model sees in a text: mean-pooled hidden states, and input embeddings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from jaxdistill.errors import UserError
from jaxdistill.mesh import fetch
from jaxdistill.models.hub import Model
from jaxdistill.models.token_ids import encode
from jaxdistill.quant.policy import dequantize_params

_SHORTEST = 16  # rows are padded to this or a doubling of it, so that few shapes are compiled
_POOLS = ("mean", "last")


def check_readable(model: Model, seq_len: int) -> None:
    """Raise ``UserError`` where a model has no tokenizer, or fewer positions than ``seq_len``."""
    most = model.config.max_position_embeddings
    if not 1 <= seq_len <= most:
        raise UserError(
            f"--seq-len {seq_len} given for {model.source}; accepted: 1 to its {most} positions"
        )
    model.text_tokenizer()


def token_ids(
    model: Model, texts: Sequence[str], seq_len: int
) -> tuple[Int32[np.ndarray, "N T"], Int32[np.ndarray, "N"]]:
    """Return each text's first ``seq_len`` tokens, 0 where it is shorter, and how many it has.

    Raises:
        UserError: the model has no tokenizer, or fewer positions than ``seq_len``.
    """
    check_readable(model, seq_len)
    encoded = [row.ids for row in encode(model.text_tokenizer(), texts)]
    ids = np.zeros((len(encoded), seq_len), np.int32)
    lengths = np.zeros(len(encoded), np.int32)
    for i, row in enumerate(encoded):
        lengths[i] = min(len(row), seq_len)
        ids[i, : lengths[i]] = row[:seq_len]
    return ids, lengths


def text_features(
    model: Model,
    texts: Sequence[str],
    *,
    seq_len: int = 64,
    batch_size: int = 16,
    layers: int | None = None,
    pool: str = "mean",
    progress: Callable[[int], Any] | None = None,
) -> Float32[np.ndarray, "N D"]:
    """Return one vector a text: the final hidden states of its tokens, pooled.

    A text's vector does not depend on the texts beside it: padding is on the right, where a causal
    model does not see it, and takes no part in the mean.

    Args:
        model: any model with a tokenizer.
        texts: a text without tokens has a vector of zeros.
        seq_len: tokens of a text that are read.
        batch_size: texts read at once, of about equal length.
        layers: how many of the model's layers are run, before its last norm; None for all.
        pool: ``mean`` over the tokens, or the ``last`` token alone.
        progress: told how many texts were read since it was told last.
    """
    if pool not in _POOLS:
        raise UserError(f"pool {pool!r} given; accepted: {', '.join(_POOLS)}; choose one")
    if layers is not None and not 1 <= layers <= model.config.num_layers:
        raise UserError(
            f"{layers} layers given for {model.source}; accepted: 1 to {model.config.num_layers}"
        )
    ids, lengths = token_ids(model, texts, seq_len)
    params = dict(model.params)
    if layers is not None:
        params["layers"] = jax.tree.map(lambda x: x[:layers], params["layers"])
    apply = model.apply_fn()

    @jax.jit
    def pooled(params: Any, tokens: Array, n: Array) -> Array:
        hidden = apply(params, tokens).hidden
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        if pool == "mean":
            chosen = places < n[:, None]
        else:
            chosen = places == n[:, None] - 1
        weights = chosen.astype(hidden.dtype)
        total = jnp.sum(weights, axis=1, keepdims=True)
        return jnp.einsum("btd,bt->bd", hidden, weights / jnp.maximum(total, 1.0))

    found = np.zeros((len(ids), model.config.hidden_size), np.float32)
    for width, rows in _batches(lengths, seq_len, batch_size):
        # The last batch of a width is filled up with its first row: one shape a width.
        filled = np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows))])
        made = pooled(params, jnp.asarray(ids[filled, :width]), jnp.asarray(lengths[filled]))
        found[rows] = fetch(made)[: len(rows)]
        if progress is not None:
            progress(len(rows))
    return found


def _batches(lengths: Int[np.ndarray, "N"], seq_len: int, batch_size: int) -> Any:
    """Yield (width, rows): texts in the order of their lengths, in few padded widths."""
    ends = [_SHORTEST * 2**i for i in range(32) if _SHORTEST * 2**i < seq_len] + [seq_len]
    width_of = np.asarray(ends)[np.searchsorted(ends, lengths)]
    order = np.argsort(lengths, kind="stable")
    for width, rows in itertools.groupby(order, key=lambda i: int(width_of[i])):
        together = np.asarray(list(rows))
        for start in range(0, len(together), batch_size):
            yield width, together[start : start + batch_size]


def embedding_table(model: Model) -> Float32[np.ndarray, "V D"]:
    """Return the model's table of input embeddings, in float."""
    stored = {"embed_tokens": model.params["embed_tokens"]}
    table = dequantize_params(stored)["embed_tokens"]["embedding"]
    return fetch(table).astype(np.float32)


def embed(
    table: Float32[np.ndarray, "V D"],
    ids: Int32[np.ndarray, "N T"],
    lengths: Int32[np.ndarray, "N"],
) -> Float32[np.ndarray, "N T D"]:
    """Return the tokens' rows of a table, zero at padding."""
    real = np.arange(ids.shape[1])[None] < lengths[:, None]
    return table[ids] * real[..., None].astype(np.float32)


def moments(
    train: Float32[np.ndarray, "N ..."],
) -> tuple[Float32[np.ndarray, "*D"], Float32[np.ndarray, "*D"]]:
    """Return mean and deviation of each feature or channel.

    ``[N, D]`` has D of each, images ``[N, H, W]`` one, ``[N, H, W, C]`` C. A deviation is at least
    a tenth of the root mean square of all, so that a feature that hardly varies (a corner's pixel)
    is not made loud.
    """
    axes = {2: (0,), 3: (0, 1, 2), 4: (0, 1, 2)}[train.ndim]
    wide = train.astype(np.float64)
    mean, deviation = wide.mean(axes), wide.std(axes)
    least = 0.1 * np.sqrt(np.mean(np.square(deviation)))
    deviation = np.maximum(deviation, least if least > 0 else 1.0)
    return np.asarray(mean, np.float32), np.asarray(deviation, np.float32)
