"""Which projections to freeze, read out of a signal analysis, with the reason in words.

Layers are stacked in one parameter, so a projection is frozen in all layers or in none. What counts
is therefore what holds in most layers, not what one layer does: a single place of enormous
activation gives one layer's ``down_proj`` most of the whole model's squared gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxdistill.kd.signal_sums import PROJECTIONS

# A projection must be inflated by a tenth at all, by a quarter more than the median projection,
# and by more than its layer's median in two thirds of the layers. Were all seven alike, each would
# exceed the median in three layers of seven; 20 of 30 layers then come by chance in 1 of 140 cases.
LEAST_INFLATION = 1.1
LEAST_RATIO = 1.25
LEAST_LAYERS = 2 / 3
# Training must be left with something to repair by.
MOST_WEIGHTS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """Hold one projection's figures, over all layers.

    Attributes:
        projection: its name, ``v_proj``.
        inflation: squared gradient norm of the quantized model over the float model's, the
            geometric mean over layers.
        ratio: what quantization adds, ``inflation - 1``, over what it adds to the median
            projection; NaN where that is nothing.
        layers_above: layers in which its inflation exceeds that layer's median projection.
        layers: layers that could be compared.
        density: the student's squared gradient a weight over the median projection's, a geometric
            mean over layers too.
        sqnr: of its output, mean over layers, in dB.
        weights: its share of the decoder's linear weights.
        reason: whether it stands out and why, in words and figures.
        frozen: whether it is recommended.
    """

    projection: str
    inflation: float
    ratio: float
    layers_above: int
    layers: int
    density: float
    sqnr: float
    weights: float
    reason: str
    frozen: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Say what to freeze: ``patterns`` for ``kd.freeze``, empty where nothing stands out.

    Attributes:
        patterns: regular expressions over parameter paths, none or one.
        projections: the frozen ones.
        reasons: sentences, the verdict first, then one a frozen projection.
        ranking: every projection, the largest inflation first.
    """

    patterns: tuple[str, ...]
    projections: tuple[str, ...]
    reasons: tuple[str, ...]
    ranking: tuple[Standing, ...]


def recommend_freeze(signal: Mapping[str, np.ndarray]) -> Recommendation:
    """Recommend projections to snap and freeze in all layers.

    A projection stands out where quantization inflates its gradient more than that of the others.
    Inflation is the quantized model's squared gradient norm over the float model's, the geometric
    mean over layers: it gives each layer one vote, where a ratio of sums would report the one layer
    with the largest gradient. Projections are compared by what quantization adds, inflation less 1,
    for the float model's own gradient is in every inflation and would hide the difference where
    quantization is mild. To stand out, inflation must be 1.1 or more, what is added 1.25 times what
    is added to the median projection, and its layer's median exceeded in two thirds of the layers.
    The gradient must also be worth stopping: large for the weights that it moves (above the median
    a weight), or at a place that has left the float model (an SQNR below the median). Projections
    are taken from the largest inflation down while they hold at most half of the weights.

    Args:
        signal: what ``kd.signal.make_signal`` measures: its ``gradient/teacher``,
            ``gradient/student``, ``sqnr`` and ``weights``.
    """
    ranking = _standings(signal)
    if not ranking:
        reason = "nothing can be compared: the gradients are zero or not finite"
        return Recommendation(patterns=(), projections=(), reasons=(reason,), ranking=())
    chosen = [s for s in ranking if s.frozen]
    if not chosen:
        first = ranking[0]
        reason = f"nothing stands out: {first.projection} comes first, but {first.reason}"
        return Recommendation(patterns=(), projections=(), reasons=(reason,), ranking=ranking)
    projections = tuple(p for p in PROJECTIONS if p in {s.projection for s in chosen})
    share = sum(s.weights for s in chosen)
    verdict = f"freeze {' and '.join(projections)} in all layers, {share:.0%} of the weights"
    return Recommendation(
        patterns=(_pattern(projections),),
        projections=projections,
        reasons=(verdict, *(f"{s.projection}: {s.reason}" for s in chosen)),
        ranking=ranking,
    )


def _standings(signal: Mapping[str, np.ndarray]) -> tuple[Standing, ...]:
    """Judge every projection; none where no layer can be compared."""
    teacher, student = signal["gradient/teacher"], signal["gradient/student"]
    weights = np.expand_dims(signal["weights"], 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs, dense = np.log(student / teacher), np.log(student / weights)
    whole = np.isfinite(logs).all(axis=1) & np.isfinite(dense).all(axis=1)
    if not whole.any():
        return ()
    logs, layers = logs[whole], int(whole.sum())
    inflation = np.exp(logs.mean(axis=0))
    middle = float(np.median(inflation))
    above = (logs > np.median(logs, axis=1, keepdims=True)).sum(axis=0)
    density = np.exp(dense[whole].mean(axis=0))
    density = density / np.median(density)
    sqnr = np.asarray([_mean_of_finite(column) for column in signal["sqnr"].T])

    taken, found = 0.0, []
    for i in sorted(range(len(PROJECTIONS)), key=lambda i: (-inflation[i], i)):
        share = float(weights[0, i] / weights.sum())
        ratio = float((inflation[i] - 1) / (middle - 1)) if middle > 1 else float("nan")
        compared = f", {ratio:.2f} times as much added" if middle > 1 else ""
        figures = (
            f"quantization multiplies its squared gradient by {inflation[i]:.2f}, the median "
            f"projection's by {middle:.2f}{compared}; in {above[i]} of {layers} layers by more "
            "than that layer's median"
        )
        # Where the median projection is not inflated at all, whatever is inflated stands out.
        more = middle <= 1 or ratio >= LEAST_RATIO
        stands_out = inflation[i] >= LEAST_INFLATION and more and above[i] >= LEAST_LAYERS * layers
        why = _why(float(density[i]), float(sqnr[i]), float(np.median(sqnr)))
        frozen = False
        if not stands_out:
            reason = f"it is too near the others: {figures}"
        elif not why:
            reason = f"its gradient is small and its output near the float model's: {figures}"
        elif taken + share > MOST_WEIGHTS:
            reason = f"more than half of the weights would be frozen with it: {figures}"
        else:
            frozen, taken = True, taken + share
            reason = f"{figures}; {why}"
        found.append(
            Standing(
                projection=PROJECTIONS[i],
                inflation=float(inflation[i]),
                ratio=ratio,
                layers_above=int(above[i]),
                layers=layers,
                density=float(density[i]),
                sqnr=float(sqnr[i]),
                weights=share,
                reason=reason,
                frozen=frozen,
            )
        )
    return tuple(found)


def _why(density: float, sqnr: float, middle: float) -> str:
    """Say why a projection's gradient is worth stopping; nothing where it is not."""
    said = []
    if density > 1:
        said.append(f"a weight's squared gradient is {density:.2f} times the median projection's")
    if sqnr < middle:
        said.append(f"its output's SQNR is {sqnr:.1f} dB, the median projection's {middle:.1f} dB")
    return " and ".join(said)


def _mean_of_finite(values: np.ndarray) -> float:
    """Return the mean in dB; infinite where every output is exact."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("inf")


def _pattern(projections: Sequence[str]) -> str:
    """Return one regex for kernels, and for their ranges where these are learned."""
    stems = "|".join(p.removesuffix("_proj") for p in projections)
    return rf"/({stems})_proj/kernel"
