"""What orbax needs to store arrays under any path, and to prove that it did."""

from __future__ import annotations

import functools
import glob
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from jaxdistill.errors import UserError

_GROUP_BYTES = 2**30  # read back at once


@functools.cache
def prepare_orbax() -> None:
    """Mend what orbax logs, and how it globs; call this before using it.

    Errors arrive as exceptions, so its log lines are repetitions. Its ``path.glob(pattern)`` also
    reads ``[``, ``*`` and ``?`` in the path itself as wildcards: under ``runs/a[1]`` it would find
    no arrays to merge, and save nothing.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _ignore_late_writes()
    kind: Any = type(epath.Path("/"))
    original = kind.glob

    def literal_glob(self: Any, pattern: str) -> Iterator[Any]:
        path = os.fspath(self)
        return original(self if "://" in path else kind(glob.escape(path)), pattern)

    kind.glob = literal_glob


def _ignore_late_writes() -> None:
    """Silence writes that end late: when one fails, orbax closes the loop of all others."""
    original = sys.unraisablehook

    def hook(what: Any) -> None:
        late = isinstance(what.exc_value, RuntimeError) and "loop is closed" in str(what.exc_value)
        if not late:
            original(what)

    sys.unraisablehook = hook


def check_array_path(path: Path) -> None:
    r"""Raise ``UserError`` where arrays cannot be stored under a path.

    Tensorstore takes ``\`` for ``/``, and a name that ends in ``:`` for the scheme of a URL.
    """
    full = str(path.absolute())
    if "\\" in full or ":/" in full + "/":
        raise UserError(
            rf"{full!r} given to write arrays to; accepted: a path without \ and with no name that "
            "ends in a colon"
        )


def read_back(load: Callable[[Any], Any], tree: Any) -> str | None:
    """Compare stored arrays with those in memory; return the first difference, None for equality.

    Args:
        load: restores an abstract tree, some of whose leaves are ``ocp.PLACEHOLDER``.
        tree: the arrays that were stored. About a GiB of them is read at a time.
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in pairs]
    leaves = [leaf for _, leaf in pairs]
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for group in _groups([x.nbytes for x in leaves]):
        abstract = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", here))
            if i in group
            else ocp.PLACEHOLDER
            for i, x in enumerate(leaves)
        ]
        try:
            stored = jax.tree.leaves(load(jax.tree.unflatten(structure, abstract)))
        except Exception as e:  # orbax and tensorstore raise many kinds
            return (str(e).strip().splitlines() or [type(e).__name__])[0][:160]
        for i in group:
            if not _equal(stored[i], leaves[i]):
                return f"{names[i]} has other values"
    return None


def _groups(sizes: list[int]) -> Iterator[range]:
    """Cut a list into runs of at most a GiB, or of one element."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > _GROUP_BYTES:
            yield range(start, i)
            start, total = i, 0
        total += size
    yield range(start, len(sizes))


@jax.jit
def _equal(a: jax.Array, b: jax.Array) -> jax.Array:
    """Compare two arrays of one type; NaN equals NaN."""
    return jnp.all((a == b) | ((a != a) & (b != b)))
