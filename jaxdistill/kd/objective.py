"""Objectives: ``(params, teacher_params, batch) -> (loss_sum, count, metrics)``, pure functions."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ops import segment_sum
from jaxtyping import Array, Float

from jaxdistill.errors import UserError
from jaxdistill.kd import states as _states  # this and the next two fill the registry
from jaxdistill.kd import teachers as _teachers  # noqa: F401
from jaxdistill.kd import token_weights as _token_weights  # noqa: F401
from jaxdistill.losses.chunked import CHUNK, Head, chunked_sums
from jaxdistill.losses.divergences import ce, forward_kl
from jaxdistill.losses.loss import Loss, Term, parse_loss, parse_term
from jaxdistill.losses.top_k import TopK, with_tail
from jaxdistill.models.decoder import ApplyFn, Output, Params

# tokens, loss_mask, segment_ids, positions [B, T]; where there are any: weights [B, T]; embeddings
# [B, T, D], which models read in the place of tokens; a cached teacher's teacher_log_probs and
# teacher_indices [B, T, k], teacher_log_tail [B, T], or all of it as teacher_logits [B, T, V].
Batch = dict[str, Array]
Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # name -> (sum, count)


@runtime_checkable
class Objective(Protocol):
    """Score a student on a batch; means are taken over (sum, count), never over padding."""

    def __call__(
        self,
        params: Params,
        teacher_params: Any,
        batch: Batch,
        knobs: Mapping[str, Array] = ...,
    ) -> tuple[Float[Array, ""], Float[Array, ""], Metrics]:
        """Return the loss's sum, the count that it is a sum over, and the metrics."""
        ...


def next_token_targets(batch: Batch) -> tuple[Array, Array]:
    """Return each place's next token and whether it counts, both ``[B*T]``.

    ``loss_mask`` marks tokens that are targets, all if it is missing; the place before predicts
    them. Where there are ``segment_ids``, both places must be of one segment, and not padding.
    """
    targets = jnp.roll(batch["tokens"], -1, axis=1)
    is_target = batch.get("loss_mask", jnp.ones(targets.shape, bool)).astype(bool)
    mask = jnp.roll(is_target, -1, axis=1).at[:, -1].set(False)
    if "segment_ids" in batch:
        segments = batch["segment_ids"]
        mask &= (segments == jnp.roll(segments, -1, axis=1)) & (segments != 0)
    return targets.reshape(-1), mask.reshape(-1)


def row_data(batch: Batch) -> dict[str, Any]:
    """Return what each place needs to know, ``[B*T, ...]``: targets, mask, weights, cache."""
    targets, mask = next_token_targets(batch)
    row: dict[str, Any] = {"targets": targets, "mask": mask}
    if "weights" in batch:
        row["weights"] = jnp.roll(batch["weights"].astype(jnp.float32), -1, axis=1).reshape(-1)
    if "teacher_logits" in batch:
        logits = batch["teacher_logits"]
        row["cached"] = logits.reshape(-1, logits.shape[-1])
    elif "teacher_indices" in batch:
        flat = [
            batch[f"teacher_{name}"].reshape(targets.shape[0], *shape)
            for name, shape in (("log_probs", (-1,)), ("indices", (-1,)), ("log_tail", ()))
        ]
        # Ids of 16 bits on disk; log-probabilities of 16 bits need not add up to 1 exactly.
        row["cached"] = TopK(
            flat[0].astype(jnp.float32), flat[1].astype(jnp.int32), flat[2].astype(jnp.float32)
        )
    return row


def head_of(out: Output, vocab_size: int | None = None) -> Head:
    """Return a model's head over the first ``vocab_size`` tokens (None: all), token-major."""
    kernel = out.head if vocab_size is None else out.head[:vocab_size]
    return Head(out.hidden.reshape(-1, out.hidden.shape[-1]), kernel, out.softcap)


def kd_objective(
    student: ApplyFn,
    teacher: ApplyFn | Sequence[ApplyFn] | None = None,
    loss: str | Loss | None = None,
    *,
    mixture: str | Term = "mean",
    token_weight: str | Term | None = None,
    correction: str | Term | None = None,
    top_k: int = 0,
    vocab_size: int | None = None,
    chunk: int = CHUNK,
    fused: bool = True,
    by_row: bool = False,
) -> Objective:
    """Build the distillation of one vocabulary: any loss, of any teacher, into any student.

    Args:
        student: the student's ``ApplyFn``, its transform (fake quantization) inside. For losses on
            hidden states or attention it must return ``(Output, states)``, see ``kd.states``; so
            must the teacher then.
        teacher: the teacher's ``ApplyFn``, or several, whose params are then a sequence too. None
            where the batch brings a cached teacher (``kd.teacher_cache``) or the loss needs none.
        loss: what to minimise, as ``losses.loss.parse_loss`` reads it; ``forward_kl`` by default,
            without a teacher ``ce``.
        mixture: how several teachers become one distribution (``kd.teachers``).
        token_weight: weighs each token by its teachers (``kd.token_weights``).
        correction: puts the teacher right by the labels (``kd.teachers``).
        top_k: see the teacher through its k likeliest tokens and a tail bucket; 0 for all of it.
        vocab_size: tokens of a padded vocabulary that exist; None for all rows of the head.
        chunk: tokens whose logits exist at once.
        fused: see ``losses.chunked``; False where the objective is differentiated twice.
        by_row: metrics are (sums, counts) ``[B]``, of each row; no objective to train by.

    Returns:
        an ``Objective`` whose metrics are ``loss``, ``nll``, and with a teacher ``kl`` (of the
        mixture, uncorrected, at temperature 1 or a cache's, in nats) and ``agreement`` (equal
        argmax). Where tokens have weights the loss is the weighted mean; metrics are not weighed.
    """
    teachers = (teacher,) if callable(teacher) else tuple(teacher or ())
    mix = parse_term(mixture, "mixture") if isinstance(mixture, str) else mixture
    if isinstance(token_weight, str):
        token_weight = parse_term(token_weight, "token_weight")
    if isinstance(correction, str):
        correction = parse_term(correction, "correction")
    given = parse_loss(loss, "divergence", "states") if isinstance(loss, str) else loss

    def guide_of(guides: tuple[Array, ...], row: dict[str, Any]) -> Array | TopK | None:
        if not guides:
            return jax.tree.map(lambda x: _masked(x, row["mask"]), row.get("cached"))
        if len(guides) == 1:
            return guides[0]
        return mix.entry.function(guides, row["targets"], **mix.given({}))

    def rows(z, guides, row, knobs, batch_size):
        mask, targets = row["mask"], row["targets"]

        def total(values, weights=None):
            values = values if weights is None else weights * values
            values = jnp.where(mask, values, jnp.zeros_like(values))
            return segment_sum(values, row["of"], batch_size) if by_row else jnp.sum(values)

        guide = guide_of(guides, row)
        goal = guide
        if correction is not None:
            if not isinstance(guide, Array):
                raise UserError("a correction by labels needs a live teacher; give one")
            goal = correction.entry.function(guide, targets, **correction.given({}))
        weights = row.get("weights")
        if token_weight is not None:
            if guide is None:
                raise UserError(f"{token_weight.entry.name} weighs by a teacher; give one")
            seen = guides or (with_tail(z, guide)[1] if isinstance(guide, TopK) else guide,)
            found = token_weight.entry.function(seen, **token_weight.given({}))
            found = lax.stop_gradient(found)
            weights = found if weights is None else weights * found
        what = given or _DEFAULTS[guide is not None]
        if what.needs_teacher and guide is None:
            raise UserError(
                "the loss compares with a teacher, and neither a teacher nor a batch with a cached "
                "one is there; give one, or use ce"
            )
        count = total(jnp.ones(mask.shape))
        sums = {
            "loss": total(what.rows(z, goal, targets, knobs, top_k=top_k), weights),
            "nll": total(ce(z, targets)),
            "count": count,
            "weight": count if weights is None else total(weights),
        }
        if guide is not None:
            at = _cached_temperature(what) if isinstance(guide, TopK) else 1.0
            pair = with_tail(z, guide, at) if isinstance(guide, TopK) else (z, guide)
            kl = forward_kl(*pair, temperature=at) / at**2
            top = guide.indices[:, 0] if isinstance(guide, TopK) else jnp.argmax(guide, -1)
            same = jnp.argmax(z, -1) == top
            sums |= {"kl": total(kl), "agreement": total(same.astype(jnp.float32))}
        return sums

    def objective(
        params: Params, teacher_params: Any, batch: Batch, knobs: Mapping[str, Array] = {}
    ):
        read = batch["embeddings"] if "embeddings" in batch else batch["tokens"]
        inputs = (read, batch.get("positions"), batch.get("segment_ids"))
        out, student_states = _split(student(params, *inputs))
        own = (teacher_params,) if callable(teacher) else tuple(teacher_params if teachers else ())
        guides = [_split(t(p, *inputs)) for t, p in zip(teachers, own, strict=True)]
        row, batch_size = row_data(batch), read.shape[0]
        if by_row:
            row["of"] = jnp.repeat(jnp.arange(batch_size), read.shape[1])
        heads = [head_of(o, vocab_size) for o in (out, *(guide for guide, _ in guides))]
        _check_vocabularies([head.kernel.shape[0] for head in heads], vocab_size)
        heads = [_without(head, row["mask"]) for head in heads]
        sums: dict[str, Any] = chunked_sums(
            functools.partial(rows, batch_size=batch_size),
            heads[0],
            heads[1:],
            row,
            dict(knobs),
            chunk=chunk,
            fused=fused,
        )
        count, weight = sums.pop("count"), sums.pop("weight")
        pairs = {name: (value, count) for name, value in sums.items()}
        for term in given.of_kind("states") if given else ():
            values = _states.values_of(term, params, student_states, guides, batch, knobs)
            mean = jnp.sum(jnp.where(row["mask"], values, 0.0)) / jnp.maximum(count, 1.0)
            sums["loss"] = sums["loss"] + term.weight * weight * mean
            pairs[term.entry.name] = (mean * count, count)
        pairs["loss"] = (sums["loss"], weight)
        return jnp.sum(sums["loss"]), jnp.sum(weight), pairs

    return objective


_DEFAULTS = {True: parse_loss("forward_kl"), False: parse_loss("ce")}


def _check_vocabularies(sizes: list[int], vocab_size: int | None) -> None:
    """Raise ``UserError`` where heads differ, or have too few rows."""
    if len(set(sizes)) > 1:
        raise UserError(
            f"the student's head has {sizes[0]} rows, its teachers' {sizes[1:]}: give the tokens "
            "that all share as vocab_size where rows are padding, else a cross-tokenizer loss"
        )
    if vocab_size is not None and sizes[0] < vocab_size:
        raise UserError(f"vocab_size={vocab_size} given, and the heads have {sizes[0]} rows")


def _without(head: Head, mask: Array) -> Head:
    """Return the head without the rows that do not count: not even infinities get out of them."""
    return head._replace(hidden=_masked(head.hidden, mask))


def _masked(x: Array, mask: Array) -> Array:
    """Zero the rows that do not count."""
    return jnp.where(jnp.expand_dims(mask, tuple(range(1, x.ndim))), x, jnp.zeros_like(x))


def _cached_temperature(loss: Loss) -> float:
    """Return the temperature that a cached teacher was softened by: that of the loss on it."""
    given = [
        term.arguments.get("temperature", 1.0)
        for term in loss.of_kind("divergence")
        if "teacher_logits" in term.entry.inputs
    ]
    return next((value for value in given if isinstance(value, float)), 1.0)


def _split(out: Any) -> tuple[Output, Any]:
    """Return a model's output and its states, None where it gives none."""
    return (out, None) if isinstance(out, Output) else out
