"""What quantization did to a tree: bytes to serve it, weights clipped, integers that moved."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdistill.paths import node_at, walk
from jaxdistill.quant.lattice import Grid, QuantSpec, fixed_grid, spread
from jaxdistill.quant.policy import AXES, Params, Policy, grid_of


def weight_bytes(params: Params, policy: Policy | None = None) -> int:
    """Count bytes to serve a model: packed integers, float16 scales, float leaves at 2 bytes.

    Float leaves are counted as bfloat16, the type that models are released in, for teacher and
    student alike; a zero point is packed like the integers beside it.

    Args:
        params: float params, or the stored form.
        policy: the stored form's policy, for its widths; without one (u)int4 counts 4 bits.
    """
    total = 0.0
    for path, leaf in walk(params):
        weight, bits = path.removesuffix("_q").removesuffix("_zero"), 16
        if weight != path:
            spec = policy.spec(weight) if policy else None
            bits = spec.bits if spec else (8 if leaf.dtype in (jnp.int8, jnp.uint8) else 4)
        total += float(np.prod(leaf.shape)) * bits / 8
    return int(total)


def clipped_share(params: Params, policy: Policy) -> dict[str, Float[Array, "..."]]:
    """Return the share of each quantized weight that clipping changes.

    A weight is clipped where its rounded integer is beyond the ends of the range. One that is past
    an end by less than half a step rounds to that end as any other weight does, so it is not
    counted, though no gradient reaches it either (``fake_quant``).

    Args:
        params: masters and grids.
        policy: theirs.

    Returns:
        path of the weight to its share, ``[L]`` for a stack of layers and ``[]`` for a table.
    """
    found = {}
    for path, leaf in walk(params):
        spec, stem = policy.spec(path), path.rsplit("/", 1)[-1]
        if spec is None:
            continue
        grid = tuple(grid_of(node_at(params, path.rpartition("/")[0]), stem).values())
        if grid:
            found[path] = _beyond(leaf, grid, spec, AXES[stem])
    return found


@functools.partial(jax.jit, static_argnums=(2, 3))
def _beyond(w: Array, grid: Grid, spec: QuantSpec, axis: int) -> Array:
    scale, *zero = (spread(part, w.shape, axis) for part in fixed_grid(grid, spec))
    place = jnp.round(w / scale) + (zero[0] if zero else jnp.zeros_like(w))
    return jnp.mean((place < spec.qmin) | (place > spec.qmax), axis=(-2, -1))


def flip_rate(before: Params, after: Params) -> dict[str, Float[Array, "..."]]:
    """Return the share of each weight's integers that differ between two stored forms.

    Args:
        before: the stored form at one time, see ``quantize_params``.
        after: of the same model and policy, at another.

    Returns:
        path of the weight (``layers/mlp/up_proj/kernel``) to its share, ``[L]`` or ``[]``.
    """
    earlier = dict(walk(before))
    return {
        path.removesuffix("_q"): _differing(earlier[path], leaf)
        for path, leaf in walk(after)
        if path.endswith("_q")
    }


@jax.jit
def _differing(a: Array, b: Array) -> Array:
    return jnp.mean(a != b, axis=(-2, -1))
