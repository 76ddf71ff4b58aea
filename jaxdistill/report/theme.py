"""How pictures look: light or dark, on the surface that a page has, as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import matplotlib

from jaxdistill._disk import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Theme = Literal["light", "dark"]
# Surface, text, lines; a page uses the same surface, so that a picture lies in it without a frame.
COLORS = {"light": ("#ffffff", "#1f2328", "#d0d7de"), "dark": ("#161b22", "#e6edf3", "#30363d")}
SERIES = {
    "light": ("#0969da", "#b35900", "#1a7f37", "#8250df", "#59636e"),
    "dark": ("#6cb6ff", "#f0a868", "#6bc46d", "#c297ff", "#9198a1"),
}
Pictures = dict[str, bytes]


def style(theme: Theme) -> Any:
    """Return a theme's settings, for ``plt.rc_context``."""
    surface, text, line = COLORS[theme]
    inks = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    return dict.fromkeys(inks, text) | {
        "figure.facecolor": surface,
        "axes.facecolor": surface,
        "savefig.facecolor": surface,
        "axes.edgecolor": line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=SERIES[theme]),  # pyright: ignore
        "grid.color": line,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "font.size": 10,
        "axes.titlesize": 11,
    }


def png(figure: Any) -> bytes:
    """Return a figure as PNG, and close it."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def in_both(draw: Callable[[Theme], Pictures]) -> dict[str, tuple[bytes, bytes]]:
    """Return what is drawn in light and in dark, by name."""
    light, dark = draw("light"), draw("dark")
    return {name: (picture, dark[name]) for name, picture in light.items()}


def write_pictures(directory: Path, pictures: Mapping[str, bytes]) -> list[Path]:
    """Write ``NAME.png`` for every picture into a directory, made where it does not exist."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.png" for name in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        write_whole(path, picture)
    return paths
