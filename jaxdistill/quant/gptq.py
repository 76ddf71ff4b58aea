"""GPTQ: round one kernel so that its outputs, not its weights, move least (arXiv 2210.17323).

The inputs of a kernel are rounded one after the other. The error that rounding an input's weights
makes in the outputs is then taken up by the inputs not yet rounded, as far as those can: what they
must change by follows from the Gram matrix of the layer's inputs alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from jaxdistill.errors import UserError
from jaxdistill.quant.lattice import Grid, QuantSpec, fixed_grid, spread

# Inputs that are rounded before the rest of the kernel hears of their errors, in one product. The
# result does not depend on it.
_BLOCK = 64


def gptq(
    w: Float[Array, "I O"],
    gram: Float[Array, "I I"],
    grid: Grid,
    spec: QuantSpec,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    name: str = "weight",
) -> Float[Array, "I O"]:
    """Return ``w`` moved onto its lattice, lessening ``sum |X (w_hat - w)|^2``.

    With ``H = X^T X + damping * mean(diag(X^T X)) I`` and ``U`` the upper Cholesky factor of
    ``H^-1``, input i is rounded to ``w_hat_i`` and every later input j takes
    ``w_j -= U_ij (w_i - w_hat_i) / U_ii``. An input that was always zero gets weights of zero.

    Args:
        w: float32 kernel.
        gram: ``X^T X`` of the inputs ``X [N, I]``, in float32; a factor on it changes nothing.
        grid: the ranges, chosen beforehand and left as they are; see ``quant.lattice``.
        spec: gives the integer range.
        damping: share of the mean diagonal that is added to the diagonal.
        act_order: round the inputs in the order of falling ``gram`` diagonal, not as they come.
            Groups stay what they are, and so does storage.
        name: the kernel's path, for errors.

    Returns:
        float32 lattice values: ``quantize`` gives exactly their integers.

    Raises:
        UserError: the Gram matrix is not finite, or cannot be factored at this damping.
    """
    check_gram(gram, name)
    found = _round(w, gram, grid, spec, damping, act_order)
    if not bool(jnp.isfinite(found).all()):
        raise UserError(
            f"the Gram matrix of {name} cannot be factored at damping {damping}; accepted: a "
            "positive one; give a larger one, such as 0.1, or more calibration text"
        )
    return found


def check_gram(gram: Float[Array, "I I"], name: str) -> None:
    """Raise ``UserError`` where the inputs of ``name`` left a Gram matrix that is not finite."""
    if not bool(jnp.isfinite(gram).all()):
        raise UserError(
            f"the calibration inputs of {name} are NaN, infinite or too large; give a sound "
            "checkpoint, or calibrate in float32"
        )


@functools.partial(jax.jit, static_argnames=("spec", "act_order"))
def _round(
    w: Array,
    gram: Array,
    grid: Grid,
    spec: QuantSpec,
    damping: float | Array,
    act_order: bool,
) -> Array:
    """Compute ``gptq``; NaN where the factorisation fails."""
    w = w.astype(jnp.float32)
    s, *zero = (spread(part, w.shape, -2) for part in fixed_grid(grid, spec))
    z = zero[0] if zero else jnp.zeros_like(s)
    diagonal = jnp.diagonal(gram)
    w = jnp.where(jnp.expand_dims(diagonal == 0, 1), jnp.zeros_like(w), w)
    order = jnp.argsort(-diagonal) if act_order else jnp.arange(w.shape[0])
    w, s, z = w[order], s[order], z[order]
    factor = _inverse_factor(gram.astype(jnp.float32)[order][:, order], damping)

    # Fill up the last block with inputs that have nothing to do with the others.
    inputs, size = w.shape[0], min(_BLOCK, w.shape[0])
    more = -inputs % size
    w, z = (jnp.pad(x, ((0, more), (0, 0))) for x in (w, z))
    s = jnp.pad(s, ((0, more), (0, 0)), constant_values=1)
    factor = jnp.pad(factor, ((0, more), (0, more)))
    factor = factor + jnp.diag((jnp.arange(inputs + more) >= inputs).astype(jnp.float32))

    def block(b: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        w, found = state
        at = b * size
        rows, s_b, z_b, factor_b = (
            lax.dynamic_slice_in_dim(x, at, size) for x in (w, s, z, factor)
        )
        within = lax.dynamic_slice_in_dim(factor_b, at, size, axis=1)

        def one(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            rows, values, errors = state
            q = jnp.clip(jnp.round(rows[i] / s_b[i]) + z_b[i], spec.qmin, spec.qmax)
            value = (q - z_b[i]) * s_b[i]
            error = (rows[i] - value) / within[i, i]
            rows = rows - jnp.expand_dims(within[i], 1) * jnp.expand_dims(error, 0)
            return rows, values.at[i].set(value), errors.at[i].set(error)

        empty = jnp.zeros_like(rows)
        _, values, errors = lax.fori_loop(0, size, one, (rows, empty, empty))
        # The factor is upper triangular: inputs rounded in earlier blocks are not touched.
        w = w - jnp.dot(factor_b.T, errors, precision=lax.Precision.HIGHEST)
        return w, lax.dynamic_update_slice_in_dim(found, values, at, axis=0)

    found = lax.fori_loop(0, (inputs + more) // size, block, (w, jnp.zeros_like(w)))[1]
    return jnp.zeros((inputs, w.shape[1])).at[order].set(found[:inputs])


def _inverse_factor(gram: Array, damping: float | Array) -> Array:
    """Return upper triangular U with ``U^T U = H^-1``, H the damped Gram matrix.

    Factored from the last input to the first, ``H = R R^T`` with R upper triangular, and so
    ``U = R^-1``: one factorisation, and no inverse of H that would have to be positive definite.
    """
    diagonal = jnp.diagonal(gram)
    alive = diagonal != 0
    mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(alive), 1).astype(jnp.float32)
    mean = jnp.where(mean > 0, mean, jnp.ones_like(mean))
    damped = gram + jnp.diag(jnp.where(alive, jnp.zeros_like(diagonal), mean) + damping * mean)
    r = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(r, jnp.eye(len(gram)), lower=False)
