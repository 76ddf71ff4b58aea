"""Mixed mode: a gradient whose own gradient is taken forward over reverse.

To differentiate through training is to differentiate through ``g = dL/dtheta``. Reverse mode over
that gradient keeps, or makes again, all that the backward pass of L held. What is wanted is only a
product: for a cotangent ``v`` of ``g``,

    (d/dtheta, d/dS) <v, dL/dtheta> = d/de [dL/dtheta, dL/dS] (theta + e v, S)   at e = 0,

one directional derivative of an ordinary gradient, because second derivatives commute. It holds
no more than that gradient itself (Pearlmutter 1994; MixFlow-MG, arXiv 2505.00793).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# (params, data) -> scalar
LossFn = Callable[[Any, Any], Float[Array, ""]]


def gradient(loss: LossFn, *, mixed_mode: bool = True) -> Callable[[Any, Any], Any]:
    """Return ``(params, data) -> dL/dparams``, to be differentiated in reverse mode.

    Args:
        loss: ``(params, data) -> scalar``; ``data`` is any tree, its integer leaves are not
            differentiated. In mixed mode the loss must be differentiable forward as well as
            backward, so it can hold no ``custom_vjp`` (a chunked head: ``fused=False``), and it
            must not close over what the caller differentiates or maps: hand that in as ``data``.
        mixed_mode: False for reverse over reverse, as ``jax.grad`` does it.
    """
    if not mixed_mode:
        return jax.grad(loss)

    def both(params: Any, floats: list[Array], fixed: Any) -> tuple[Any, list[Array]]:
        def of(params: Any, floats: list[Array]) -> Array:
            return loss(params, _merge(floats, fixed))

        return jax.grad(of, argnums=(0, 1))(params, floats)

    @jax.custom_vjp
    def only_params(params: Any, floats: list[Array], fixed: Any) -> Any:
        return jax.grad(lambda p: loss(p, _merge(floats, fixed)))(params)

    def forward(params: Any, floats: list[Array], fixed: Any) -> tuple[Any, Any]:
        return only_params(params, floats, fixed), (params, floats, fixed)

    def backward(saved: Any, cotangent: Any) -> tuple[Any, list[Array], None]:
        params, floats, fixed = saved
        _, (by_params, by_floats) = jax.jvp(
            lambda p: both(p, floats, fixed), (params,), (cotangent,)
        )
        return by_params, by_floats, None

    only_params.defvjp(forward, backward)
    return lambda params, data: only_params(params, *_split(data))


def _split(data: Any) -> tuple[list[Array], Any]:
    """Return the float leaves, and the tree with a mark in the place of each."""
    leaves, shape = jax.tree.flatten(data)
    is_float = [jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves]
    floats = [jnp.asarray(x) for x, yes in zip(leaves, is_float, strict=True) if yes]
    rest = [None if yes else x for x, yes in zip(leaves, is_float, strict=True)]
    return floats, _Rest(rest, shape)


@jax.tree_util.register_pytree_node_class
class _Rest:
    """Hold the leaves that are not floats, None where one is, and the shape of the whole tree."""

    def __init__(self, leaves: list[Any], shape: Any) -> None:
        self.leaves, self.shape = leaves, shape

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.leaves,), self.shape

    @classmethod
    def tree_unflatten(cls, shape: Any, children: Any) -> _Rest:
        return cls(children[0], shape)


def _merge(floats: list[Array], rest: _Rest) -> Any:
    """Return the tree that ``_split`` took apart."""
    left = iter(floats)
    return jax.tree.unflatten(rest.shape, [next(left) if x is None else x for x in rest.leaves])
