"""Text for a synthetic set: the nearest tokens, the nearest real examples, or generated text.

``dd.perplexity_projection`` finds tokens that a language model finds likely as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from jaxdistill.dd.selection import k_center
from jaxdistill.errors import UserError
from jaxdistill.losses.chunked import CHUNK
from jaxdistill.models.generate import Sampling, generate
from jaxdistill.models.hub import Model
from jaxdistill.models.token_ids import prompt_ids

Metric = Literal["cosine", "l2"]


@functools.partial(jax.jit, static_argnames=("k", "metric", "chunk"))
def nearest_rows(
    points_ND: Float[Array, "N D"],
    table_VD: Float[Array, "V D"],
    allowed_V: Bool[Array, "V"] | None = None,
    *,
    k: int,
    metric: Metric,
    chunk: int = CHUNK,
) -> tuple[Int[Array, "N k"], Float[Array, "N k"]]:
    """Return the ids of each point's k nearest rows, nearest first, and their squared distances.

    Arguments as in ``nearest_tokens``.
    """
    table = table_VD.astype(jnp.float32)
    norms_V = jnp.linalg.norm(table, axis=1)

    def one(point_D: Array) -> tuple[Array, Array]:
        dots_V = jnp.matmul(table, point_D, precision=lax.Precision.HIGHEST)
        # -|x - e|^2 + |x|^2, or the cosine times |x|: both in the order of nearness.
        near = 2 * dots_V - norms_V**2 if metric == "l2" else dots_V / jnp.maximum(norms_V, 1e-12)
        if allowed_V is not None:
            near = jnp.where(allowed_V, near, -jnp.inf)
        ids = lax.top_k(near, k)[1]
        return ids, jnp.sum((table[ids] - point_D[None]) ** 2, axis=1)

    return lax.map(one, points_ND.astype(jnp.float32), batch_size=chunk)


def nearest_tokens(
    embeddings: Float[Array, "M T D"],
    table: Float[Array, "V D"],
    *,
    metric: Metric = "cosine",
    allowed: Bool[Array, "V"] | None = None,
    chunk: int = CHUNK,
) -> Int[Array, "M T"]:
    """Return for every place the token whose embedding is nearest.

    Args:
        embeddings: synthetic examples, in the table's own scale.
        table: the model's input embeddings.
        metric: largest cosine, or least squared distance.
        allowed: tokens to choose from; all, if None.
        chunk: places whose V scores exist at once.
    """
    M, T, D = embeddings.shape
    ids, _ = nearest_rows(
        embeddings.reshape(M * T, D), table, allowed, k=1, metric=metric, chunk=chunk
    )
    return ids.reshape(M, T)


def nearest_examples(
    inputs: Float[Array | np.ndarray, "M F"],
    features: Float[Array | np.ndarray, "N F"],
    labels: Int[Array | np.ndarray, "N"],
    of_labels: Int[Array | np.ndarray, "M"],
) -> Int[np.ndarray, "M"]:
    """Return for every synthetic example a real one of its class, none of them twice.

    Of all such choices it is the one of least summed squared distance (linear assignment), which is
    everyone's nearest where no two want the same.

    Args:
        inputs: the synthetic examples' features.
        features: the real examples' features.
        labels: the real examples' classes.
        of_labels: the synthetic examples' classes.

    Raises:
        UserError: a class has fewer real examples than synthetic ones.
    """
    wanted, real = np.asarray(of_labels), np.asarray(labels)
    found = np.zeros(len(wanted), np.int32)
    for label in np.unique(wanted):
        rows, choices = np.flatnonzero(wanted == label), np.flatnonzero(real == label)
        if len(choices) < len(rows):
            raise UserError(
                f"class {label} has {len(rows)} synthetic examples and {len(choices)} real ones; "
                "accepted: at least as many real ones; give more of them"
            )
        distances = cdist(np.asarray(inputs)[rows], np.asarray(features)[choices], "sqeuclidean")
        at, chosen = linear_sum_assignment(distances)
        found[rows[at]] = choices[chosen]
    return found


def generate_texts(
    model: Model,
    prompts: Sequence[str],
    how: Sampling,
    *,
    chat: bool = True,
    batch_size: int = 16,
    seed: int = 0,
) -> list[str]:
    """Return a model's answer to every prompt, batch by batch.

    Args:
        model: with its tokenizer.
        prompts: what the user says, one an answer; repeat one to draw from it several times.
        how: the sampling.
        chat: put prompts through the chat template, where the tokenizer has one.
        batch_size: prompts answered at once.
        seed: of the sampling.
    """
    tokenizer = model.text_tokenizer()
    rows = [prompt_ids(tokenizer, prompt, chat=chat) for prompt in prompts]
    apply, made = model.apply_fn(), []
    for number, at in enumerate(range(0, len(rows), batch_size)):
        batch = rows[at : at + batch_size]
        full = batch + batch[-1:] * (min(batch_size, len(rows)) - len(batch))  # one shape
        new = generate(
            apply,
            model.params,
            model.config,
            full,
            how=how,
            stop=model.stop_ids,
            seed=seed + number,
        )
        made += new[: len(batch)]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in made]


def filter_generated(
    features: Float[Array | np.ndarray, "N F"],
    labels: Int[Array | np.ndarray, "N"],
    predicted_probs: Float[Array | np.ndarray, "N C"],
    *,
    per_class: int,
    threshold: float | None = None,
    duplicate: float = 0.95,
    pick: Callable[[np.ndarray, int], Any] | None = None,
    names: Sequence[str] | None = None,
) -> Int[np.ndarray, "K"]:
    """Choose among generated texts: confirmed by a classifier, no duplicates, diverse.

    Of each class it keeps the texts whose likeliest class is the one they were written for, with
    that class's probability at least ``threshold``; of two nearly equal ones the surer; then it
    picks.

    Args:
        features: of the texts; compared by cosine.
        labels: the classes that the texts were written for.
        predicted_probs: a trained classifier's.
        per_class: texts chosen of each class.
        threshold: least probability; None: the median of the texts written for the class.
        duplicate: a larger cosine to a surer text of the class makes a duplicate.
        pick: ``(unit features [n, F], per_class) -> positions``; None: greedy k-center (arXiv
            1708.00489) from the text nearest to the mean.
        names: the classes' names by number, for errors.

    Returns:
        Rows, class by class.

    Raises:
        UserError: a class has too few texts left.
    """
    if per_class < 1:
        raise UserError(f"per_class={per_class} given; accepted: at least 1")
    wanted, probs = np.asarray(labels), np.asarray(predicted_probs, np.float64)
    sure = probs[np.arange(len(wanted)), wanted]
    units = np.asarray(features, np.float64)
    units = units / np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-12)
    chosen = []
    for label in range(probs.shape[1]):
        rows = np.flatnonzero(wanted == label)
        least = threshold if threshold is not None or not len(rows) else np.median(sure[rows])
        confirmed = rows[(probs[rows].argmax(axis=1) == label) & (sure[rows] >= (least or 0.0))]
        kept: list[int] = []
        for row in confirmed[np.argsort(-sure[confirmed], kind="stable")]:
            if not kept or (units[kept] @ units[row]).max() <= duplicate:
                kept.append(int(row))
        if len(kept) < per_class:
            raise UserError(
                f"class {label if names is None else repr(names[label])}: of {len(rows)} texts "
                f"{len(confirmed)} are confirmed and {len(kept)} of these are no duplicates; "
                f"accepted: at least {per_class}; generate more or lower the threshold"
            )
        chosen.append(np.asarray(kept)[np.asarray((pick or k_center)(units[kept], per_class))])
    return np.concatenate(chosen).astype(np.int32)
