"""ov-freeze and any other freeze, as an optax transformation ("Oh! We Freeze", arXiv 2403.18159).

In 4-bit quantization-aware distillation the output and value projections of self-attention carry
the largest gradients and drift from the float model. ov-freeze snaps both onto their lattice after
post-training quantization and trains everything else.

A freeze notes in its optimizer state what it froze. Every optax wrapper keeps that note, so
``make_step`` finds it anywhere: ``optax.chain(clip, freeze(tx, "ov"))``, ``optax.MultiSteps``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdistill.errors import UserError
from jaxdistill.paths import (
    Keys,
    Params,
    Part,
    Selection,
    along,
    check_selection,
    is_data,
    is_hidden,
    mask_of,
    path_of,
    select,
    union,
)

Parts = Mapping[Keys, Part]
Optimizer = optax.GradientTransformation | optax.MultiSteps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FreezeState:
    """The inner optimizer's state, and a static note of the frozen leaves.

    Attributes:
        inner_state: the state of the optimizer that ``freeze`` wraps.
        frozen: the keys of each frozen leaf, and True or the frozen layers of a stacked leaf.
    """

    inner_state: Any
    frozen: tuple[tuple[Keys, Part], ...] = dataclasses.field(metadata={"static": True})


def freeze_mask(params: Params, what: Selection = ()) -> Params:
    """Return a tree of bools, True where a leaf is frozen: an optax mask.

    A leaf is frozen where ``what`` names it (see ``freeze``), and always where it is data: fixed
    scales and stored integers, known by their names, and leaves that are not floats. Where only
    some layers of a stacked leaf are frozen, the mask has a vector of bools, one for each layer.

    Raises:
        UserError: a pattern is not a regular expression or matches no parameter.
    """
    return mask_of(params, select(params, what) | _data(params))


def freeze(tx: Optimizer, what: Selection = ()) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it neither moves nor keeps state for some parameters.

    Frozen leaves get zero updates (no weight decay either) and no optimizer state, and do not count
    in the inner optimizer's global norm. ``kd.step.make_step`` finds the freeze inside any optax
    wrapper and does not compute the frozen weight gradients at all, so that a clip outside of the
    freeze does not count them either.

    A pattern such as ``layers[0-3]/self_attn/v_proj`` freezes these layers only, of layers stacked
    in one array as of a tuple of layers. Of a stacked array the frozen layers have zero gradients
    and zero updates and their moments stay zero. Work and optimizer state are saved only where a
    whole leaf is frozen.

    Args:
        tx: the optimizer.
        what: one of the words ``ov``, ``weights`` (all but learned ranges) and ``none``; a regular
            expression over paths such as ``layers/self_attn/v_proj/kernel``; a list of these; a
            function ``(path, leaf) -> bool``; or a tree of bools like the params (or a prefix of
            it), True where frozen.

    Raises:
        UserError: ``what`` is none of these; later, when the parameters are known: it matches
            nothing, or it freezes every float parameter.

    >>> params = {"mlp": {"kernel": jnp.ones(2)}, "norm": {"weight": jnp.ones(2)}}
    >>> tx = freeze(optax.sgd(1.0), "mlp")
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(updates["mlp"]["kernel"], updates["norm"]["weight"])
    [0. 0.] [-1. -1.]
    """
    check_selection(what)
    inner = with_extra_args(tx)

    def init(params: Any) -> Any:  # optax's own trees are wider than a dict
        parts = select(params, what) | _data(params)
        if not any(is_hidden(x) for x in jax.tree.leaves(params, is_leaf=is_hidden)):
            _check_trainable(params, parts)  # of a part of the tree, make_step judges the whole
        return FreezeState(inner.init(hide(params, parts)), tuple(parts.items()))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        parts = dict(state.frozen)
        hidden = None if params is None else hide(params, parts)
        if "grad" in extra:
            extra["grad"] = still(hide(extra["grad"], parts), parts)
        if "value_fn" in extra and params is not None:
            value_fn = extra["value_fn"]
            extra["value_fn"] = lambda p, **rest: value_fn(combine(p, params), **rest)
        new, inner_state = inner.update(
            still(hide(updates, parts), parts), state.inner_state, hidden, **extra
        )
        zeros = jax.tree.map(jnp.zeros_like, updates)
        return combine(still(new, parts), zeros), FreezeState(inner_state, state.frozen)

    return optax.GradientTransformationExtraArgs(init, update)


def ov_freeze(tx: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Freeze every layer's ``v_proj`` and ``o_proj`` kernels (arXiv 2403.18159, section 3).

    Snap them first: ``params = snap(params, policy, "ov")``.
    """
    return freeze(tx, "ov")


def with_extra_args(tx: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer that takes ``value``, ``grad`` and ``value_fn``, used or not."""
    if isinstance(tx, optax.MultiSteps):
        update: Any = tx.update  # it passes extra arguments on, and its type does not say so
        return optax.GradientTransformationExtraArgs(tx.init, update)
    return optax.with_extra_args_support(tx)


def frozen_parts(tx: Optimizer, params: Params) -> dict[Keys, Part]:
    """Return what a step must not train: data leaves, and what any freeze inside ``tx`` froze.

    Computes nothing: the notes are read from the shape of the optimizer's state.

    Raises:
        UserError: nothing is left to train.
    """
    parts = _data(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    others = {k: True for k, x in leaves if not jnp.issubdtype(jnp.result_type(x), jnp.inexact)}
    state = jax.eval_shape(tx.init, hide(params, others))
    for note in _notes(state):
        for keys, part in note.frozen:
            parts[keys] = union(parts.get(keys, False), part)
    _check_trainable(params, parts)
    return parts


def init_optimizer(tx: Optimizer, params: Params) -> Any:
    """Return the optimizer's state for the trainable leaves of ``params``.

    No array is in it twice or is one of the params, because a step donates both.
    """
    seen = {id(x) for x in jax.tree.leaves(params)}

    def own(x: Any) -> Any:
        x = jnp.array(x) if id(x) in seen else x
        seen.add(id(x))
        return x

    return jax.tree.map(own, tx.init(hide(params, frozen_parts(tx, params))))


def hide(tree: Any, parts: Parts) -> Any:
    """Take the wholly frozen leaves out of a tree; ``optax.MaskedNode`` marks their places."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: optax.MaskedNode() if parts.get(keys) is True else x, tree
    )


def still(tree: Any, parts: Parts) -> Any:
    """Set the frozen layers of stacked leaves to zero."""

    def zeroed(keys: Keys, x: Any) -> Any:
        part = parts.get(keys, False)
        return x if isinstance(part, bool) else jnp.where(along(part, x), jnp.zeros_like(x), x)

    return jax.tree_util.tree_map_with_path(zeroed, tree)


def partition(params: Params, parts: Parts) -> tuple[Params, Params]:
    """Split a tree into (trainable, frozen); each has ``optax.MaskedNode`` for the other's leaves.

    A leaf with only some layers frozen is on the trainable side.
    """
    frozen = jax.tree_util.tree_map_with_path(
        lambda keys, x: x if parts.get(keys) is True else optax.MaskedNode(), params
    )
    return hide(params, parts), frozen


def combine(trainable: Params, frozen: Params) -> Params:
    """Undo ``partition``."""
    return jax.tree.map(lambda a, b: b if is_hidden(a) else a, trainable, frozen, is_leaf=is_hidden)


class Phase(NamedTuple):
    """The patterns frozen from step ``start`` to step ``stop``."""

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


def migrate(opt_state: Any, tx: Optimizer, params: Params) -> Any:
    """Carry an optimizer's state over to another freeze of the same optimizer.

    Leaves that both states have are kept, counts included. Newly released parameters start from
    zero moments, newly frozen ones lose theirs, also where they are single layers of a leaf.

    Args:
        opt_state: the state under the freeze so far.
        tx: the optimizer under the freeze to come.
        params: the parameters.
    """
    kept = dict(jax.tree_util.tree_leaves_with_path(opt_state))
    layers = {k: p for k, p in frozen_parts(tx, params).items() if not isinstance(p, bool)}

    def carried(place: Keys, fresh: Any) -> Any:
        old = kept.get(place, fresh)
        part = next((p for keys, p in layers.items() if place[-len(keys) :] == keys), None)
        if part is None or jnp.shape(old)[:1] != (len(part),):
            return old
        return jnp.where(along(part, old), fresh, old)

    return jax.tree_util.tree_map_with_path(carried, init_optimizer(tx, params))


def _data(params: Any) -> dict[Keys, Part]:
    """Return the leaves that are never trained, see ``paths.is_data``."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {keys: True for keys, leaf in leaves if is_data(path_of(keys), leaf)}


def _notes(state: Any) -> list[FreezeState]:
    """Return the freezes in an optimizer's state, those inside of others too."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, FreezeState))
    notes = [x for x in nodes if isinstance(x, FreezeState)]
    return notes + [inner for note in notes for inner in _notes(note.inner_state)]


def _check_trainable(params: Any, parts: Parts) -> None:
    if jax.tree.leaves(hide(params, parts)):
        return
    leaves = jax.tree.leaves(params)
    raise UserError(
        f"the freeze covers all {len(leaves)} parameters, nothing is left to train; accepted: a "
        "freeze that leaves at least one float parameter free"
    )
