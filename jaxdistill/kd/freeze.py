"""ov-freeze and any other freeze, as an optax transformation ("Oh! We Freeze", arXiv 2403.18159).

In 4-bit quantization-aware distillation the output and value projections of self-attention carry
the largest gradients and drift from the float model. ov-freeze snaps both onto their lattice after
post-training quantization and trains everything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdistill.errors import UserError

Params = dict[str, Any]
OV_PATTERN = r"/(v|o)_proj/kernel"  # the kernels, and where their ranges are learned these too
WEIGHTS_PATTERN = r"/(kernel|embedding|weight|bias)$"  # all but learned ranges


class FreezeTransformation(optax.GradientTransformationExtraArgs):
    """An optimizer that knows its freeze mask, so that the step need not compute what it drops."""

    freeze_mask: Callable[[Params], Params]


def _path(keys: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(k, "key", k)) for k in keys)


def freeze_mask(params: Params, patterns: Sequence[str] = ()) -> Params:
    """Return a tree of bools, True where a leaf is frozen.

    A leaf is frozen where its path (``layers/self_attn/v_proj/kernel``) matches a pattern, and
    always where it is of float16 or integers: fixed scales and stored weights are data, and no
    optimizer may move them.

    Raises:
        UserError: a pattern is no regular expression, or matches no parameter.
    """
    try:
        matchers = [re.compile(p) for p in patterns]
    except re.error as e:
        raise UserError(f"{list(patterns)} is not a list of regular expressions: {e}") from None
    paths = [_path(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern, matcher in zip(patterns, matchers, strict=True):
        if not any(matcher.search(path) for path in paths):
            raise UserError(
                f"freeze pattern {pattern!r} matches no parameter; paths look like {paths[0]}"
            )

    def frozen(keys: tuple[Any, ...], leaf: Any) -> bool:
        data = leaf.dtype == jnp.float16 or not jnp.issubdtype(leaf.dtype, jnp.floating)
        return data or any(m.search(_path(keys)) for m in matchers)

    return jax.tree_util.tree_map_with_path(frozen, params)


def freeze(tx: optax.GradientTransformation, patterns: Sequence[str] = ()) -> FreezeTransformation:
    """Wrap an optimizer so that it neither moves nor keeps state for the matched parameters.

    The frozen leaves get zero updates (no weight decay either) and no optimizer state, and do not
    count in the inner optimizer's global norm. ``kd.step.make_step`` also leaves their gradients
    out of the compiled step.
    """

    def mask(params: Params) -> Params:
        return freeze_mask(params, patterns)

    def routed(params: Params) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(
            optax.selective_transform(tx, freeze_mask=mask(params))
        )

    def init(params: Any) -> Any:  # Any: optax's own trees are wider than a dict
        return routed(params).init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any):
        return routed(updates if params is None else params).update(updates, state, params, **extra)

    frozen = FreezeTransformation(init, update)
    frozen.freeze_mask = mask
    return frozen


def ov_freeze(tx: optax.GradientTransformation) -> FreezeTransformation:
    """Freeze every layer's ``v_proj`` and ``o_proj`` kernels (arXiv 2403.18159, section 3).

    Snap them first: ``params = snap(params, policy, OV_PATTERN)``.
    """
    return freeze(tx, [OV_PATTERN])


def freeze_patterns(freeze: str) -> list[str]:
    """Read the user's word: ``ov``, ``none``, ``weights``, or a regex over parameter paths.

    ``weights`` leaves the learned ranges alone to be trained (scale-only training).
    """
    return {"ov": [OV_PATTERN], "none": [], "weights": [WEIGHTS_PATTERN]}.get(freeze, [freeze])


class Phase(NamedTuple):
    """Say what is frozen from step ``start`` to step ``stop``."""

    start: int
    stop: int
    patterns: list[str]


def freeze_phases(patterns: list[str], steps: int, start: int = 0, stop: int = 0) -> list[Phase]:
    """Cut a run into phases: frozen from ``start`` to ``stop`` (0: to the end), free elsewhere.

    Raises:
        UserError: the window lies outside of the run, or holds no step.
    """
    end = stop or steps
    if not 0 <= start < end <= steps and patterns and steps:
        raise UserError(
            f"a freeze from step {start} to {end} of {steps} given; accepted: "
            "0 <= start < stop <= steps"
        )
    cut = [(0, start, []), (start, end, patterns), (end, steps, [])] if patterns else []
    return [Phase(*p) for p in cut or [(0, steps, [])] if p[0] < p[1]]


def migrate(opt_state: Any, tx: optax.GradientTransformation, params: Params) -> Any:
    """Carry an optimizer's state over to another freeze mask of the same optimizer.

    Leaves that both states have are kept, counts included; newly released parameters start from
    zero moments, newly frozen ones lose theirs.

    Args:
        opt_state: the state under the mask so far.
        tx: the optimizer under the mask to come.
        params: the parameters.
    """
    kept = dict(jax.tree_util.tree_leaves_with_path(opt_state))
    return jax.tree_util.tree_map_with_path(
        lambda place, fresh: kept.get(place, fresh), tx.init(params)
    )


def partition(params: Params, mask: Params) -> tuple[Params, Params]:
    """Split a tree into (trainable, frozen); each holds None in the other's places."""
    trainable = jax.tree.map(lambda leaf, f: None if f else leaf, params, mask)
    frozen = jax.tree.map(lambda leaf, f: leaf if f else None, params, mask)
    return trainable, frozen


def combine(trainable: Params, frozen: Params) -> Params:
    """Undo ``partition``."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
    )


def zeros_for_frozen(gradients: Params, params: Params) -> Params:
    """Fill the frozen places of a partitioned gradient with zeros (dead code once compiled)."""
    return combine(gradients, jax.tree.map(jnp.zeros_like, params))
