"""Draw the curves of one or several training runs, and those that are expected beside them.

    python scripts/plot_run.py results/000-DiT-digits-2
    python scripts/plot_run.py results/000-DiT-XL-2 results/001-DiT-XL-2 --output both.png --metrics loss val_loss
    python scripts/plot_run.py results/000-DiT-S-2 --save-expected mine.json

A run's loss is drawn as it was logged, and smoothed. Where the settings are those of a recipe with known curves,
the band of its seeds lies under them; --expected adds others. Grids of samples are shown at up to five steps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks.curves import (
    Expected,
    RunCurves,
    expected_of,
    known_expected,
    read_expected,
    read_run,
    smooth,
    write_expected,
)
from benchmarks.plotting import pyplot, save_figure, style
from runtime.command_line import parse_config
from runtime.errors import UserError, run
from runtime.files import check_writable
from runtime.settings import positional, setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Metric -> label and scale of its axis; drawn where a run has them
METRICS = {
    "loss": ("training loss", "log"),
    "val_loss": ("held-out loss", "log"),
    "frechet_distance": ("Frechet distance", "log"),
    "fid": ("FID", "log"),
    "accuracy": ("recognised", "linear"),
    "grad_norm": ("gradient norm", "log"),
    "lr": ("learning rate", "linear"),
    "steps_per_sec": ("steps a second", "linear"),
}
COLOURS = ("#1f5fa8", "#c8102e", "#2e7d32", "#8e44ad", "#b26a00", "#00838f")
SMOOTHED = ("loss", "grad_norm", "steps_per_sec")
MAX_GRIDS = 5
BAND = "#9e9e9e"


@dataclass(frozen=True, kw_only=True)
class PlotSettings:
    """Settings of plot_run.py."""

    runs: tuple[Path, ...] = positional("folders of runs")
    output: Path = setting(Path("curves.png"), "the picture, .png, .svg or .pdf")
    metrics: tuple[str, ...] | None = setting(
        None, "metrics to draw, by their names in metrics.jsonl", shown=f"those there are of {', '.join(METRICS)}"
    )
    expected: tuple[Path, ...] = setting((), "files with further expected curves")
    save_expected: Path | None = setting(None, "write the curves of these runs as expected ones, too", shown="no file")
    name: str = setting("", "name of those", shown="that of the first run")
    samples: bool = setting(True, "show grids of samples of the first run")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.output.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--output {self.output}: must end in .png, .svg or .pdf")
        if self.name and self.save_expected is None:
            raise ValueError(f"--name {self.name}: has no effect without --save-expected")


def choose_metrics(runs: Sequence[RunCurves], wanted: Sequence[str] | None) -> list[str]:
    """The metrics to draw: those that were asked for, or those there are.

    Raises:
        UserError: If no run has one that was asked for.
    """
    there = {name for own in runs for name in own.curves}
    for name in wanted or ():
        if name not in there:
            raise UserError(f"--metrics {name}: no run has it; there are {', '.join(sorted(there))}")
    return [*wanted] if wanted else [name for name in METRICS if name in there]


def grids(run: RunCurves) -> dict[int, Path]:
    """Up to five grids of samples, evenly spaced in their order, the first and the last among them."""
    steps = [*run.samples]
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(MAX_GRIDS, len(steps))).round().astype(int))
    return {steps[i]: run.samples[steps[i]] for i in chosen}


def draw_metric(axis: Axes, name: str, runs: Sequence[RunCurves], expected: Sequence[Expected]) -> None:
    """Draw one metric of all runs, over the bands that are expected."""
    for band in expected:
        if name in band.curves:
            steps, low, high = band.curves[name]
            label = f"expected: {band.name}"
            axis.fill_between(steps, low, high, color=BAND, alpha=0.35, linewidth=0, label=label)
            axis.plot(steps, (low + high) / 2, color=BAND, linewidth=1.2, linestyle="--")
    for number, own in enumerate(runs):
        if name not in own.curves:
            continue
        curve, colour = own.curves[name], COLOURS[number % len(COLOURS)]
        is_smoothed = name in SMOOTHED and len(curve.steps) > 20
        if is_smoothed:
            axis.plot(*curve, color=colour, linewidth=0.6, alpha=0.3)
        drawn = smooth(curve) if is_smoothed else curve
        axis.plot(*drawn, color=colour, linewidth=1.7, marker="o" if len(curve.steps) < 3 else None, label=own.name)
        axis.annotate(f"{drawn.values[-1]:.4g}", (drawn.steps[-1], drawn.values[-1]), (4, 2),
                      textcoords="offset points", fontsize=8, color=colour)  # fmt: skip
    label, scale = METRICS.get(name, (name.replace("_", " "), "linear"))
    if scale == "log" and all((own.curves[name].values > 0).all() for own in runs if name in own.curves):
        axis.set_yscale("log")
        plain = pyplot().matplotlib.ticker.ScalarFormatter()
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(plain)
        axis.tick_params(axis="y", which="minor", labelsize=7)
    style(axis, "training step", label)


def draw(
    runs: Sequence[RunCurves], metrics: Sequence[str], expected: Sequence[Expected], shown: dict[int, Path], path: Path
) -> None:
    """Draw a panel for each metric, and a row of grids under them."""
    plt, columns = pyplot(), min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = plt.figure(figsize=(4.6 * columns + 0.4, 3.1 * rows + 2.6 * bool(shown)), layout="constrained")
    top, *bottom = figure.subfigures(2, 1, height_ratios=[3.1 * rows, 2.6]) if shown else [figure]
    axes = top.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, metrics, strict=False):
        draw_metric(axis, name, runs, expected)
    for axis in axes[len(metrics) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    if shown:
        for axis, (step, picture) in zip(
            bottom[0].subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
        ):
            with Image.open(picture, formats=("PNG",)) as image:
                axis.imshow(image.convert("RGB"))
            axis.set_title(f"step {step:,}", fontsize=9)
            axis.set_axis_off()
        bottom[0].suptitle(f"samples of {runs[0].name}", fontsize=9, color="0.35")
    save_figure(figure, path)


def main(argv: Sequence[str]) -> None:
    """Parse flags, read, draw."""
    config = parse_config(PlotSettings, argv, program="plot_run.py", doc=__doc__)
    check_writable(config.output, "--output")
    runs = [read_run(folder) for folder in config.runs]
    for own in runs:
        if own.damaged:
            print(f"warning: {own.name}: left out {own.damaged} damaged lines of metrics.jsonl", file=sys.stderr)
    metrics = choose_metrics(runs, config.metrics)
    expected = [*known_expected(runs), *map(read_expected, config.expected)]
    draw(runs, metrics, expected, grids(runs[0]) if config.samples else {}, config.output)
    print(f"Wrote {config.output}: {', '.join(metrics)}")
    if config.save_expected is not None:
        check_writable(config.save_expected, "--save-expected")
        write_expected(expected_of(runs, config.name or runs[0].name), config.save_expected)
        print(f"Wrote {config.save_expected}")


if __name__ == "__main__":
    sys.exit(run(main, "plot_run.py"))
