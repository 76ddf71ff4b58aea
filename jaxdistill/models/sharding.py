"""Where every array of a model lies on the mesh: one table for params, grids, optimizer state.

A parameter's axes have logical names by its path; a layout says which mesh axes divide each name.
Optimizer states and grids have the paths of their parameters and follow them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.mesh import FSDP, TENSOR, VOCABULARY, present_mesh
from jaxdistill.paths import path_of

Axes = tuple[str | None, ...]
Layout = Literal["sharded", "tensor", "replicated"]

# Logical axes from the last one back: of a weight [..., in, out], and of a table [V, D]. What
# stands beside a weight has its axes too: grids [..., groups, out], stored integers.
_BESIDE = r"(_q|_scale|_zero|_step|_min|_max)?$"
_TABLE: tuple[tuple[str, Axes], ...] = (
    (rf"embed_tokens/embedding{_BESIDE}", ("vocabulary", None)),
    (rf"lm_head/kernel{_BESIDE}", (None, "vocabulary")),
    (rf"self_attn/(q|k|v)_proj/kernel{_BESIDE}", ("embed", "heads")),
    (rf"self_attn/o_proj/kernel{_BESIDE}", ("heads", "embed")),
    (rf"mlp/(gate|up)_proj/kernel{_BESIDE}", ("embed", "hidden")),
    (rf"mlp/down_proj/kernel{_BESIDE}", ("hidden", "embed")),
    (r"(q|k|v)_proj/bias$", ("heads",)),
    (r"(gate|up)_proj/bias$", ("hidden",)),
    (r"(q|k|v|gate|up)_proj/kernel_lora_a$", ("embed", None)),
    (r"(q|k|v)_proj/kernel_lora_b$", (None, "heads")),
    (r"(gate|up)_proj/kernel_lora_b$", (None, "hidden")),
    (r"(o|down)_proj/kernel_lora_b$", (None, "embed")),
    (r"projections/.*kernel$", (None, "embed")),
)
_LAYOUTS: dict[str, dict[str, str | tuple[str, ...]]] = {
    "sharded": {"vocabulary": VOCABULARY, "embed": FSDP, "heads": TENSOR, "hidden": TENSOR},
    "tensor": {"vocabulary": TENSOR, "heads": TENSOR, "hidden": TENSOR},
    "replicated": {},
}


def logical_axes(path: str, ndim: int) -> Axes:
    """Return the logical name of each axis of the leaf at a path; None where it has none."""
    known = next((axes for pattern, axes in _TABLE if re.search(pattern, path)), ())
    known = known[max(0, len(known) - ndim) :]
    return (None,) * (ndim - len(known)) + known


def sharding_of(
    path: str, shape: tuple[int, ...], mesh: Mesh, layout: Layout = "sharded"
) -> NamedSharding:
    """Return how the leaf at a path is divided.

    An axis that the mesh axes do not divide evenly is divided by as many of them as do, from the
    first one on, or stays whole: grids of one group, few key heads, odd vocabularies.
    """
    rules = _LAYOUTS[layout]
    entries: list[tuple[str, ...] | None] = []
    for name, size in zip(logical_axes(path, len(shape)), shape, strict=True):
        wanted = rules.get(name or "", ())
        kept: list[str] = []
        for axis in (wanted,) if isinstance(wanted, str) else wanted:
            parts = int(np.prod([mesh.shape[a] for a in (*kept, axis)]))
            if mesh.shape[axis] > 1 and size % parts == 0:
                kept.append(axis)
        entries.append(tuple(kept) or None)
    return NamedSharding(mesh, PartitionSpec(*entries))


def shardings(tree: Any, mesh: Mesh, layout: Layout = "sharded") -> Any:
    """Return the tree of shardings of a tree of arrays or of their shapes.

    Args:
        tree: params, an optimizer's state, a whole training state.
        mesh: where they lie.
        layout: ``sharded`` divides by fsdp and tensor, ``tensor`` by tensor alone, ``replicated``
            gives every device all of it.
    """
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: sharding_of(path_of(keys), tuple(np.shape(leaf)), mesh, layout), tree
    )


def place(tree: Any, layout: Layout = "sharded") -> Any:
    """Return a tree of arrays laid out on the present mesh, without one on the first device."""
    mesh = present_mesh()
    return jax.device_put(tree, None if mesh is None else shardings(tree, mesh, layout))


def make_sharded(make: Callable[..., Any], *args: Any) -> Any:
    """Return ``make(*args)``; on a mesh each leaf is computed where it shall lie, nowhere whole."""
    mesh = present_mesh()
    if mesh is None:
        return make(*args)
    out = shardings(jax.eval_shape(make, *args), mesh)
    return jax.jit(make, out_shardings=out)(*args)


def make_leaf(
    path: str,
    shape: tuple[int, ...],
    read: Callable[[tuple[slice, ...]], np.ndarray],
    layout: Layout = "sharded",
) -> Any:
    """Return the leaf at a path, from a function that reads any part of it.

    Without a mesh it is read whole. On one, each host reads what its own devices hold, a part that
    several of them hold once.

    Args:
        path: of the leaf.
        shape: of the whole leaf.
        read: ``index -> array``, one slice an axis.
        layout: see ``shardings``.
    """
    mesh = present_mesh()
    if mesh is None:
        return read(tuple(slice(0, size) for size in shape))
    known: dict[tuple[Any, ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        place = tuple(some.indices(size)[:2] for some, size in zip(index, shape, strict=True))
        if place not in known:
            known[place] = read(tuple(slice(*ends) for ends in place))
        return known[place]

    return jax.make_array_from_callback(shape, sharding_of(path, shape, mesh, layout), part)
