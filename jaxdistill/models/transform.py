"""Transforms of one layer's params, each linear layer's made again in the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
from jaxtyping import Array

from jaxdistill.models.blocks import Linear

Params = dict[str, Any]
Transform = Callable[[Params], Params]


def _along(path: tuple[str, ...], leaves: Params, transform: Transform) -> Params:
    """Transform the leaves of one node as part of the whole tree."""
    for name in reversed(path):
        leaves = {name: leaves}
    leaves = transform(leaves)
    for name in path:
        leaves = leaves[name]
    return leaves


def transformed_linear(module: Linear, transform: Transform) -> Callable[[Array, Params], Array]:
    """Return a linear layer of masters: ``(x, node) -> y``.

    The backward pass makes the transformed kernel again, because it is elementwise and a stored one
    would be a second copy of all weights. Only for use inside a scan, whose backward pass is a loop
    of its own.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def apply(x: Array, node: Params) -> Array:
        node = _along(("layers", *module.path), node, transform)
        return cast(Array, Linear(module.features, module.use_bias).apply({"params": node}, x))

    return apply


def transform_but_linear(layer: Params, transform: Transform | None) -> Params:
    """Transform one layer's params, except the nodes of its linear layers."""
    if transform is None:
        return layer

    def walk(node: Params, path: tuple[str, ...]) -> Params:
        out = {name: walk(x, (*path, name)) for name, x in node.items() if isinstance(x, dict)}
        leaves = {name: x for name, x in node.items() if not isinstance(x, dict)}
        linear = any(name.split("_")[0] == "kernel" for name in leaves)
        return out | (leaves if linear or not leaves else _along(path, leaves, transform))

    return walk(layer, ("layers",))
