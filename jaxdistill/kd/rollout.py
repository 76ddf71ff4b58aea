"""On-policy text: the student's own answers in place of the data's (GKD, arXiv 2306.13649).

Distilling on text that the student wrote trains it where it will be, and the teacher shows it the
way out of its own mistakes. No gradient passes through the sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxdistill.errors import UserError
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.decoder import Params, Transform
from jaxdistill.models.generate import Sampling, sample

Batch = dict[str, Array]
_FIELDS = ("tokens", "loss_mask", "segment_ids", "positions", "weights")


def own_answers(
    apply: Callable[..., Any],
    config: ModelConfig,
    params: Params,
    batch: Mapping[str, Array],
    rng: Array,
    *,
    prompt_length: int,
    how: Sampling,
    stop: tuple[int, ...],
    dtype: DTypeLike = jnp.float32,
) -> tuple[Batch, Float[Array, "B T"]]:
    """Replace the answers of a batch by samples; a pure function, to be called inside jit.

    A row is one example: a prompt, then an answer. The prompt ends where the first target begins;
    of a longer one the last ``prompt_length`` tokens are kept. The answer is as long as the row has
    room for, ``how.max_new_tokens`` at most, and its stop token is a target like any other. A row
    without targets (padding) stays as it is.

    Args:
        apply: what ``make_apply`` builds, without a ``tap``.
        config: the shape of the model that writes.
        params: its params, ready to use.
        batch: ``tokens`` and ``loss_mask`` ``[B, T]``, with or without ``segment_ids``,
            ``positions`` and ``weights``.
        rng: of the sampling.
        prompt_length: columns that prompts are aligned in, below T.
        how: temperature 1 with all tokens is what on-policy losses assume.
        stop: ids that end an answer.
        dtype: of ``apply``'s activations.

    Returns:
        the batch of the same fields, shapes and types, the weight of a row's answer kept; and the
        log-probability of each sampled token under the distribution that it was drawn from,
        ``[B, T]``, 0 elsewhere.

    Raises:
        UserError: there is no room for an answer, or the batch has other fields, which would tell
            of the text that was replaced.
    """
    tokens, targets = batch["tokens"], batch["loss_mask"].astype(bool)
    B, T = tokens.shape
    new = min(how.max_new_tokens, T - 1)
    _check(batch, config, prompt_length, new)
    end = jnp.argmax(targets, axis=1)  # where the prompt ends
    length = jnp.minimum(end, prompt_length)

    column = jnp.broadcast_to(jnp.arange(prompt_length)[None], (B, prompt_length))
    valid = column >= prompt_length - length[:, None]
    source = jnp.where(valid, column + (end - prompt_length)[:, None], 0)
    prompts = jnp.where(valid, jnp.take_along_axis(tokens, source, axis=1), 0)
    samples = sample(
        apply,
        config,
        params,
        prompts.astype(jnp.int32),
        valid.astype(jnp.int32),
        rng,
        how=Sampling(
            max_new_tokens=new, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p
        ),
        stop=stop,
        dtype=dtype,
    )

    place = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    inside = place < length[:, None]
    filled = place < (length + samples.lengths)[:, None]
    drawn = filled & ~inside
    old = jnp.clip(place + (end - length)[:, None], 0, T - 1)
    at = jnp.clip(place - length[:, None], 0, new - 1)
    made = jnp.take_along_axis(samples.tokens, at, axis=1).astype(tokens.dtype)
    text = jnp.where(inside, jnp.take_along_axis(tokens, old, axis=1), made)
    found = {
        "tokens": jnp.where(filled, text, 0),
        "loss_mask": drawn,
        "segment_ids": filled,
        "positions": jnp.where(filled, place, 0),
    }
    if "weights" in batch:  # the answer's weight passes on to what is written in its place
        found["weights"] = jnp.broadcast_to(
            jnp.take_along_axis(batch["weights"], end[:, None], axis=1), (B, T)
        )
    real = jnp.broadcast_to(jnp.any(targets, axis=1)[:, None], (B, T))
    changed = {k: jnp.where(real, found[k].astype(x.dtype), x) for k, x in batch.items()}
    log_probs = jnp.take_along_axis(samples.log_probs, at, axis=1)
    return changed, jnp.where(real & drawn, log_probs, 0.0)


def _check(batch: Mapping[str, Array], config: ModelConfig, prompt_length: int, new: int) -> None:
    other = [name for name in batch if name not in _FIELDS]
    if other:
        raise UserError(
            f"a batch with {other[0]} given, which tells of text that sampling replaces; accepted: "
            f"{', '.join(_FIELDS)}; use a live teacher"
        )
    T = batch["tokens"].shape[1]
    if not 1 <= prompt_length < T:
        raise UserError(
            f"prompt_length {prompt_length} for rows of {T} tokens given; accepted: 1 to {T - 1}, "
            "so that an answer has room"
        )
    if prompt_length + new > config.max_position_embeddings:
        raise UserError(
            f"prompts of {prompt_length} tokens and {new} new ones exceed the model's "
            f"{config.max_position_embeddings} positions; shorten one of them"
        )


def make_rollout(
    apply: Callable[..., Any],
    config: ModelConfig,
    *,
    prompt_length: int,
    how: Sampling,
    stop: Sequence[int],
    share: float | int,
    seed: int = 0,
    prepare: Transform | None = None,
    dtype: DTypeLike = jnp.float32,
    log_probs: bool = False,
) -> Callable[[Params, Batch, Int[Array, ""]], Batch]:
    """Build the ``rollout`` of ``kd.step.make_step``: on some steps the student writes the text.

    Args:
        apply: the student as it samples: ``make_apply(config)``, without what ``prepare`` does.
        config: the student's shape.
        prompt_length: see ``own_answers``.
        how: see ``own_answers``.
        stop: ids that end an answer.
        share: probability that a step trains on the student's own text (GKD's lambda). One draw a
            step, from seed and step alone; nothing is sampled on the other steps.
        seed: of the draws and of the sampling; a step that is run again samples the same.
        prepare: turns params into those that sample, once a step: fake quantization of the whole
            tree, a LoRA merge. A ``transform`` in ``apply`` would run for every token.
        dtype: of ``apply``'s activations.
        log_probs: add ``behaviour_log_probs [B, T]`` to the batch, each sampled token's log-
            probability when it was drawn, for importance ratios where samples are used again.

    Returns:
        ``rollout(params, batch, step) -> batch``, of the same shapes; no gradient passes.

    Raises:
        UserError: the share is no probability; and see ``own_answers``.
    """
    if not 0 <= share <= 1:
        raise UserError(f"a share of {share} on-policy steps given; accepted: 0 to 1")

    def rollout(params: Params, batch: Batch, step: Int[Array, ""]) -> Batch:
        params, batch = jax.lax.stop_gradient((params, batch))
        coin, rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))

        def written() -> Batch:
            changed, found = own_answers(
                apply,
                config,
                prepare(params) if prepare else params,
                batch,
                rng,
                prompt_length=prompt_length,
                how=how,
                stop=tuple(stop),
                dtype=dtype,
            )
            return changed | ({"behaviour_log_probs": found} if log_probs else {})

        def given() -> Batch:
            zeros = jnp.zeros(batch["tokens"].shape)
            return batch | ({"behaviour_log_probs": zeros} if log_probs else {})

        if share in (0, 1):
            return written() if share else given()
        own: Bool[Array, ""] = jax.random.uniform(coin) < share
        return jax.lax.cond(own, written, given)

    return rollout
