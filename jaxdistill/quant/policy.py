"""Which parameter gets which spec, by regular expression over its path, and a tree's transforms.

Leaf names: a float weight is ``kernel`` or ``embedding``; the parts of its grid stand beside it as
``kernel_scale`` and ``kernel_zero`` or, where the range is learned, as ``kernel_step`` (symmetric)
or ``kernel_min`` and ``kernel_max``;
stored integers replace the weight as ``kernel_q``. Likewise ``embedding_...``.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.errors import UserError
from jaxdistill.paths import Selection, along, intersection, path_of, select
from jaxdistill.quant.activations import ActivationSpec, fake_quant_activation
from jaxdistill.quant.fake_quant import fake_quant
from jaxdistill.quant.held import hold
from jaxdistill.quant.lattice import Grid, QuantSpec, dequantize, fixed_grid, quantize
from jaxdistill.quant.ranges import choose_grid

Params = dict[str, Any]
ActivationRules = tuple[tuple[str, ActivationSpec | None], ...]
AXES = {"kernel": -2, "embedding": -1}
_GRIDS = (("min", "max"), ("scale", "zero"), ("scale",), ("step",))
_BESIDE = re.compile(r"_(q|scale|zero|step|min|max)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Map parameter paths to specs: the first rule whose regex is found in the path decides.

    Attributes:
        rules: pairs ``(regex, QuantSpec | None)`` over paths such as
            ``layers/self_attn/q_proj/kernel``; None, or no match, leaves the weight in float.
        activations: the like for the input of a decoder layer's linear layers, over paths such as
            ``layers/self_attn/q_proj``.
    """

    rules: tuple[tuple[str, QuantSpec | None], ...]
    activations: ActivationRules = ()

    def __post_init__(self) -> None:
        for pattern, _ in (*self.rules, *self.activations):
            try:
                re.compile(pattern)
            except re.error as e:
                raise UserError(f"{pattern!r} is not a regular expression: {e}") from None

    def spec(self, path: str) -> QuantSpec | None:
        """Return the spec of the weight at ``path``, None for float."""
        if path.rsplit("/", 1)[-1] not in AXES:
            return None
        return next((spec for pattern, spec in self.rules if re.search(pattern, path)), None)


def default_policy(
    spec: QuantSpec, *, tied: bool, head_bits: int = 8, head_group_size: int | None = 32
) -> Policy:
    """Return the default: decoder kernels by ``spec``, the vocabulary head (or tied table) 8-bit.

    A tied table has one spec on both of its uses. Norms, biases and an untied embedding stay float.
    """
    head = QuantSpec(bits=head_bits, group_size=head_group_size, ranges="absmax")
    vocabulary = r"^embed_tokens/embedding$" if tied else r"^lm_head/kernel$"
    return Policy(rules=((r"^layers/.*/kernel$", spec), (vocabulary, head)))


def _map_weights(params: Params, fn: Callable[[str, str, Params], Params], prefix="") -> Params:
    """Rebuild a tree, replacing a node's leaves of each weight by ``fn(path, leaf name, node)``."""
    out: Params = {}
    for name, child in params.items():
        if isinstance(child, dict):
            out[name] = _map_weights(child, fn, f"{prefix}{name}/")
            continue
        stem = _BESIDE.sub("", name)
        if stem not in AXES:
            out[name] = child
        elif name in (stem, f"{stem}_q"):  # the grid goes with its weight
            out |= fn(f"{prefix}{stem}", stem, params)
    return out


def grid_of(node: Params, stem: str) -> dict[str, Any]:
    """Return the leaves of a weight's grid, by name and in order; empty for a float weight."""
    names = ([f"{stem}_{part}" for part in parts] for parts in _GRIDS)
    return next(({n: node[n] for n in found} for found in names if found[-1] in node), {})


def _quantized(policy: Policy, path: str, stem: str, node: Params) -> tuple[QuantSpec | None, Grid]:
    """Return spec and grid of a weight; the spec is None where it stays in float."""
    grid = tuple(grid_of(node, stem).values())
    return (policy.spec(path) if grid else None), grid


def grid_leaves(stem: str, grid: Grid, spec: QuantSpec) -> Params:
    """Name the parts of a training grid as they stand beside the weight ``stem``."""
    return dict(zip((f"{stem}_{part}" for part in spec.grid_leaves), grid, strict=True))


def add_scales(params: Params, policy: Policy) -> Params:
    """Post-training-quantize: put the grid that the policy asks for beside each weight.

    Raises:
        UserError: a weight is NaN or infinite, its scale leaves float16, or groups do not divide.
    """

    def calibrate(path: str, stem: str, node: Params) -> Params:
        weight, spec = node[stem], policy.spec(path)
        if not bool(jnp.isfinite(weight).all()):
            raise UserError(f"{path} holds NaN or infinite weights; give a sound checkpoint")
        if spec is None:
            return {stem: weight}
        grid = choose_grid(jnp.asarray(weight), spec, AXES[stem], name=path)
        if not all(bool(jnp.isfinite(part).all()) for part in fixed_grid(grid, spec)):
            raise UserError(f"{path} needs a scale beyond float16; leave it in float by the policy")
        return {stem: weight} | grid_leaves(stem, grid, spec)

    return _map_weights(params, calibrate)


def scale_shapes(params: Params, policy: Policy) -> Params:
    """Return what ``add_scales`` would, as shapes, of params that are shapes themselves."""

    def shapes(path: str, stem: str, node: Params) -> Params:
        weight, spec = node[stem], policy.spec(path)
        if spec is None:
            return {stem: weight}

        def grid(w: Any) -> Params:
            return grid_leaves(stem, choose_grid(w, spec, AXES[stem], name=path), spec)

        return {stem: weight} | jax.eval_shape(grid, weight)

    return _map_weights(params, shapes)


def fake_quant_params(policy: Policy) -> Callable[[Params], Params]:
    """Return the transform ``params -> params`` from masters and grids to lattice values.

    It is pure, leaf by leaf, and differentiable (straight through), so it may run on the whole
    tree or inside the layer scan.
    """

    def forward(path: str, stem: str, node: Params) -> Params:
        spec, grid = _quantized(policy, path, stem, node)
        return {stem: fake_quant(node[stem], grid, spec, AXES[stem]) if spec else node[stem]}

    return lambda params: _map_weights(params, forward)


@functools.lru_cache(maxsize=64)
def fake_quant_activations(rules: ActivationRules) -> Callable[[str, Any], Any] | None:
    """Return ``(path, rows) -> rows`` for ``make_apply``'s ``activation``; None without rules."""

    def forward(path: str, rows: Any) -> Any:
        spec = next((spec for pattern, spec in rules if re.search(pattern, path)), None)
        return rows if spec is None else fake_quant_activation(rows, spec)

    return forward if rules else None


def quantize_params(params: Params, policy: Policy) -> Params:
    """Return the stored form: integers and float16 grids in place of masters."""

    def store(path: str, stem: str, node: Params) -> Params:
        spec, grid = _quantized(policy, path, stem, node)
        if spec is None:
            return {stem: node[stem]}
        integers = jax.jit(quantize, static_argnums=(2, 3))(node[stem], grid, spec, AXES[stem])
        fixed = fixed_grid(grid, spec)
        return {f"{stem}_q": integers} | {
            f"{stem}_{part}": x for part, x in zip(("scale", "zero"), fixed, strict=False)
        }

    return _map_weights(params, store)


def dequantize_params(params: Params) -> Params:
    """Return float32 weights from the stored form: a transform, exact, usable inside the scan."""

    def load(path: str, stem: str, node: Params) -> Params:
        if f"{stem}_q" not in node:
            return {stem: node[stem]}
        grid = tuple(grid_of(node, stem).values())
        return {stem: dequantize(node[f"{stem}_q"], grid, AXES[stem])}

    return _map_weights(params, load)


def hold_params(params: Params, *, packed: bool) -> Params:
    """Return the stored form as products read it: each weight one ``Held``; see ``quant.held``."""

    def keep(path: str, stem: str, node: Params) -> Params:
        if f"{stem}_q" not in node:
            return {stem: node[stem]}
        grid = grid_of(node, stem).values()
        return {stem: hold(node[f"{stem}_q"], *grid, axis=AXES[stem], packed=packed)}

    return _map_weights(params, keep)


def snap(params: Params, policy: Policy, what: Selection) -> Params:
    """Move master weights onto their lattice values: those that a freeze of ``what`` holds still.

    A weight stays where it is while its learned grid is not frozen with it, because it has no one
    lattice value then. Of stacked layers only those are moved that ``what`` names.

    Args:
        params: masters and grids.
        policy: theirs.
        what: as ``kd.freeze.freeze`` takes it: ``ov``, a pattern, a function, a mask.

    Raises:
        UserError: ``what`` matches nothing.
    """
    parts = {path_of(keys): part for keys, part in select(params, what).items()}

    def move(path: str, stem: str, node: Params) -> Params:
        spec, grid = _quantized(policy, path, stem, node)
        if spec is None:
            return {stem: node[stem]}
        leaves, weight, part = grid_of(node, stem), node[stem], parts.get(path, False)
        for name in leaves if spec.learned else ():
            part = intersection(part, parts.get(path.removesuffix(stem) + name, False))
        if part:
            value = fake_quant(weight, grid, spec, AXES[stem])
            weight = value if part is True else jnp.where(along(part, weight), value, weight)
        return {stem: weight} | leaves

    return _map_weights(params, move)
