"""Which parameter gets which spec, by regular expression over its path, and a tree's transforms.

Leaf names: a float weight is ``kernel`` or ``embedding``; its scale stands beside it as
``kernel_scale`` or ``embedding_scale``; stored integers replace the weight as ``kernel_q`` or
``embedding_q``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.quant.fake_quant import fake_quant
from jaxdistill.quant.lattice import QuantSpec, dequantize, quantize
from jaxdistill.quant.ranges import choose_scale

Params = dict[str, Any]
AXES = {"kernel": -2, "embedding": -1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Map parameter paths to specs: the first rule whose regex is found in the path decides.

    Attributes:
        rules: pairs ``(regex, QuantSpec | None)`` over paths such as
            ``layers/self_attn/q_proj/kernel``; None, or no match, leaves the weight in float.
    """

    rules: tuple[tuple[str, QuantSpec | None], ...]

    def __post_init__(self) -> None:
        for pattern, _ in self.rules:
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


def walk(params: Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` of every leaf of a nested dict, paths joined by ``/``."""
    for name, child in params.items():
        path = f"{prefix}{name}"
        if isinstance(child, dict):
            yield from walk(child, path + "/")
        else:
            yield path, child


def _map_weights(params: Params, fn: Callable[[str, str, Params], Params], prefix="") -> Params:
    """Rebuild a tree, replacing a node's leaves of each weight by ``fn(path, leaf name, node)``."""
    out: Params = {}
    for name, child in params.items():
        if isinstance(child, dict):
            out[name] = _map_weights(child, fn, f"{prefix}{name}/")
            continue
        stem = name.removesuffix("_q").removesuffix("_scale")
        if stem not in AXES:
            out[name] = child
        elif name != f"{stem}_scale":  # the scale goes with its weight
            out |= fn(f"{prefix}{stem}", stem, params)
    return out


def add_scales(params: Params, policy: Policy) -> Params:
    """Post-training-quantize: put the float16 scale that the policy asks for beside each weight.

    Raises:
        UserError: a weight is NaN or infinite, its scale leaves float16, or groups do not divide.
    """

    def calibrate(path: str, stem: str, node: Params) -> Params:
        weight, spec = node[stem], policy.spec(path)
        if not bool(jnp.isfinite(weight).all()):
            raise UserError(f"{path} holds NaN or infinite weights; give a sound checkpoint")
        if spec is None:
            return {stem: weight}
        scale = choose_scale(jnp.asarray(weight), spec, AXES[stem], name=path)
        if not bool(jnp.isfinite(scale).all()):
            raise UserError(f"{path} needs a scale beyond float16; leave it in float by the policy")
        return {stem: weight, f"{stem}_scale": scale}

    return _map_weights(params, calibrate)


def fake_quant_params(policy: Policy) -> Callable[[Params], Params]:
    """Return the transform ``params -> params`` from masters and scales to lattice values.

    It is pure, leaf by leaf, and differentiable (straight through), so it may run on the whole
    tree or inside the layer scan.
    """

    def forward(path: str, stem: str, node: Params) -> Params:
        spec, scale = policy.spec(path), node.get(f"{stem}_scale")
        if spec is None or scale is None:
            return {stem: node[stem]}
        return {stem: fake_quant(node[stem], scale, spec, AXES[stem])}

    return lambda params: _map_weights(params, forward)


def quantize_params(params: Params, policy: Policy) -> Params:
    """Return the stored form: int4 or int8 integers and float16 scales in place of masters."""

    def store(path: str, stem: str, node: Params) -> Params:
        spec, scale = policy.spec(path), node.get(f"{stem}_scale")
        if spec is None or scale is None:
            return {stem: node[stem]}
        integers = jax.jit(quantize, static_argnums=(2, 3))(node[stem], scale, spec, AXES[stem])
        return {f"{stem}_q": integers, f"{stem}_scale": scale}

    return _map_weights(params, store)


def dequantize_params(params: Params) -> Params:
    """Return float32 weights from the stored form: a transform, exact, usable inside the scan."""

    def load(path: str, stem: str, node: Params) -> Params:
        if f"{stem}_q" not in node:
            return {stem: node[stem]}
        return {stem: dequantize(node[f"{stem}_q"], node[f"{stem}_scale"], AXES[stem])}

    return _map_weights(params, load)


def snap(params: Params, policy: Policy, pattern: str) -> Params:
    """Move every master weight whose path matches ``pattern`` onto its lattice value."""
    matcher = re.compile(pattern)

    def move(path: str, stem: str, node: Params) -> Params:
        spec, scale = policy.spec(path), node.get(f"{stem}_scale")
        if spec is None or scale is None:
            return {stem: node[stem]}
        moved = matcher.search(path)
        weight = fake_quant(node[stem], scale, spec, AXES[stem]) if moved else node[stem]
        return {stem: weight, f"{stem}_scale": scale}

    return _map_weights(params, move)


def weight_bytes(params: Params, policy: Policy | None = None) -> int:
    """Count bytes to serve a model: packed integers, float16 scales, float leaves at 2 bytes.

    Float leaves are counted as bfloat16, the type that models are released in, for teacher and
    student alike.

    Args:
        params: float params, or the stored form.
        policy: the stored form's policy, for its widths; without one int4 counts 4 bits.
    """
    total = 0.0
    for path, leaf in walk(params):
        weight = path.removesuffix("_q")
        bits = 16
        if weight != path:
            spec = policy.spec(weight) if policy else None
            bits = spec.bits if spec else (4 if leaf.dtype == jnp.int4 else 8)
        total += float(np.prod(leaf.shape)) * bits / 8
    return int(total)
