"""Distillation between two vocabularies: what can be compared where ids mean different text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxdistill.errors import UserError
from jaxdistill.kd.objective import Batch, Metrics, Objective, head_of, next_token_targets
from jaxdistill.losses.chunked import CHUNK, Head, chunked_sums
from jaxdistill.losses.loss import Loss, Term, parse_loss
from jaxdistill.losses.token_log_probs import chunked_log_probs
from jaxdistill.models.decoder import ApplyFn, Output, Params


def _places(batch: Batch, prefix: str = "") -> tuple[Array, Array]:
    """Return each place's next token and whether it counts, ``[B, T]``."""
    names = ("tokens", "loss_mask", "segment_ids")
    own = {name: batch[prefix + name] for name in names if prefix + name in batch}
    targets, mask = next_token_targets(own)
    return targets.reshape(own["tokens"].shape), mask.reshape(own["tokens"].shape)


def _by_order(mask: Bool[Array, "B T"], number: int) -> tuple[Array, Array]:
    """Return the places of the first targets in order, ``[B, number]``, and which are there."""
    order = jnp.argsort(~mask, axis=1, stable=True)[:, :number]
    return order, jnp.take_along_axis(mask, order, axis=1)


def span_sums(
    values: Float[Array, "B T"],
    counted: Bool[Array, "B T"],
    places: Array,
    there: Bool[Array, "B P"],
) -> tuple[Float[Array, "B P"], Bool[Array, "B P"]]:
    """Sum what is said from each place on, up to the next one.

    Args:
        values: of each place, the log-probability of the next token.
        counted: which places predict a target.
        places: ``[B, P]``, rising.
        there: which of them are there; those that are come first.

    Returns:
        The sums of the spans that begin at each of the places; and which of the spans are whole:
        ended by another place, all of their tokens targets.
    """
    B, T = values.shape
    P = places.shape[1]
    rows = jnp.arange(B)[:, None]
    begins = jnp.zeros((B, T), jnp.int32).at[rows, places].add(there.astype(jnp.int32))
    span = jnp.cumsum(begins, axis=1) - 1
    span = jnp.where(span < 0, P, span)  # before the first place: dropped
    sums = (
        jnp.zeros((B, P), values.dtype)
        .at[rows, span]
        .add(jnp.where(counted, values, jnp.zeros_like(values)), mode="drop")
    )
    missed = (
        jnp.zeros((B, P), jnp.int32).at[rows, span].add((~counted).astype(jnp.int32), mode="drop")
    )
    ended = jnp.roll(there, -1, axis=1).at[:, -1].set(False)
    return sums, there & ended & (missed == 0)


def uld_places(
    batch: Batch, mask: Bool[Array, "B T"], other_mask: Bool[Array, "B U"], align: str
) -> tuple[Array, Array, Bool[Array, "B P"]]:
    """Return the student's and the teacher's places that are compared, and which of them count.

    A pair counts where both models' next tokens are targets.
    """
    if align == "index":
        number = min(mask.shape[1], other_mask.shape[1])
        own, valid = _by_order(mask, number)
        other, there = _by_order(other_mask, number)
        return own, other, valid & there
    own, other = batch["pair_student"], batch["pair_teacher"]
    valid = jnp.take_along_axis(mask, own, axis=1) & jnp.take_along_axis(other_mask, other, axis=1)
    return own, other, valid & batch["pair_mask"].astype(bool)


def cross_tokenizer_objective(
    student: ApplyFn,
    teacher: ApplyFn,
    loss: str | Loss = "uld",
    *,
    chunk: int = CHUNK,
    fused: bool = True,
) -> Objective:
    """Build the distillation between two vocabularies, on rows of ``train.pairing``.

    Args:
        student: the student's ``ApplyFn``, its transform inside.
        teacher: the teacher's.
        loss: a sum of cross-tokenizer terms and ``ce``: ``uld``, ``0.5*span_likelihood+0.5*ce``.
        chunk: places whose logits exist at once.
        fused: see ``losses.chunked``; False where the objective is differentiated twice.

    Returns:
        an ``Objective`` whose metrics are ``loss``, the student's ``nll``, and each cross-tokenizer
        term by its name, over the pairs or spans that it compares. The loss is the weighted sum of
        the terms' means; its count is that of the student's targets. Where tokens have weights,
        each mean is the weighted one; metrics are not weighed.

    Raises:
        UserError: the loss has a term that compares ids of one vocabulary.
    """
    given = parse_loss(loss) if isinstance(loss, str) else loss
    for term in given.terms:
        if term.entry.kind != "cross_tokenizer" and term.entry.name != "ce":
            raise UserError(
                f"{term.entry.name} compares models of one vocabulary, and here are two; "
                "accepted: uld, span_likelihood, ce, and sums of them"
            )

    def objective(
        params: Params, teacher_params: Any, batch: Batch, knobs: Mapping[str, Array] = {}
    ):
        out = student(params, batch["tokens"], batch.get("positions"), batch.get("segment_ids"))
        guide = teacher(
            teacher_params,
            batch["teacher_tokens"],
            batch.get("teacher_positions"),
            batch.get("teacher_segment_ids"),
        )
        guide = jax.tree.map(lax.stop_gradient, guide)
        targets, mask = _places(batch)
        others, other_mask = _places(batch, "teacher_")
        weights = jnp.ones(mask.shape, jnp.float32)
        if "weights" in batch:
            weights = jnp.roll(batch["weights"].astype(jnp.float32), -1, axis=1)
        log_q = chunked_log_probs(head_of(out), targets.reshape(-1), chunk=chunk)
        log_q = log_q.reshape(mask.shape)
        count = jnp.sum(mask, dtype=jnp.float32)
        metrics: Metrics = {"nll": (_total(-log_q, mask), count)}
        loss = jnp.zeros((), jnp.float32)
        for term in given.terms:
            arguments = term.given(knobs)
            if term.entry.name == "ce":
                loss = loss + term.weight * _mean(-log_q, mask, weights)
                continue
            if term.entry.name == "uld":
                own, other, valid = uld_places(
                    batch, mask, other_mask, arguments.get("align", "spans")
                )
                heads = _gathered(out, own), _gathered(guide, other)
                row = {"mask": valid, "weight": jnp.take_along_axis(weights, own, axis=1)}
                mean, pair = _uld(term, arguments, *heads, row, chunk, fused)
            else:
                log_p = chunked_log_probs(head_of(guide), others.reshape(-1), chunk=chunk)
                log_p = log_p.reshape(others.shape)
                there, own = batch["pair_mask"].astype(bool), batch["pair_student"]
                of_student, whole = span_sums(log_q, mask, own, there)
                of_teacher, also = span_sums(log_p, other_mask, batch["pair_teacher"], there)
                valid = whole & also
                values = term.entry.function(
                    of_student.reshape(-1), of_teacher.reshape(-1), **arguments
                ).reshape(valid.shape)
                mean = _mean(values, valid, jnp.take_along_axis(weights, own, axis=1))
                pair = _total(values, valid), jnp.sum(valid, dtype=jnp.float32)
            metrics[term.entry.name] = pair
            loss = loss + term.weight * mean
        metrics["loss"] = (loss * count, count)
        return loss * count, count, metrics

    return objective


def _total(values: Array, mask: Array) -> Array:
    return jnp.sum(jnp.where(mask, values, jnp.zeros_like(values)))


def _mean(values: Array, mask: Array, weights: Array) -> Array:
    return _total(weights * values, mask) / jnp.maximum(_total(weights, mask), 1e-9)


def _gathered(out: Output, places: Array) -> Head:
    """Return a model's head over the hidden states of some places of each row."""
    hidden = jnp.take_along_axis(out.hidden, places[..., None], axis=1)
    return Head(hidden.reshape(-1, hidden.shape[-1]), out.head, out.softcap)


def _uld(
    term: Term,
    arguments: dict[str, Any],
    student: Head,
    teacher: Head,
    row: dict[str, Array],
    chunk: int,
    fused: bool,
) -> tuple[Array, tuple[Array, Array]]:
    """Return the weighted mean over the pairs, and the metric."""
    fixed = {name: value for name, value in arguments.items() if isinstance(value, str)}
    traced = {name: value for name, value in arguments.items() if name not in fixed}

    def rows(z, guides, row, traced):
        values = term.entry.function(z, guides[0], **fixed, **traced)
        return {
            "loss": _total(row["weight"] * values, row["mask"]),
            "weight": _total(row["weight"], row["mask"]),
            "value": _total(values, row["mask"]),
            "count": jnp.sum(row["mask"], dtype=jnp.float32),
        }

    flat = jax.tree.map(lambda x: x.reshape(-1), row)
    sums = chunked_sums(rows, student, (teacher,), flat, traced, chunk=chunk, fused=fused)
    return sums["loss"] / jnp.maximum(sums["weight"], 1e-9), (sums["value"], sums["count"])
