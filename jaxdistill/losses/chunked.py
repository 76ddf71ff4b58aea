"""Sums over tokens of a function of their logits, without ever holding all the logits.

Hidden states and heads go in; logits of one chunk of tokens exist at a time, those of every teacher
included. ``fused`` computes loss, ``dL/dhidden`` and ``dL/dhead`` in the same pass over the chunks,
so that the logits are made once; the other form recomputes them in the backward pass and may be
differentiated any number of times and by all inputs, which data set distillation needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxdistill.mesh import DATA, ROWS, VOCABULARY, axis_size, constrain

# (student logits [n, V], each teacher's logits [n, V], rows' data, shared data) -> sums, one of
# them "loss"
RowsFn = Callable[[Array, tuple[Array, ...], Any, Any], dict[str, Array]]

# Tokens whose logits exist at once, where nobody says otherwise. Each chunk adds to the gradient of
# the whole table, so smaller ones take longer (benchmarks/results/chunked_head_alone.md).
CHUNK = 512


class Head(NamedTuple):
    """Hold what logits are made of: ``hidden @ kernel.T``, where asked for capped softly.

    Attributes:
        hidden: final hidden states, token-major.
        kernel: rows of a padded vocabulary must be cut off beforehand, for they would take part.
        softcap: logits become ``softcap * tanh(z / softcap)`` (Gemma 2, arXiv 2408.00118).
    """

    hidden: Float[Array, "N D"]
    kernel: Float[Array, "V D"]
    softcap: Any = None

    def logits(self) -> Float[Array, "N V"]:
        """Return the float32 logits; on a mesh, each device's own part of the vocabulary."""
        hidden = constrain(self.hidden, DATA)
        z = jnp.einsum("nd,vd->nv", hidden, self.kernel, preferred_element_type=jnp.float32)
        z = constrain(z, DATA, VOCABULARY)
        return capped(z, self.softcap)


def capped(z: Float[Array, "N V"], softcap: Any) -> Float[Array, "N V"]:
    """Return logits within ``-softcap..softcap``; as they are without one."""
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def pad_and_split(x: Array, chunk: int) -> Array:
    """Return rows ``[N, ...]`` as chunks ``[n, chunk, ...]``, the last one filled with zeros.

    On a mesh every chunk takes as many rows from each part that the rows are divided into, so that
    all devices work on every chunk; the chunk is rounded up to a multiple of their number.
    """
    shards = axis_size(ROWS)
    shards = shards if x.shape[0] % shards == 0 else 1
    own, each = x.shape[0] // shards, -(-chunk // shards)
    parts = x.reshape(shards, own, *x.shape[1:])
    parts = jnp.pad(parts, [(0, 0), (0, -own % each)] + [(0, 0)] * (x.ndim - 1))
    parts = parts.reshape(shards, -1, each, *x.shape[1:]).swapaxes(0, 1)
    return parts.reshape(-1, shards * each, *x.shape[1:])


def join_chunks(x: Array, rows: int) -> Array:
    """Undo ``pad_and_split`` of that many rows: ``[n, chunk, ...]`` to ``[N, ...]``."""
    shards = axis_size(ROWS)
    shards = shards if rows % shards == 0 else 1
    parts = x.reshape(x.shape[0], shards, -1, *x.shape[2:]).swapaxes(0, 1)
    parts = parts.reshape(shards, -1, *x.shape[2:])[:, : rows // shards]
    return parts.reshape(rows, *x.shape[2:])


def chunked_sums(
    rows_fn: RowsFn,
    student: Head,
    teachers: Sequence[Head],
    rows: Any,
    shared: Any = None,
    *,
    chunk: int = CHUNK,
    fused: bool = True,
) -> dict[str, Float[Array, "..."]]:
    """Return ``rows_fn``'s sums over all tokens, chunk by chunk.

    Args:
        rows_fn: maps one chunk of logits to a dict of sums over its rows; only ``"loss"``, a scalar
            then, is differentiated, by the student's hidden states and kernel, the rest are
            metrics. The teachers get no gradient.
        student: the student's head.
        teachers: any number of them, none included.
        rows: any tree of arrays ``[N, ...]``: targets, weights. The last chunk is filled up with
            zeros, so a mask must be among them and say False where its entry is 0.
        shared: any tree of arrays that every chunk sees whole.
        chunk: tokens whose logits exist at once; the memory is about ``4 * chunk * V * 4`` bytes.
        fused: make the gradients in the forward pass (first order, by ``student`` only).

    Returns:
        the sums, float32, of the shapes that ``rows_fn`` gives.
    """
    chunk = min(chunk, student.hidden.shape[0])
    split = functools.partial(pad_and_split, chunk=chunk)
    fixed = (tuple((t.kernel, t.softcap) for t in teachers), student.softcap, shared)
    data = (tuple(split(t.hidden) for t in teachers), jax.tree.map(split, rows))

    def of_logits(z: Array, fixed: tuple, chunk_data: tuple) -> dict[str, Array]:
        heads, softcap, shared = fixed
        hidden, row = chunk_data
        guides = tuple(
            lax.stop_gradient(Head(x, *head).logits())
            for x, head in zip(hidden, heads, strict=True)
        )
        return rows_fn(capped(z, softcap), guides, row, shared)

    def one(h: Array, kernel: Array, fixed: tuple, chunk_data: tuple) -> dict[str, Array]:
        return of_logits(Head(h, kernel).logits(), fixed, chunk_data)

    def forward(h_chunks: Array, kernel: Array, fixed: tuple, data: tuple):
        def body(sums, x):
            return jax.tree.map(jnp.add, sums, one(x[0], kernel, fixed, x[1])), None

        shapes = jax.eval_shape(
            lambda x: one(x[0], kernel, fixed, x[1]),
            jax.tree.map(lambda a: a[0], (h_chunks, data)),
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return lax.scan(jax.checkpoint(body), zeros, (h_chunks, data))[0]

    if not fused:
        return forward(split(student.hidden), student.kernel, fixed, data)

    @jax.custom_vjp
    def sums(h_chunks, kernel, fixed, data):
        return forward(h_chunks, kernel, fixed, data)

    def sums_fwd(h_chunks, kernel, fixed, data):
        def body(d_kernel_DV, x):
            h, chunk_data = x

            def loss(z):
                out = of_logits(z, fixed, chunk_data)
                return out["loss"], out

            z = Head(h, kernel).logits()
            d_z, out = jax.grad(loss, has_aux=True)(z)
            d_z = constrain(d_z.astype(kernel.dtype), DATA, VOCABULARY)
            d_h = jnp.einsum("nv,vd->nd", d_z, kernel, preferred_element_type=jnp.float32)
            # XLA for CPUs is half as fast by an operand that does not lie transposed in memory.
            h_DN = lax.optimization_barrier(h.T)
            d_e = jnp.einsum("dn,nv->dv", h_DN, d_z, preferred_element_type=jnp.float32)
            return d_kernel_DV + d_e, (out, d_h.astype(h.dtype))

        start = jnp.zeros(kernel.shape[::-1], jnp.float32)
        d_kernel_DV, (out, d_h) = lax.scan(body, start, (h_chunks, data))
        d_kernel = d_kernel_DV.T
        sums = jax.tree.map(lambda s: jnp.sum(s, axis=0), out)
        return sums, (d_h, d_kernel.astype(kernel.dtype))

    def sums_bwd(saved, cotangent):
        d_h, d_kernel = saved
        ct = cotangent["loss"]
        return d_h * ct.astype(d_h.dtype), d_kernel * ct.astype(d_kernel.dtype), None, None

    sums.defvjp(sums_fwd, sums_bwd)
    return sums(split(student.hidden), student.kernel, fixed, data)
