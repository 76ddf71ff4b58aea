"""Transfer of hidden states and attention between layers of student and teacher.

The models run with ``tap=states_tap(...)`` and so return ``(Output, states)``; each function here
gives one value for every token, which the objective masks and sums as it does a divergence's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxdistill.errors import UserError
from jaxdistill.losses.divergences import kl
from jaxdistill.losses.loss import Loss, Term
from jaxdistill.losses.registry import register
from jaxdistill.models.attention import attention_mask
from jaxdistill.models.decoder import Params, Seen

_MIXED = ("queries", "keys", "values")
_NEEDED = {"hidden": ("hidden",), "attention": ("queries", "keys"), "relations": _MIXED}
States = Mapping[str, Array]


def states_tap(*names: str) -> Callable[[Seen, Any], dict[str, Array]]:
    """Return a ``tap`` for ``make_apply`` that keeps these states of every layer.

    Args:
        names: ``hidden``, the layer's output ``[B*T, D]``; ``queries``, ``keys`` and ``values``
            ``[B, T, heads, H]``, rotated. ``apply`` returns them stacked, ``[L, ...]``.
    """

    def tap(seen: Seen, extra: Any) -> dict[str, Array]:
        found = {"hidden": seen["layers"][1]}
        found |= dict(zip(_MIXED, seen["layers/self_attn/mix"], strict=True))
        return {name: found[name] for name in names}

    return tap


def tap_of(loss: Loss) -> Callable[[Seen, Any], dict[str, Array]] | None:
    """Return the tap that a loss's terms on states need, None where it has none."""
    names = [name for term in loss.of_kind("states") for name in _NEEDED[term.entry.name]]
    return states_tap(*dict.fromkeys(names)) if names else None


def layer_map(student_layers: int, teacher_layers: int, layers: str) -> list[tuple[int, int]]:
    """Return (student layer, teacher layer) pairs.

    ``uniform`` spreads the student's layers over the teacher's, the last onto the last; ``last``
    pairs the last ones alone.
    """
    last = (student_layers - 1, teacher_layers - 1)
    if layers == "last":
        return [last]
    if layers != "uniform":
        raise UserError(f"layers={layers} given; accepted: uniform, last")
    ratio = teacher_layers / student_layers
    return [(i, max(0, round((i + 1) * ratio) - 1)) for i in range(student_layers)]


def _pairs(student: Array, teacher: Array, layers: str) -> tuple[Array, Array]:
    """Return the mapped layers of both, stacked on axis 0."""
    pairs = np.array(layer_map(student.shape[0], teacher.shape[0], layers))
    return student[pairs[:, 0]], teacher[pairs[:, 1]]


def init_projections(
    loss: Loss, student_width: int, teacher_width: int, student_layers: int, rng: Array
) -> Params:
    """Return the projections that a loss learns beside the student; empty where it has none.

    They go into the student's params as ``params["projections"]``: ``{"hidden": {"kernel": [M, D,
    E]}}``, one for each mapped student layer, the identity where both widths are equal.
    """
    terms = [term for term in loss.of_kind("states") if term.entry.name == "hidden"]
    if not terms:
        return {}
    number = 1 if terms[0].arguments.get("layers") == "last" else student_layers
    if student_width == teacher_width:
        one = jnp.eye(student_width, dtype=jnp.float32)
    else:
        one = jax.random.normal(rng, (student_width, teacher_width)) * student_width**-0.5
    return {"hidden": {"kernel": jnp.tile(one[None], (number, 1, 1))}}


@register(
    "states",
    formula="mean over layer pairs of |W h_s - h_t|^2 / |h_t|^2",
    source="Romero et al. 2015 (FitNets), arXiv 1412.6550; Jiao et al. 2020 (TinyBERT)",
    when="a student cut from its teacher, early in training; its layers know where to go",
    cost="both models' hidden states of every mapped layer, and a product a pair",
)
def hidden(
    student_states: States,
    teacher_states: States,
    projections: Params,
    mask: Bool[Array, "B T T"],
    *,
    layers: str = "uniform",
) -> Float[Array, "N"]:
    """Return the relative squared error of projected hidden states, for each token.

    Where the teacher's state is 0, as some models' padding is, the error is not relative.
    """
    h, g = _pairs(student_states["hidden"], teacher_states["hidden"], layers)
    h, g = h.astype(jnp.float32), jax.lax.stop_gradient(g.astype(jnp.float32))
    kernel = projections["hidden"]["kernel"]
    error = jnp.einsum("lnd,lde->lne", h, kernel) - g
    size = jnp.sum(g * g, axis=-1)
    size = jnp.where(size > 0, size, jnp.ones_like(size))
    return jnp.mean(jnp.sum(error * error, axis=-1) / size, axis=0)


def _log_map(a: Array, b: Array, mask: Bool[Array, "B T T"]) -> Array:
    """Return ``log softmax(a b^T / sqrt(H))`` under the mask, ``[M, B, heads, T, T]``."""
    scores = jnp.einsum("mbtnh,mbsnh->mbnts", a, b, preferred_element_type=jnp.float32)
    keep = jnp.broadcast_to(mask[None, :, None], scores.shape)
    return jax.nn.log_softmax(jnp.where(keep, scores * a.shape[-1] ** -0.5, -1e30), axis=-1)


def _heads(x: Array, heads: int) -> Array:
    """Return the states cut into another number of heads, ``[M, B, T, heads, width / heads]``."""
    width = x.shape[3] * x.shape[4]
    if width % heads:
        raise UserError(
            f"relations:heads={heads} does not divide the {width} entries of a token's queries, "
            "keys or values; give a number that divides them in both models"
        )
    return x.reshape(*x.shape[:3], heads, -1)


@register(
    "states",
    formula="mean over layer pairs and heads of KL(A_t || A_s), A a token's attention",
    source="Zagoruyko and Komodakis 2017; Wang et al. 2020 (MiniLM), arXiv 2002.10957",
    when="student and teacher share their heads, as after a cut of layers",
    cost="both attention maps of every mapped layer, T^2 a head",
)
def attention(
    student_states: States,
    teacher_states: States,
    projections: Params,
    mask: Bool[Array, "B T T"],
    *,
    layers: str = "last",
) -> Float[Array, "N"]:
    """Return the divergence of attention maps, of their means over heads where numbers differ.

    The maps are of causal attention inside a segment; a model's sliding window is not seen.
    """

    def maps(states: States, of: int) -> Array:
        q = _pairs(student_states["queries"], teacher_states["queries"], layers)[of]
        k = _pairs(student_states["keys"], teacher_states["keys"], layers)[of]
        k = jnp.repeat(k, q.shape[3] // k.shape[3], axis=3)
        return _log_map(q, k, mask)

    student, teacher = maps(student_states, 0), jax.lax.stop_gradient(maps(teacher_states, 1))
    if student.shape[2] != teacher.shape[2]:
        student, teacher = (
            jax.nn.logsumexp(x, axis=2, keepdims=True) - jnp.log(x.shape[2])
            for x in (student, teacher)
        )
    return _divergence(teacher, student)


def _divergence(log_p: Array, log_q: Array) -> Float[Array, "N"]:
    """Return KL over the last axis, its mean over layers and heads, for each token."""
    rows = kl(log_p.reshape(-1, log_p.shape[-1]), log_q.reshape(-1, log_q.shape[-1]))
    return jnp.mean(rows.reshape(log_p.shape[:-1]), axis=(0, 2)).reshape(-1)


@register(
    "states",
    formula="mean over q, k, v and relation heads of KL of softmax(x x^T / sqrt(H))",
    source="Wang et al. 2021 (MiniLMv2), arXiv 2012.15828",
    when="student and teacher differ in width or heads: only relations of tokens are compared",
    cost="three maps of both models, T^2 a relation head",
)
def relations(
    student_states: States,
    teacher_states: States,
    projections: Params,
    mask: Bool[Array, "B T T"],
    *,
    heads: float | int = 1,
    layers: str = "last",
) -> Float[Array, "N"]:
    """Return the divergence of query, key and value relations between tokens."""
    number, total = int(heads), None
    for name in _MIXED:
        pair = _pairs(student_states[name], teacher_states[name], layers)
        student, teacher = (_log_map(_heads(x, number), _heads(x, number), mask) for x in pair)
        found = _divergence(jax.lax.stop_gradient(teacher), student)
        total = found if total is None else total + found
    assert total is not None
    return total / len(_MIXED)


def values_of(
    term: Term,
    params: Params,
    student_states: States | None,
    guides: list[tuple[Any, States | None]],
    batch: Mapping[str, Array],
    knobs: Mapping[str, Array],
) -> Float[Array, "N"]:
    """Return a term's value for every token; several teachers: the first one's states.

    Raises:
        UserError: a model was built without the tap, or the params lack the projections.
    """
    teacher_states = guides[0][1] if guides else None
    if student_states is None or teacher_states is None:
        raise UserError(
            f"{term.entry.name} compares states inside the models; give a live teacher, and build "
            "both models with make_apply(..., tap=tap_of(loss))"
        )
    projections = params.get("projections", {})
    if term.entry.name == "hidden" and "hidden" not in projections:
        raise UserError("hidden needs params['projections']; see kd.states.init_projections")
    positions = batch.get("positions")
    if positions is None:
        places = jnp.arange(batch["tokens"].shape[1], dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(places, batch["tokens"].shape)
    segments = batch.get("segment_ids")
    mask = attention_mask(positions, positions, segments, segments, None)
    return term.entry.function(
        student_states, teacher_states, projections, mask, **term.given(knobs)
    )
