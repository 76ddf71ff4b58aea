"""Scans whose backward pass holds few of the states between steps: nested checkpoints.

Reverse mode through K steps needs every state. Level 0 keeps all that each step computed; level 1
keeps the K states and computes the rest of a step again; level n keeps the states at the borders of
segments, and runs a segment again when its turn comes, itself with n-1 levels: about
``n * K**(1/n)`` states at once, for n-1 more forward passes (Griewank 1992; Chen et al.,
arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxdistill.errors import UserError


def segment_length(steps: int, levels: int) -> int:
    """Return the steps of a segment of the outermost of two or more levels.

    The best is ``K**((n-1)/n)``; the nearest divisor of K is taken where one lies within a factor
    of two, for a rest of odd length has to be compiled of its own.
    """
    best = steps ** ((levels - 1) / levels)
    near = [m for m in range(1, steps + 1) if steps % m == 0 and best / 2 <= m <= 2 * best]
    return min(near, key=lambda m: abs(m - best)) if near else max(1, round(best))


def stored_states(steps: int, levels: int) -> int:
    """Return how many states a scan of one or more levels holds at once in its backward pass."""
    if levels <= 1 or steps <= 2:
        return steps
    length = segment_length(steps, levels)
    return -(-steps // length) + stored_states(length, levels - 1)


def levels_for(steps: int, state_bytes: int, memory_budget: int) -> int:
    """Return the fewest levels whose states fit into a budget.

    Args:
        steps: K.
        state_bytes: of one state: params and optimizer.
        memory_budget: bytes for states.

    Raises:
        UserError: no number of levels fits.
    """
    most = max(1, steps.bit_length())
    for levels in range(1, most + 1):
        if stored_states(steps, levels) * state_bytes <= memory_budget:
            return levels
    least = stored_states(steps, most) * state_bytes
    raise UserError(
        f"a memory budget of {memory_budget:,} bytes given for {steps} inner steps of "
        f"{state_bytes:,} bytes each; accepted: {least:,} or more; raise it, or give a window"
    )


def checkpointed_scan(
    body: Callable[[Any, Any], Any], carry: Any, xs: Any, *, levels: int = 2
) -> Any:
    """Return the last carry of a scan, whose backward pass uses nested checkpoints.

    Args:
        body: ``(carry, x) -> carry``.
        carry: the first.
        xs: a tree of arrays ``[K, ...]``.
        levels: 0 for none, see the module.
    """
    steps = jax.tree.leaves(xs)[0].shape[0]
    if levels <= 1 or steps <= 2:
        once = jax.checkpoint(body, prevent_cse=False) if levels else body
        return lax.scan(lambda c, x: (once(c, x), None), carry, xs)[0]
    length = segment_length(steps, levels)

    @lambda f: jax.checkpoint(f, prevent_cse=False)
    def segment(carry: Any, xs: Any) -> Any:
        return checkpointed_scan(body, carry, xs, levels=levels - 1)

    whole = steps - steps % length
    split = jax.tree.map(lambda x: x[:whole].reshape(-1, length, *x.shape[1:]), xs)
    carry = lax.scan(lambda c, x: (segment(c, x), None), carry, split)[0]
    if whole < steps:
        carry = segment(carry, jax.tree.map(lambda x: x[whole:], xs))
    return carry


def tree_bytes(tree: Any) -> int:
    """Return the bytes of a tree's arrays."""
    return sum(jnp.size(x) * jnp.result_type(x).itemsize for x in jax.tree.leaves(tree))
