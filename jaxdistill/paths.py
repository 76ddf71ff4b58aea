"""Paths of the leaves of any pytree, and selections of leaves by path.

A path joins the keys of a leaf by ``/``: ``layers/self_attn/v_proj/kernel``. Dicts, tuples,
dataclasses and ``nnx.State`` work alike. A box around one array (``nnx.Param``,
``nn.Partitioned``) adds nothing to the path.

The layers of a model are stacked on a leading axis under a node ``layers``, or they are the
children of that node, ``layers/0/...``. In a pattern ``layers[0-3]`` names layers by number and
means the same layers in both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.errors import UserError

Keys = tuple[Any, ...]
Params = Any  # any pytree
# True: the whole leaf. A tuple of bools: these layers of a stacked leaf.
Part = bool | tuple[bool, ...]
# A word, one or several patterns, (path, leaf) -> bool, or a tree of bools like the params.
Selection = Any

OV_PATTERN = r"/(v|o)_proj/kernel"  # the kernels, and where their ranges are learned these too
# Everything but learned ranges.
WEIGHTS_PATTERN = r"^(?!(.*/)?(kernel|embedding)_(step|min|max)$)"
WORDS: dict[str, tuple[str, ...]] = {"ov": (OV_PATTERN,), "none": (), "weights": (WEIGHTS_PATTERN,)}

_DATA = re.compile(r"(^|/)(kernel|embedding)_(q|scale|zero|lora_scale)$")
_STACK = re.compile(r"(^|/)layers/(?!\d+(/|$))")
_NUMBERS = re.compile(r"layers\[([\d,\- ]*)\]")
_RANGE = re.compile(r"^(\d+)(?:-(\d+))?$")


def path_of(keys: Keys) -> str:
    """Join the keys of a leaf: ``layers/0/mlp/up_proj/kernel``."""
    boxed = len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(keys[:-1] if boxed else keys, simple=True, separator="/")


def walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of each leaf."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield path_of(keys), leaf


def node_at(tree: Any, path: str) -> Any:
    """Return the sub-tree at a path through dicts, tuples and attributes."""
    for name in path.split("/") if path else ():
        if isinstance(tree, Sequence):
            tree = tree[int(name)]
        elif isinstance(tree, Mapping):
            tree = tree[name if name in tree else int(name)]
        else:
            tree = getattr(tree, name)
    return tree


def is_stacked(path: str) -> bool:
    """Return whether a leaf has one entry for each layer on its first axis.

    >>> is_stacked("layers/mlp/up_proj/kernel"), is_stacked("layers/3/mlp/up_proj/kernel")
    (True, False)
    """
    return bool(_STACK.search(path))


def is_data(path: str, leaf: Any) -> bool:
    """Return whether no optimizer may move a leaf: fixed scales, stored integers, other types.

    Learned ranges have names of their own (``kernel_step``, ``kernel_min``, ``kernel_max``).
    """
    kind = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return bool(_DATA.search(path)) or not jnp.issubdtype(kind, jnp.inexact)


def is_hidden(node: Any) -> bool:
    """Return whether a node marks where a leaf was taken out of the tree."""
    return isinstance(node, optax.MaskedNode)


def patterns_of(selection: str | Sequence[str], name: str = "freeze pattern") -> list[str]:
    """Return the patterns that words and patterns mean.

    The words are ``ov`` (the v and o projections), ``weights`` (all but learned ranges, for
    scale-only training) and ``none``. Anything else is a regular expression over paths.

    >>> patterns_of("mlp"), patterns_of("none")
    (['mlp'], [])

    Args:
        selection: a word, a pattern, or several.
        name: what the user calls it, for the error: ``--freeze``.

    Raises:
        UserError: ``auto``, which is not a pattern, or an entry that is not a regular expression.
    """
    entries = [selection] if isinstance(selection, str) else list(selection)
    patterns = [pattern for entry in entries for pattern in WORDS.get(entry, (entry,))]
    for pattern in patterns:
        _Rule.of(pattern, name)
    return patterns


def whole_patterns(patterns: Sequence[str], layers: int) -> list[str]:
    """Return the patterns that cover whole stacked leaves of a model of so many layers.

    ``layers[0-3]/...`` of a deeper model is left out: it freezes a part of each leaf, whose weight
    gradients are computed all the same.
    """
    rules = [_Rule.of(pattern) for pattern in patterns]
    return [
        _NUMBERS.sub("layers", rule.pattern)
        for rule in rules
        if not rule.numbers or rule.numbers >= set(range(layers))
    ]


def select(tree: Any, selection: Selection) -> dict[Keys, Part]:
    """Return the leaves, or the layers of stacked leaves, that a selection names.

    Places that an optax wrapper masked out (``optax.MaskedNode``) count as matched by a pattern,
    but are never in the result.

    Raises:
        UserError: a pattern or the function selects nothing, a layer does not exist, the function
            or the mask holds something other than bools, or the mask is of another structure.
    """
    check_selection(selection)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hidden)
    if callable(selection):
        parts = {k: _answer(selection, path_of(k), x) for k, x in leaves if not is_hidden(x)}
        if leaves and not any(parts.values()) and not any(is_hidden(x) for _, x in leaves):
            raise UserError(
                f"the freeze function selects no parameter; paths look like {path_of(leaves[0][0])}"
            )
        return {keys: part for keys, part in parts.items() if part}
    if not _is_patterns(selection):
        return _masked(tree, selection, leaves)
    parts: dict[Keys, Part] = {}
    depth = _depth(leaves)
    for pattern in patterns_of(selection):
        rule, matched = _Rule.of(pattern), False
        if depth and max(rule.numbers, default=0) >= depth:
            raise UserError(
                f"freeze pattern {pattern!r} names layer {max(rule.numbers)}; accepted: 0 to "
                f"{depth - 1}"
            )
        for keys, leaf in leaves:
            part = rule.part(path_of(keys), leaf)
            matched |= bool(part)
            if part and not is_hidden(leaf):
                parts[keys] = union(parts.get(keys, False), part)
        if not matched:
            where = path_of(leaves[0][0]) if leaves else "nothing"
            raise UserError(
                f"freeze pattern {pattern!r} matches no parameter; paths look like {where}"
            )
    return parts


def check_selection(selection: Selection) -> None:
    """Raise ``UserError`` unless a selection is of an accepted type and its patterns compile."""
    if callable(selection):
        with contextlib.suppress(ValueError):  # a builtin without a signature
            try:
                inspect.signature(selection).bind("path", None)
            except TypeError:
                raise UserError(
                    "a freeze function that does not take 2 arguments given; accepted: "
                    "(path, leaf) -> bool"
                ) from None
        return
    if _is_patterns(selection):
        patterns_of(selection)
        return
    leaves = jax.tree.leaves(selection)
    wrong = next((x for x in leaves if not _is_mask_leaf(x)), None)
    if wrong is not None or not leaves:
        kind = type(selection if wrong is None else wrong).__name__
        raise UserError(
            f"a freeze of type {kind} given; accepted: a pattern such as 'mlp', a list of them, "
            "ov, none, weights, a function (path, leaf) -> bool, or a tree of bools like the params"
        )


def mask_of(tree: Any, parts: Mapping[Keys, Part]) -> Any:
    """Return a tree of bools (a vector of bools, one a layer, where a part of a leaf is meant)."""

    def entry(keys: Keys, _: Any) -> Any:
        part = parts.get(keys, False)
        return part if isinstance(part, bool) else np.array(part)

    return jax.tree_util.tree_map_with_path(entry, tree)


def union(a: Part, b: Part) -> Part:
    """Return what either part covers."""
    if isinstance(a, bool) or isinstance(b, bool):
        return b if a is False else (a if b is False else True)
    return _simplified(tuple(x or y for x, y in zip(a, b, strict=True)))


def intersection(a: Part, b: Part) -> Part:
    """Return what both parts cover."""
    if isinstance(a, bool) or isinstance(b, bool):
        return b if a is True else (a if b is True else False)
    return _simplified(tuple(x and y for x, y in zip(a, b, strict=True)))


def along(part: tuple[bool, ...], leaf: Any) -> Any:
    """Return the layers of a part as bools that broadcast against a stacked leaf."""
    flags = jnp.asarray(part).reshape(-1, *(1,) * (len(leaf.shape) - 1))
    return jnp.broadcast_to(flags, leaf.shape)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """One pattern, and the layers that it names (none: it is matched against the path itself)."""

    pattern: str
    regex: re.Pattern[str]
    numbers: frozenset[int]

    @classmethod
    def of(cls, pattern: Any, name: str = "freeze pattern") -> _Rule:
        if not isinstance(pattern, str) or pattern in ("", "auto"):
            raise UserError(
                f"{name} {pattern!r} given; accepted: ov, none, weights, or a regular "
                "expression over paths such as layers/self_attn/v_proj/kernel"
            )
        numbers: set[int] = set()

        def alternatives(match: re.Match[str]) -> str:
            layers = _layers(match[1], f"{name} {pattern!r}")
            numbers.update(layers)
            return rf"layers/(?:{'|'.join(map(str, layers))})(?=/|$)"

        try:
            regex = re.compile(_NUMBERS.sub(alternatives, pattern))
        except re.error as e:
            raise UserError(f"{name} {pattern!r} is not a regular expression: {e}") from None
        return cls(pattern, regex, frozenset(numbers))

    def part(self, path: str, leaf: Any) -> Part:
        """Return what the pattern covers of the leaf at a path."""
        if not self.numbers or not is_stacked(path):
            return bool(self.regex.search(path))
        names = {i: _STACK.sub(rf"\g<1>layers/{i}/", path) for i in self.numbers}
        layers = {i for i, name in names.items() if self.regex.search(name)}
        if is_hidden(leaf):
            return bool(layers)
        return _simplified(tuple(i in layers for i in range(leaf.shape[0])))


def _layers(text: str, where: str) -> list[int]:
    """Read ``0-3,7``."""
    ranges = [_RANGE.match(part.strip()) for part in text.split(",")]
    ends = [(int(m[1]), int(m[2] or m[1])) for m in ranges if m]
    if len(ends) < len(ranges) or any(first > last for first, last in ends):
        raise UserError(
            f"layers[{text}] in the {where} given; accepted: numbers and ranges such as "
            "layers[0-3,7]"
        )
    return sorted({i for first, last in ends for i in range(first, last + 1)})


def _simplified(part: tuple[bool, ...]) -> Part:
    return part[0] if len(set(part)) == 1 else part


def _depth(leaves: Sequence[tuple[Keys, Any]]) -> int:
    """Return the number of layers of a tree, 0 where it has none."""
    counts = [0]
    for keys, leaf in leaves:
        path = path_of(keys)
        counts += [int(i) + 1 for i in re.findall(r"(?:^|/)layers/(\d+)(?=/|$)", path)]
        if is_stacked(path) and not is_hidden(leaf) and len(leaf.shape):
            counts.append(leaf.shape[0])
    return max(counts)


def _is_patterns(selection: Any) -> TypeGuard[str | Sequence[str]]:
    if isinstance(selection, str):
        return True
    return isinstance(selection, (list, tuple)) and all(isinstance(x, str) for x in selection)


def _is_mask_leaf(x: Any) -> bool:
    return isinstance(x, bool) or getattr(x, "dtype", None) == np.bool_


def _part_of(flags: Any, path: str, leaf: Any) -> Part:
    """Return a bool, or one bool a layer, as a part; raise ``UserError`` for anything else."""
    if _is_mask_leaf(flags) and np.ndim(flags) == 0:
        return bool(flags)
    if _is_mask_leaf(flags) and is_stacked(path) and np.shape(flags) == np.shape(leaf)[:1]:
        return _simplified(tuple(bool(x) for x in np.asarray(flags)))
    raise UserError(
        f"the freeze says {flags!r} of {path}; accepted: True, False, or a bool for each layer of "
        "a stacked parameter"
    )


def _answer(function: Callable[[str, Any], Any], path: str, leaf: Any) -> Part:
    try:
        flags = function(path, leaf)
    except jax.errors.ConcretizationTypeError:
        raise UserError(
            f"the freeze function looks at the values of {path}; accepted: a function of the path, "
            "the shape and the type"
        ) from None
    return _part_of(flags, path, leaf)


def _masked(tree: Any, mask: Any, leaves: Sequence[tuple[Keys, Any]]) -> dict[Keys, Part]:
    try:
        flags = jax.tree.broadcast(mask, tree, is_leaf=is_hidden)
        flags = jax.tree.leaves(flags, is_leaf=is_hidden)
    except ValueError as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"the freeze mask is not shaped like the params: {reason}") from None
    parts = {
        keys: _part_of(flag, path_of(keys), leaf)
        for (keys, leaf), flag in zip(leaves, flags, strict=True)
        if not is_hidden(leaf)
    }
    return {keys: part for keys, part in parts.items() if part}
