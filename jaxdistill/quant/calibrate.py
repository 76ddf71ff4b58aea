"""Post-training quantization with calibration text: a pass over the layers, one at a time.

The statistics of a layer's inputs are gathered from what the layers before it, quantized already,
give on the text. Then the layer is quantized, and its outputs become the next one's inputs. Of the
statistics only those of one layer exist at a time, and of the hidden states one set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxdistill.errors import UserError
from jaxdistill.quant.awq import Fold, channel_scales, fold_scales, get_node, put_node
from jaxdistill.quant.gptq import gptq
from jaxdistill.quant.policy import Policy, add_scales, fake_quant_params, grid_of

Params = dict[str, Any]
Batch = Mapping[str, Any]
Method = Literal["gptq", "awq"]
# (params without layers, batch) -> hidden states [N, D], N = B*T
Embed = Callable[[Params, Batch], Array]
# (one layer's params, hidden states, batch) -> (hidden states, each linear layer's input by path)
Layer = Callable[[Params, Array, Batch], tuple[Array, dict[str, Array]]]


class Statistics(NamedTuple):
    """Hold what is known of one input ``X [N, I]``, summed over the rows that are no padding."""

    gram: Float[Array, "I I"]
    magnitude: Float[Array, " I"]


def calibrate(
    params: Params,
    policy: Policy,
    batches: Iterable[Batch],
    *,
    embed: Embed,
    layer: Layer,
    method: str = "gptq",
    folds: Sequence[Fold] = (),
    sequential: bool = False,
    damping: float = 0.01,
    act_order: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """Return the tree that ``add_scales`` returns, its layers calibrated on ``batches``.

    Ranges are chosen from the weights as the policy says; what lies outside of the layers, a tied
    table or a head, is not calibrated. With ``gptq`` each quantized kernel in the layers holds its
    lattice values. With ``awq`` the layers' kernels and what the folds name are scaled, and float
    still.

    Args:
        params: float32 params, layers stacked on axis 0 under ``layers``.
        policy: which weight gets which spec.
        batches: ``tokens [B, T]`` and what else the callables want; places where ``segment_ids`` is
            0 are padding and count nowhere.
        embed: see ``Embed``; it is given the quantized table.
        layer: see ``Layer``; paths are ``layers/self_attn/q_proj``. An input that several linear
            layers share is gathered once, if it is one and the same array in the answer.
        method: ``gptq`` (``quant.gptq``) or ``awq`` (``quant.awq``).
        folds: where ``awq`` may put scales.
        sequential: with ``gptq``, quantize the linear layers of a layer one input after the other,
            each on what the quantized ones before it give (the paper's "true sequential"), and not
            all on the float layer's. Holds one Gram matrix at a time; takes a forward pass each.
        damping: see ``quant.gptq.gptq``.
        act_order: see ``quant.gptq.gptq``.
        progress: called with (layers done, layers).

    Raises:
        UserError: no text is given, the method is unknown, a weight is unsound (``add_scales``), or
            inputs are (``gptq``).
    """
    if method not in get_args(Method):
        raise UserError(f"method {method!r} given; accepted: {', '.join(get_args(Method))}")
    if sequential and method != "gptq":
        raise UserError(f"sequential is given with {method}; accepted with gptq alone")
    batches = list(batches)
    if not any(np.any(np.asarray(b.get("segment_ids", 1)) != 0) for b in batches):
        raise UserError("the calibration data hold no token; give at least one text")

    transform = fake_quant_params(policy)
    rest = add_scales({k: v for k, v in params.items() if k != "layers"}, policy)
    first = jax.jit(lambda p, batch: embed(transform(p), batch))
    collect, advance = _passes(layer, transform)
    hidden = [first(rest, batch) for batch in batches]

    depth = len(jax.tree.leaves(params["layers"])[0])
    shared = _shared_inputs(layer, _layer_of(params, 0)["layers"], hidden[0], batches[0])
    wanted = _wanted(shared, policy, folds if method == "awq" else None)
    steps = [[path] for path in wanted] if sequential else [list(wanted)]
    done = []
    for index in range(depth):
        tree = _layer_of(params, index)
        if method == "gptq":  # the ranges come first, from the weights as they were
            tree = add_scales(tree, policy)
        for step in steps:
            statistics = {path: _nothing(wanted[path]) for path in step}
            for x, batch in zip(hidden, batches, strict=True):
                statistics = collect(tree, x, batch, statistics)
            if method == "gptq":
                tree = _apply_gptq(tree, policy, shared, statistics, damping, act_order)
            else:
                tree = _apply_awq(tree, policy, folds, shared, statistics)
            del statistics  # before the next ones are made
        if index + 1 < depth:
            for i, batch in enumerate(batches):
                hidden[i] = advance(tree, hidden[i], batch)
        done.append(tree["layers"])
        if progress is not None:
            progress(index + 1, depth)
    del hidden
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *done)
    return {name: layers if name == "layers" else rest[name] for name in params}


def _layer_of(params: Params, index: int) -> Params:
    """Return one layer as a tree of its own, without the stacked axis."""
    return {"layers": jax.tree.map(lambda leaf: leaf[index], params["layers"])}


def _passes(layer: Layer, transform: Callable[[Params], Params]) -> tuple[Any, Any]:
    """Return the compiled ``collect`` (statistics of one batch added) and ``advance``."""

    def collect(tree: Params, x: Array, batch: Batch, sums: dict[str, Statistics]) -> Any:
        # Kernels as they stand: of this layer those not rounded yet are float, grid or no grid.
        inputs = layer(tree["layers"], x, batch)[1]
        return {path: _add(sums[path], inputs[path], batch) for path in sums}

    def advance(tree: Params, x: Array, batch: Batch) -> Array:
        return layer(transform(tree)["layers"], x, batch)[0]

    return jax.jit(collect, donate_argnums=3), jax.jit(advance)


def _nothing(size: int) -> Statistics:
    return Statistics(jnp.zeros((size, size)), jnp.zeros(size))


def _add(sums: Statistics, rows: Array, batch: Batch) -> Statistics:
    """Add the rows of one batch that are no padding."""
    rows = rows.astype(jnp.float32)
    if "segment_ids" in batch:
        counts = jnp.expand_dims(batch["segment_ids"].reshape(-1) != 0, 1)
        rows = jnp.where(counts, rows, jnp.zeros_like(rows))
    gram = jnp.dot(rows.T, rows, precision=lax.Precision.HIGHEST)
    return Statistics(sums.gram + gram, sums.magnitude + jnp.sum(jnp.abs(rows), axis=0))


def _shared_inputs(layer: Layer, params: Params, x: Array, batch: Batch) -> dict[str, Any]:
    """Return ``{path: (the first path with the same input, its width)}``; computes nothing."""
    found: dict[str, tuple[str, int]] = {}

    def look(params: Params, x: Array, batch: Batch) -> None:
        first: dict[int, str] = {}
        for path, rows in layer(params, x, batch)[1].items():
            found[path] = (first.setdefault(id(rows), path), rows.shape[-1])

    jax.eval_shape(look, params, x, batch)
    return found


def _wanted(shared: dict[str, Any], policy: Policy, folds: Sequence[Fold] | None) -> dict[str, int]:
    """Return the width of each distinct input that a quantized kernel reads, in order."""
    read = shared if folds is None else [path for fold in folds for path in fold.consumers]
    read = [path for path in read if policy.spec(f"{path}/kernel") is not None]
    return {shared[path][0]: shared[path][1] for path in shared if path in read}


def _apply_gptq(
    tree: Params,
    policy: Policy,
    shared: dict[str, Any],
    statistics: dict[str, Statistics],
    damping: float,
    act_order: bool,
) -> Params:
    """Return the tree with the kernels that read these inputs on their lattice."""
    for path, (source, _) in shared.items():
        spec = policy.spec(f"{path}/kernel")
        if source not in statistics or spec is None:
            continue
        node = get_node(tree, path)
        grid, gram = tuple(grid_of(node, "kernel").values()), statistics[source].gram
        kernel = gptq(
            node["kernel"],
            gram,
            grid,
            spec,
            damping=damping,
            act_order=act_order,
            name=f"{path}/kernel",
        )
        tree = put_node(tree, path, node | {"kernel": kernel})
    return tree


def _apply_awq(
    tree: Params,
    policy: Policy,
    folds: Sequence[Fold],
    shared: dict[str, Any],
    statistics: dict[str, Statistics],
) -> Params:
    """Return the tree scaled by every fold, with the ranges of its scaled weights beside them."""
    found = []
    for fold in folds:
        specs = {path: policy.spec(f"{path}/kernel") for path in fold.consumers}
        specs = {path: spec for path, spec in specs.items() if spec is not None}
        if not specs:
            continue
        gram, magnitude = statistics[shared[next(iter(specs))][0]]
        kernels = [get_node(tree, path)["kernel"] for path in specs]
        s = channel_scales(
            kernels, list(specs.values()), gram, magnitude, fold.heads, name=next(iter(specs))
        )
        found.append((fold, s))
    for fold, s in found:  # after all were chosen: each from the layer as it was
        tree = fold_scales(tree, fold, s)
    return add_scales(tree, policy)
