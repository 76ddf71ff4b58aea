"""Products by 4-bit weights on NVIDIA GPUs, which are unpacked in registers (Pallas, Triton)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

MOST_ROWS = 16  # the least rows of a tensor core's product; more are left to XLA
_LEAST, _CHUNK, _OUTPUTS = 16, 128, 64  # inputs at once, least and most; packed rows of a program


def fits(x: Float[Array, "N I"], q: Any, scale: Float[Array, "O G"]) -> bool:
    """Return whether ``packed_matmul`` takes operands of these shapes."""
    packed = q.dtype == jnp.uint8 and x.shape[0] <= MOST_ROWS
    chunk, outputs = _sizes(q.shape, scale.shape)
    return packed and chunk >= _LEAST and outputs >= _LEAST


def _sizes(packed: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, int]:
    """Return the inputs and packed rows that are taken at once: powers of two, within a group."""
    group = packed[1] // grid[1]
    return min(group & -group, _CHUNK), min(packed[0] & -packed[0], _OUTPUTS)


def packed_matmul(
    x: Float[Array, "N I"],
    q: UInt8[Array, "R I"],
    scale: Float[Array, "O G"],
    zero: Float[Array, "O G"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "N O"]:
    """Return ``x @ w.T`` in float32, of weights that are read from memory as 4 bits.

    Each program takes some packed rows, so two runs of outputs, and walks along the inputs. The
    lattice's values are rounded to the type of ``x``, as where they are made before the product.

    Args:
        x: at most ``MOST_ROWS`` rows, float32 or bfloat16.
        q: see ``quant.held.Held``; R is half of O.
        scale: one a group of inputs.
        zero: the like, of an asymmetric lattice.
        interpret: run it on a CPU, slowly.
    """
    # Here, since it takes a third of a second that nobody else should wait for.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, inputs = q.shape
    chunk, outputs = _sizes(q.shape, scale.shape)
    group = inputs // scale.shape[1]
    grids = [g.reshape(2, rows, -1) for g in (scale, zero) if g is not None]
    N = x.shape[0]
    x = jnp.pad(x, ((0, MOST_ROWS - N), (0, 0)))

    def kernel(x_ref: Any, q_ref: Any, *refs: Any) -> None:
        *grid_refs, y_ref = refs

        def step(i: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            along = pl.ds(i * chunk, chunk)
            some, both = x_ref[:, along], q_ref[:, along].astype(jnp.int32)
            made = []
            for half, whole in enumerate((both & 15, both >> 4)):
                scale, *zero = (g[half, :, i * chunk // group][:, None] for g in grid_refs)
                offset = zero[0] if zero else 8.0
                w = ((whole.astype(jnp.float32) - offset) * scale).astype(some.dtype)
                made.append(sums[half] + triton.dot(some, w, trans_b=True, allow_tf32=False))
            return made[0], made[1]

        empty = jnp.zeros((MOST_ROWS, outputs), jnp.float32)
        low, high = jax.lax.fori_loop(0, inputs // chunk, step, (empty, empty))
        y_ref[:, 0, :], y_ref[:, 1, :] = low, high

    of_grid = pl.BlockSpec((2, outputs, grids[0].shape[2]), lambda i: (0, i, 0))
    call = pl.pallas_call(
        kernel,
        grid=(rows // outputs,),
        in_specs=[
            pl.BlockSpec(x.shape, lambda i: (0, 0)),
            pl.BlockSpec((outputs, inputs), lambda i: (i, 0)),
            *[of_grid] * len(grids),
        ],
        out_specs=pl.BlockSpec((MOST_ROWS, 2, outputs), lambda i: (0, 0, i)),
        out_shape=jax.ShapeDtypeStruct((MOST_ROWS, 2, rows), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="packed_matmul",
    )
    return call(x, q, *grids).reshape(MOST_ROWS, -1)[:N]
