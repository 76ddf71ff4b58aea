"""AWQ: scale inputs that matter up before rounding, and what makes them down (arXiv 2306.00978).

An input of large magnitude carries the errors of its weights into the outputs. Its weights are
multiplied by ``s > 1``, which makes their rounding error relatively smaller, and the operation
before divides by s: a norm's weight, or the output channels of another kernel. In float the
function stays what it was.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxdistill.quant.fake_quant import fake_quant
from jaxdistill.quant.gptq import check_gram
from jaxdistill.quant.lattice import QuantSpec
from jaxdistill.quant.ranges import choose_grid

Params = dict[str, Any]

# The exponents tried, in [0, 1); 0 leaves everything as it is.
_EXPONENTS = 20
# Least magnitude of an input, as a share of the mean: what an unused input is taken for.
_LEAST = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """Name an operation and the kernels that read its output, and nothing else reads it.

    Attributes:
        producer: path of a norm (its ``weight``) or a linear layer (``kernel`` and ``bias``) whose
            output channels are divided: ``layers/mlp/up_proj``.
        consumers: paths of the linear layers whose inputs are multiplied.
        heads: ``(G, H)`` where the consumers see each run of H output channels G times over: the
            value heads of width H that G query heads share.
    """

    producer: str
    consumers: tuple[str, ...]
    heads: tuple[int, int] | None = None


def channel_scales(
    kernels: Sequence[Float[Array, "I _"]],
    specs: Sequence[QuantSpec],
    gram: Float[Array, "I I"],
    magnitude: Float[Array, " I"],
    heads: tuple[int, int] | None = None,
    *,
    name: str = "weight",
) -> Float[Array, " C"]:
    """Return the scales ``s = m^alpha / (geometric mean)`` of a producer's C output channels.

    m is the mean magnitude of each channel. Of 20 alphas in [0, 1) the one is taken that makes
    ``sum |X (w_hat / s - w)|^2`` of all the kernels together least, ``w_hat`` being ``s w`` rounded
    over its whole range (``absmax``). Alpha 0 is among them: by this error it is never worse.

    Args:
        kernels: float32 kernels that share the input.
        specs: one for each.
        gram: ``X^T X`` of that input ``X [N, I]``.
        magnitude: ``sum |X|`` over the rows, or their mean: a common factor cancels.
        heads: see ``Fold``; C is then ``I / G``, else I.
        name: the input's path, for the error.

    Raises:
        UserError: the statistics are not finite.
    """
    check_gram(gram, name)
    whole = tuple(dataclasses.replace(spec, ranges="absmax", learned=False) for spec in specs)
    return _search(tuple(kernels), gram, magnitude, whole, heads)


@functools.partial(jax.jit, static_argnames=("specs", "heads"))
def _search(
    kernels: tuple[Array, ...],
    gram: Array,
    magnitude: Array,
    specs: tuple[QuantSpec, ...],
    heads: tuple[int, int] | None,
) -> Array:
    """Compute ``channel_scales``."""
    if heads is not None:
        magnitude = jnp.mean(magnitude.reshape(-1, *heads), axis=1).reshape(-1)
    mean = jnp.mean(magnitude)
    m = jnp.maximum(magnitude / jnp.where(mean > 0, mean, jnp.ones_like(mean)), _LEAST)
    log_m = jnp.log(m) - jnp.mean(jnp.log(m))

    def error(alpha: Array) -> Array:
        s = jnp.expand_dims(_at_inputs(jnp.exp(alpha * log_m), heads), 1)
        total = jnp.zeros(())
        for w, spec in zip(kernels, specs, strict=True):
            off = fake_quant(w * s, choose_grid(w * s, spec), spec) / s - w
            total += jnp.sum(off * jnp.dot(gram, off, precision=lax.Precision.HIGHEST))
        return total

    alphas = jnp.arange(_EXPONENTS, dtype=jnp.float32) / _EXPONENTS
    return jnp.exp(alphas[jnp.argmin(lax.map(error, alphas))] * log_m)


def _at_inputs(s: Array, heads: tuple[int, int] | None) -> Array:
    """Repeat the producer's channels as the consumers see them."""
    if heads is None:
        return s
    repeats, width = heads
    each = jnp.expand_dims(s.reshape(-1, width), 1)
    return jnp.broadcast_to(each, (each.shape[0], repeats, width)).reshape(-1)


def fold_scales(params: Params, fold: Fold, s: Float[Array, " C"]) -> Params:
    """Return the tree with the producer's outputs divided by ``s``, the consumers' inputs times it.

    The tree is one layer's, ``{"layers": ...}``, without the stacked axis. What it computes is the
    same, up to float rounding.
    """

    def over_outputs(leaf: Array) -> Array:
        return leaf / jnp.broadcast_to(jnp.expand_dims(s, tuple(range(leaf.ndim - 1))), leaf.shape)

    wide = jnp.expand_dims(_at_inputs(s, fold.heads), 1)
    node = get_node(params, fold.producer)
    changed = {k: over_outputs(node[k]) for k in ("weight", "kernel", "bias") if k in node}
    params = put_node(params, fold.producer, node | changed)
    for path in fold.consumers:
        node = get_node(params, path)
        params = put_node(params, path, node | {"kernel": node["kernel"] * wide})
    return params


def get_node(params: Params, path: str) -> Params:
    """Return the sub-tree at ``a/b/c``."""
    return functools.reduce(lambda node, name: node[name], path.split("/"), params)


def put_node(params: Params, path: str, node: Params) -> Params:
    """Return the tree with the sub-tree at ``a/b/c`` replaced; the given tree is not changed."""
    name, _, rest = path.partition("/")
    return params | {name: put_node(params[name], rest, node) if rest else node}
