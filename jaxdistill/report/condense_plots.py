"""The pictures of a condensed data set: the run, the images, the words, and methods compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Array, Float

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from jaxdistill.errors import UserError
from jaxdistill.report.plots import Rows, save_figure

_FULL = "full data"


def plot_condense(directory: Path, rows: Rows) -> Path:
    """Draw ``outer_loss.png``.

    Args:
        directory: made where it does not exist.
        rows: of the run's ``metrics.jsonl``, at least one: ``step`` and ``loss``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    losses = [row["loss"] for row in rows]
    figure, axes = plt.subplots(figsize=(6, 3.6))
    axes.plot([row["step"] for row in rows], losses, lw=1)
    if min(losses) > 0 and max(losses) > 20 * min(losses):
        axes.set_yscale("log")
    axes.set(xlabel="outer step", ylabel="outer loss", title="condensing loss")
    return save_figure(figure, directory / "outer_loss.png")


def plot_images(
    path: Path,
    images: Float[Array | np.ndarray, "M H W *C"],
    titles: Sequence[str] | None = None,
    *,
    columns: int | None = None,
) -> Path:
    """Draw images as a grid, all on one scale, from the least to the greatest of their values.

    Args:
        path: the file to write; its directory is made where it does not exist.
        images: grey without C or with C = 1, colours with C = 3.
        titles: one an image, such as its class.
        columns: images in a row; None: as square as it gets.

    Raises:
        UserError: another number of channels, or of titles.
    """
    pixels = np.asarray(images, np.float32)
    if pixels.ndim not in (3, 4) or pixels.shape[3:] not in ((), (1,), (3,)):
        raise UserError(
            f"images of the shape {pixels.shape} given; accepted: [M, H, W], [M, H, W, 1] or "
            "[M, H, W, 3]; reshape them"
        )
    if titles is not None and len(titles) != len(pixels):
        raise UserError(f"{len(titles)} titles given for {len(pixels)} images; give one an image")
    if pixels.shape[3:] == (1,):
        pixels = pixels[..., 0]
    low, high = float(pixels.min()), float(pixels.max())
    scaled = (pixels - low) / (high - low or 1.0)
    across = columns or math.ceil(math.sqrt(len(pixels)))
    down = -(-len(pixels) // across)
    height = 1.1 if titles is None else 1.35
    figure, grid = plt.subplots(down, across, figsize=(1.1 * across, height * down), squeeze=False)
    for number, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if number < len(pixels):
            axes.imshow(scaled[number], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if titles is not None:
                axes.set_title(titles[number], fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, path)


def examples_table(
    classes: Sequence[str],
    labels: Sequence[int] | None,
    texts: Mapping[str, Sequence[str]],
    label_probs: Float[Array | np.ndarray, "M C"] | None = None,
    *,
    top: int = 3,
    width: int = 160,
) -> str:
    """Lay synthetic examples out as a Markdown table, one row an example.

    Args:
        classes: their names.
        labels: hard labels [M]; None: the likeliest class.
        texts: heading to one text an example: ``{"nearest tokens": [...], "nearest text": [...]}``.
        label_probs: soft labels; the ``top`` likeliest classes are shown.
        top: classes of a soft label.
        width: letters of a text.

    Raises:
        UserError: neither labels nor soft labels, or columns of different lengths.
    """
    probs = None if label_probs is None else np.asarray(label_probs, np.float64)
    if labels is None and probs is None:
        raise UserError("examples without labels given; give labels or label_probs")
    hard = np.asarray(labels) if labels is not None else np.argmax(np.asarray(probs), axis=1)
    columns: dict[str, list[str]] = {
        "#": [str(i) for i in range(1, len(hard) + 1)],
        "class": [str(classes[i]) for i in hard],
    }
    if probs is not None:
        likeliest = np.argsort(-probs, axis=1, kind="stable")[:, :top]
        columns["soft label"] = [
            ", ".join(f"{classes[c]} {row[c]:.2f}" for c in best)
            for row, best in zip(probs, likeliest, strict=True)
        ]
    for heading, each in texts.items():
        columns[heading] = [_shown(text, width) for text in each]
    lengths = {heading: len(column) for heading, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"columns of different lengths given: {lengths}; give one cell an example")
    rows = [tuple(columns), ("---",) * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _shown(text: str, width: int) -> str:
    """Return a text that stands in one cell of a table."""
    line = " ".join(text.split())
    cut = line if len(line) <= width else line[: width - 1].rstrip() + "…"
    for letter in "\\|<>`*_[]":
        cut = cut.replace(letter, "\\" + letter)
    return cut


def plot_comparison(
    path: Path,
    results: Sequence[Mapping[str, Any]],
    *,
    title: str = "accuracy after training on the set",
) -> Path:
    """Draw the accuracy of methods as bars, one group an architecture, with error bars.

    Args:
        path: the file to write; its directory is made where it does not exist.
        results: rows ``{"name", "architecture", "mean", "std"}``, means and standard deviations in
            [0, 1]; the row named ``"full data"`` is a line across its architecture's group.
        title: above the picture.

    Raises:
        UserError: a method has two rows for one architecture, or there are no rows.
    """
    methods = list(dict.fromkeys(r["name"] for r in results if r["name"] != _FULL))
    groups = list(dict.fromkeys(str(r["architecture"]) for r in results))
    found = {(r["name"], str(r["architecture"])): r for r in results}
    if not results or len(found) < len(results):
        raise UserError(
            f"{len(results)} rows with {len(found)} pairs of name and architecture given; "
            "accepted: at least one row, each pair once; average runs beforehand"
        )
    figure, axes = plt.subplots(figsize=(max(6.0, 1.2 + 0.45 * len(methods) * len(groups)), 3.8))
    width = 0.8 / max(1, len(methods))
    for number, method in enumerate(methods):
        at = [i for i, group in enumerate(groups) if (method, group) in found]
        rows = [found[method, groups[i]] for i in at]
        bars = axes.bar(
            [i + (number - (len(methods) - 1) / 2) * width for i in at],
            [100 * row["mean"] for row in rows],
            width=0.9 * width,
            yerr=[100 * row.get("std", 0.0) for row in rows],
            capsize=3,
            color=matplotlib.colormaps["tab20"](number % 20),
            label=method,
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    full = [i for i, group in enumerate(groups) if (_FULL, group) in found]
    if full:
        axes.hlines(
            [100 * found[_FULL, groups[i]]["mean"] for i in full],
            [i - 0.45 for i in full],
            [i + 0.45 for i in full],
            color="grey",
            ls="--",
            label=_FULL,
        )
    axes.set_xticks(range(len(groups)), groups)
    axes.set(ylabel="accuracy (%)", title=title)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    shown = [name for name in (*methods, _FULL) if name in handles]
    axes.legend(
        [handles[name] for name in shown],
        shown,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_figure(figure, path)
