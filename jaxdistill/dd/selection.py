"""Selection of real examples: the baseline of every synthetic set, at an equal number.

A *pick* is ``(features of one group [N, F], count, seed) -> indices [count]``, in the order of
choice; ``select`` runs one over groups and their quotas. Pure, and deterministic given the seed.
Ties go to the lower index.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp

from jaxdistill.dd.classification import ClassifierFn, label_probs
from jaxdistill.errors import UserError

Pick = Callable[[Any, int, int], np.ndarray]


def _rows(features: Any) -> np.ndarray:
    rows = np.asarray(features, np.float64)
    return rows.reshape(len(rows), -1)


def random_selection(features: Any, count: int, seed: int) -> Int[np.ndarray, "n"]:
    """Pick at random, without replacement."""
    return np.random.default_rng(seed).permutation(len(features))[:count]


def herding(features: Any, count: int, seed: int = 0) -> Int[np.ndarray, "n"]:
    """Pick greedily what brings the mean of the picked nearest the mean of all.

    ``x_t = argmin_x ||t * mean - sum_{s<t} x_s - x||`` over what is left: for features of unit
    norm the herding of Welling 2009; in this form iCaRL's (arXiv 1611.07725). The seed is unused.
    """
    rows = _rows(features)
    half_norms, mean = np.sum(rows**2, axis=1) / 2, rows.mean(axis=0)
    wanted, left = np.zeros_like(mean), np.ones(len(rows), bool)
    picked = np.empty(count, np.int64)
    for t in range(count):
        wanted += mean
        picked[t] = np.argmin(np.where(left, half_norms - rows @ wanted, np.inf))
        wanted -= rows[picked[t]]
        left[picked[t]] = False
    return picked


def k_center(features: Any, count: int, seed: int = 0) -> Int[np.ndarray, "n"]:
    """Pick the example farthest from all picked ones, beginning nearest the mean.

    The greedy 2-approximation of k-center (Sener and Savarese, arXiv 1708.00489), in
    ``O(count * N * F)``. The seed is unused.
    """
    rows = _rows(features)
    nearest = np.full(len(rows), np.inf)
    picked = np.empty(count, np.int64)
    for t in range(count):
        if t == 0:
            picked[t] = np.argmin(np.sum((rows - rows.mean(axis=0)) ** 2, axis=1))
        else:
            picked[t] = np.argmax(nearest)
        nearest = np.minimum(nearest, np.sum((rows - rows[picked[t]]) ** 2, axis=1))
        nearest[picked[t]] = -np.inf
    return picked


def by_score(scores: Any, count: int, seed: int = 0, *, largest: bool = True) -> np.ndarray:
    """Pick the largest (or smallest) of scores ``[N]``, which take the place of features."""
    scores = np.asarray(scores, np.float64)
    return np.argsort(-scores if largest else scores, kind="stable")[:count]


PICKS: dict[str, Pick] = {
    "random": random_selection,
    "herding": herding,
    "k-center": k_center,
    "hardest": by_score,
    "easiest": functools.partial(by_score, largest=False),
}


def el2n_scores(
    apply: ClassifierFn, params_of_seeds: Any, batch: dict[str, Any]
) -> Float[Array, "B"]:
    """Score how hard each example is: ``mean over networks of ||softmax(logits) - label||``.

    EL2N of Paul et al., arXiv 2107.07075, for networks early in their training.

    Args:
        apply: ``(params, inputs) -> logits``.
        params_of_seeds: parameters of several networks, stacked along a leading axis.
        batch: ``inputs`` and ``labels`` (or ``label_logits``).
    """

    def one(params: Any) -> Array:
        logits = apply(params, batch["inputs"])
        error = jax.nn.softmax(logits, axis=-1) - label_probs(batch, logits.shape[-1])
        return jnp.linalg.norm(error, axis=-1)

    return jnp.mean(jax.vmap(one)(params_of_seeds), axis=0)


def meta_gradient_scores(value: Callable[[Array], Array], examples: int) -> Float[Array, "N"]:
    """Score how much more weight on each example would lower a loss after training.

    ``score_i = -d value(w) / d w_i at w = 1``.

    Args:
        value: ``weights [N] -> loss on other data of the network trained with these weights``; an
            unrolled training run.
        examples: N.
    """
    return -jax.grad(value)(jnp.ones(examples))


def quota_per_class(labels: Any, count: int) -> dict[int, int]:
    """Return the quotas that ask for ``count`` examples of every class among ``labels``."""
    return {int(label): count for label in np.unique(np.asarray(labels))}


def quotas_with_slices(
    labels: Any,
    slices: Mapping[str, Any],
    per_class: int,
    per_slice: int,
    names: Sequence[str] | None = None,
) -> tuple[np.ndarray, dict[str, int]]:
    """Share every class's quota among its slices so that no named slice falls short.

    Examples of one class in the same slices are a group. A group's quota is its share of the
    class, changed as little as leaves no slice short (an integer programme, solved exactly). Every
    class keeps ``per_class``.

    Args:
        labels: classes ``[N]``.
        slices: masks ``[N]`` by name; they may overlap and cross classes.
        per_class: examples of each class.
        per_slice: examples of each slice, at least.
        names: the classes' names by number, for errors.

    Returns:
        The group of every example, text, and the quotas: what ``select`` takes.

    Raises:
        UserError: a class or a slice has too few examples, or the budget cannot hold them.
    """
    labels = np.asarray(labels)
    masks = {name: np.asarray(mask, bool) for name, mask in slices.items()}
    for name, mask in masks.items():
        if mask.shape != labels.shape:
            raise UserError(
                f"slice '{name}' has shape {list(mask.shape)} for {len(labels)} examples: give "
                "True or False for each"
            )
        if mask.sum() < per_slice:
            raise _too_few(f"slice '{name}'", int(mask.sum()), per_slice)
    digits = len(str(labels.max()))
    keys = np.array([f"class {label:0{digits}d}" for label in labels], object)
    for name, mask in masks.items():
        keys[mask] += f" + {name}"
    groups, first, of, sizes = np.unique(
        keys.astype(str), return_index=True, return_inverse=True, return_counts=True
    )
    class_of = labels[first]
    member = np.array([mask[first] for mask in masks.values()], int).reshape(-1, len(groups))
    shares = np.zeros(len(groups), int)
    for label in np.unique(labels):
        mine = np.flatnonzero(class_of == label)
        if sizes[mine].sum() < per_class:
            raise _too_few(_group_name(int(label), names), int(sizes[mine].sum()), per_class)
        exact = per_class * sizes[mine] / sizes[mine].sum()
        shares[mine] = exact.astype(int)
        rest = per_class - shares[mine].sum()
        shares[mine[np.argsort(shares[mine] - exact, kind="stable")[:rest]]] += 1
    in_class = (class_of[None] == np.unique(labels)[:, None]).astype(int)
    moves = _least_moves(shares, sizes, in_class, member, per_slice - member @ shares)
    if moves is None:
        raise UserError(
            f"{per_class} examples a class cannot hold {per_slice} of each of the slices "
            f"{', '.join(masks)}: raise the number per class or lower the number per slice"
        )
    quotas = zip(groups, shares + moves, strict=True)
    return groups[of], {str(group): int(n) for group, n in quotas if n}


def _least_moves(
    shares: np.ndarray,
    sizes: np.ndarray,
    in_class: np.ndarray,
    member: np.ndarray,
    short: np.ndarray,
) -> np.ndarray | None:
    """Return the least change of the shares that leaves no slice short, None where there is none.

    Minimizes ``sum |moves|`` over integers, with ``in_class @ moves == 0``, ``member @ moves >=
    short`` and ``0 <= shares + moves <= sizes``; moves are ``up - down``.
    """
    if (short <= 0).all():
        return np.zeros_like(shares)
    rows = np.vstack([in_class, member])
    # SciPy's own annotations of these bounds name floats alone.
    low: Any = np.concatenate([np.zeros(len(in_class)), short])
    high: Any = np.concatenate([np.zeros(len(in_class)), np.full(len(short), np.inf)])
    most: Any = np.concatenate([sizes - shares, shares])
    found = milp(
        np.ones(2 * len(shares)),
        integrality=np.ones(2 * len(shares)),
        bounds=Bounds(0, most),
        constraints=LinearConstraint(np.hstack([rows, -rows]), low, high),
    )
    if found.x is None:
        return None
    up, down = np.split(np.rint(found.x).astype(int), 2)
    return up - down


def _group_name(group: Any, names: Sequence[str] | None) -> str:
    """Return what an error calls a group: a text is its own name, a class has a number."""
    if isinstance(group, str):
        return group
    return f"class {group if names is None else repr(names[group])}"


def _too_few(what: str, there: int, wanted: int) -> UserError:
    return UserError(
        f"{what} has {there} examples and its quota is {wanted}: lower the quota or add data"
    )


def select(
    method: str | Pick,
    features: Any,
    groups: Any,
    quotas: Mapping[Any, int],
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> Int[np.ndarray, "n"]:
    """Pick ``quotas[g]`` examples of every group ``g``.

    Args:
        method: a name in ``PICKS``, or a pick.
        features: ``[N, ...]``, numpy or jax; scores ``[N]`` for ``hardest`` and ``easiest``.
        groups: ``[N]`` integers or texts: classes, or what ``quotas_with_slices`` gives.
        quotas: examples by group; a group that is not named gives none.
        seed: for what is random.
        names: the classes' names by number, for errors.

    Returns:
        Indices into the N examples, ascending by group, in a group in the order of choice.

    Raises:
        UserError: an unknown method, or a group with fewer examples than its quota.
    """
    if isinstance(method, str) and method not in PICKS:
        raise UserError(f"there is no selection '{method}': choose from {', '.join(PICKS)}")
    pick = PICKS[method] if isinstance(method, str) else method
    features, groups = np.asarray(features), np.asarray(groups)
    if len(features) != len(groups):
        raise UserError(
            f"{len(features)} examples have {len(groups)} groups: give a group for each example"
        )
    chosen = [np.empty(0, np.int64)]
    for group in sorted(quotas):
        rows = np.flatnonzero(groups == group)
        if len(rows) < quotas[group]:
            raise _too_few(_group_name(group, names), len(rows), quotas[group])
        own = np.random.SeedSequence([seed, *str(group).encode()])
        chosen.append(rows[pick(features[rows], quotas[group], int(own.generate_state(1)[0]))])
    return np.concatenate(chosen)
