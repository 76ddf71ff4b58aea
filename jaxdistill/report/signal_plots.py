"""The pictures of a signal analysis: heat maps of layer by projection, and drift by depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from jaxdistill.report.theme import COLORS, SERIES, Pictures, Theme, png, style

_MODELS = {"float": "float", "ptq": "PTQ", "trained": "trained student"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Say how one [L, 7] array is drawn.

    Attributes:
        quantity: the array's name after its model, ``sqnr``.
        title: above the picture, before the model's name.
        unit: beside the colours.
        scale: what is drawn of a value.
        diverging: colours around 0 instead of from least to most.
    """

    quantity: str
    title: str
    unit: str
    scale: Literal["linear", "log10", "log2", "percent"] = "linear"
    diverging: bool = False


HEAT_MAPS = (
    HeatMap(
        quantity="gradient_ce",
        title="gradient",
        unit="log10 of squared norm, cross-entropy",
        scale="log10",
    ),
    HeatMap(
        quantity="inflation",
        title="gradient inflation",
        unit="log2 of squared norm, quantized / float",
        scale="log2",
        diverging=True,
    ),
    HeatMap(
        quantity="gradient_kd",
        title="distillation gradient",
        unit="log10 of squared norm, KL to teacher",
        scale="log10",
    ),
    HeatMap(quantity="sqnr", title="SQNR of the output", unit="dB"),
    HeatMap(
        quantity="sqnr_gain",
        title="SQNR gained by training",
        unit="dB",
        diverging=True,
    ),
    HeatMap(quantity="clipped", title="clipped weights", unit="% of weights", scale="percent"),
    HeatMap(quantity="flips", title="flipped integers", unit="% of weights", scale="percent"),
)


def draw_signal(arrays: Mapping[str, np.ndarray], theme: Theme = "light") -> Pictures:
    """Draw every picture that the arrays allow; return ``name -> PNG``.

    Args:
        arrays: by ``model/quantity``, models ``float``, ``ptq`` and ``trained``; heat maps of
            [L, 7] quantities, and ``drift_relative_error`` and ``drift_cosine`` [L+1]. One
            quantity has the same colours in all models.
        theme: colours of surface and text.
    """
    made = {}
    for spec in HEAT_MAPS:
        names = {m: f"{m}/{spec.quantity}" for m in _MODELS}
        scaled = {m: _scaled(arrays[n], spec) for m, n in names.items() if n in arrays}
        limits = _limits(list(scaled.values()), spec)
        for model, values in scaled.items():
            title = f"{spec.title}, {_MODELS[model]}"
            picture = _heat_map(values, title, spec, limits, theme)
            made[f"{spec.quantity}_{model}"] = picture
    drifting = [m for m in _MODELS if f"{m}/drift_cosine" in arrays]
    made["drift"] = _drift(arrays, drifting, theme)
    return made


def _scaled(values: np.ndarray, spec: HeatMap) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = {
            "linear": lambda: values,
            "log10": lambda: np.log10(values),
            "log2": lambda: np.log2(values),
            "percent": lambda: 100 * values,
        }[spec.scale]()
    return np.where(np.isfinite(scaled), scaled, np.nan)


def _limits(arrays: Sequence[np.ndarray], spec: HeatMap) -> tuple[float, float]:
    """Return the least and greatest finite value of all arrays; shares begin at 0."""
    finite = np.concatenate([a[np.isfinite(a)] for a in arrays] + [np.zeros(0)])
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if spec.diverging:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    elif spec.scale == "percent":
        low = 0.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _heat_map(
    values: np.ndarray, title: str, spec: HeatMap, limits: tuple[float, float], theme: Theme
) -> bytes:
    surface, text, line = COLORS[theme]
    layers = len(values)
    with plt.rc_context(style(theme)):
        figure, axes = plt.subplots(figsize=(4.4, min(9.0, max(3.2, 1.3 + 0.14 * layers))))
        colors = matplotlib.colormaps["RdBu_r" if spec.diverging else "viridis"].with_extremes(
            bad=line
        )
        drawn = axes.pcolormesh(
            values, cmap=colors, vmin=limits[0], vmax=limits[1], edgecolors=surface, linewidth=0.6
        )
        axes.set_xticks(np.arange(7) + 0.5, ("q", "k", "v", "o", "gate", "up", "down"))
        step = max(1, -(-layers // 12))
        places = np.arange(0, layers, step)
        axes.set_yticks(places + 0.5, [str(i) for i in places])
        axes.invert_yaxis()
        axes.set(xlabel="projection", ylabel="layer", title=title)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(drawn, ax=axes, pad=0.03)
        bar.set_label(spec.unit)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        return png(figure)


def _drift(arrays: Mapping[str, np.ndarray], models: Sequence[str], theme: Theme) -> bytes:
    """Draw the residual stream's relative error and cosine by depth, one line a model."""
    with plt.rc_context(style(theme)):
        figure, both = plt.subplots(2, 1, figsize=(6.4, 5.2), sharex=True)
        panels = (
            ("drift_relative_error", "relative error"),
            ("drift_cosine", "cosine to the float model"),
        )
        for axes, (quantity, label) in zip(both, panels, strict=True):
            for model, color in zip(models, reversed(SERIES[theme][:2]), strict=False):
                values = arrays[f"{model}/{quantity}"]
                axes.plot(values, color=color, lw=2, label=_MODELS[model])
            axes.set_ylabel(label)
            axes.grid(axis="y", lw=0.6)
        both[0].set_ylim(bottom=0)
        both[0].set_title("drift of the residual stream")
        both[1].set_xlabel("layers passed (0: the embedding)")
        if len(models) > 1:
            both[0].legend()
        return png(figure)
