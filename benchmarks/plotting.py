"""Figures, made without a screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.files import atomic_path


def pyplot() -> Any:
    """Import matplotlib's pyplot, and the parts that do not come by themselves; it makes files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.colors
    import matplotlib.pyplot as plt
    import matplotlib.ticker  # noqa: F401 (plt.matplotlib.ticker)

    return plt


def style(axis: Any, x: str, y: str, **grid: str) -> None:
    """Label an axis, with a faint grid and no frame at the top and on the right."""
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25, **grid)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all, and close it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot().close(figure)
