"""Pictures of numbers, drawn without a screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.files import atomic_path


def pyplot() -> Any:
    """Matplotlib's pyplot, with its parts that are not imported by themselves; it draws into files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.colors
    import matplotlib.pyplot as plt
    import matplotlib.ticker  # noqa: F401 (plt.matplotlib.ticker)

    return plt


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure, whole or not at all, and forgets it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot().close(figure)
