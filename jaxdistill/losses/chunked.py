"""Sums over tokens of a function of their logits, without ever holding all the logits.

Hidden states and heads go in; logits of one chunk of tokens exist at a time, the teacher's
included. ``fused`` computes loss, ``dL/dhidden`` and ``dL/dhead`` in the same pass over the chunks,
so that the logits are made once; the other form recomputes them in the backward pass and may be
differentiated any number of times, which data set distillation needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# (student logits [n, V], teacher logits [n, V] or None, targets [n], mask [n]) -> sums, one of them
# "loss"
RowsFn = Callable[[Array, Array | None, Array, Array], dict[str, Array]]


def _logits(hidden: Array, head: Array) -> Array:
    return jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)


def _pad_and_split(x: Array, chunk: int) -> Array:
    """Split rows into chunks, the last one filled with zeros (their mask is False)."""
    extra = -x.shape[0] % chunk
    padded = jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(-1, chunk, *x.shape[1:])


def chunked_sums(
    rows_fn: RowsFn,
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    teacher_hidden: Float[Array, "N E"] | None,
    teacher_head: Float[Array, "V E"] | None,
    targets: Int[Array, "N"],
    mask: Bool[Array, "N"],
    *,
    chunk: int = 256,
    fused: bool = True,
) -> dict[str, Float[Array, ""]]:
    """Return ``rows_fn``'s sums over all tokens, chunk by chunk.

    Args:
        rows_fn: maps one chunk of logits to a dict of scalar sums over its unmasked rows; only
            ``"loss"`` is differentiated, by ``hidden`` and ``head``, the rest are metrics. The
            teacher gets no gradient.
        hidden: the student's final hidden states, token-major.
        head: the student's head; logits are ``hidden @ head.T``.
        teacher_hidden: the teacher's hidden states, or None where ``rows_fn`` needs no teacher.
        teacher_head: the teacher's head, or None.
        targets: token ids, each row's next token.
        mask: rows that count.
        chunk: tokens whose logits exist at once; the memory is about ``4 * chunk * V * 4`` bytes.
        fused: make the gradients in the forward pass (first order only).

    Returns:
        float32 scalars.
    """
    chunk = min(chunk, hidden.shape[0])
    split = functools.partial(_pad_and_split, chunk=chunk)
    data = (None if teacher_hidden is None else split(teacher_hidden), split(targets), split(mask))

    def one(h: Array, head: Array, teacher_head: Array | None, rest: tuple) -> dict[str, Array]:
        h_teacher, target, keep = rest
        z_teacher = None
        if h_teacher is not None:
            assert teacher_head is not None
            z_teacher = lax.stop_gradient(_logits(h_teacher, teacher_head))
        return rows_fn(_logits(h, head), z_teacher, target, keep)

    def forward(h_chunks: Array, head: Array, teacher_head: Array | None, data: tuple):
        def body(sums, x):
            new = one(x[0], head, teacher_head, x[1])
            return jax.tree.map(jnp.add, sums, new), None

        shapes = jax.eval_shape(
            lambda x: one(x[0], head, teacher_head, x[1]),
            jax.tree.map(lambda a: a[0], (h_chunks, data)),
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return lax.scan(jax.checkpoint(body), zeros, (h_chunks, data))[0]

    if not fused:
        return forward(split(hidden), head, teacher_head, data)

    @jax.custom_vjp
    def sums(h_chunks, head, teacher_head, data):
        return forward(h_chunks, head, teacher_head, data)

    def sums_fwd(h_chunks, head, teacher_head, data):
        def body(d_head, x):
            def loss(h, e):
                out = one(h, e, teacher_head, x[1])
                return out["loss"], out

            (_, out), (d_h, d_e) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
                x[0], head
            )
            return d_head + d_e.astype(jnp.float32), (out, d_h)

        start = jnp.zeros(head.shape, jnp.float32)
        d_head, (out, d_h) = lax.scan(body, start, (h_chunks, data))
        return jax.tree.map(lambda s: jnp.sum(s, axis=0), out), (d_h, d_head.astype(head.dtype))

    def sums_bwd(saved, cotangent):
        d_h, d_head = saved
        ct = cotangent["loss"]
        return d_h * ct.astype(d_h.dtype), d_head * ct.astype(d_head.dtype), None, None

    sums.defvjp(sums_fwd, sums_bwd)
    return sums(split(hidden), head, teacher_head, data)
