"""Compare all ways to sample from a network in few evaluations: solvers, time grids, forecasts, searched tables.

    python scripts/compare_samplers.py --ckpt quickstart_out
    python scripts/compare_samplers.py --ckpt a.safetensors --evaluations 8 10 --seeds 0 1 2 --solver-tables a-8.json

For each: the distance to the solution of the ODE, which 1,000 evaluations from the same noise come close to (root mean
square of latents, PSNR of images), seconds, and scores where the data set has some (the digits, Fashion-MNIST).
Checkpoints of one network that differ by the seed of their training become one row, as do seeds of the noise, with
their spread.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks import samplers, small
from benchmarks.plotting import pyplot, save_figure, style
from benchmarks.report import aligned, machine_info, write_tables
from benchmarks.samplers import Opened, SamplerResult, Setup
from benchmarks.timing import check_at_least
from runtime.command_line import parse_config
from runtime.devices import choose_device
from runtime.documents import to_dict
from runtime.errors import UserError, run
from runtime.files import check_writable
from runtime.settings import Values, setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = Callable[[SamplerResult], float | None]


@dataclass(frozen=True, kw_only=True)
class SamplersSettings:
    """Settings of compare_samplers.py."""

    ckpt: tuple[Path, ...] = setting((), "checkpoints, or folders of runs: the newest of each")
    evaluations: tuple[int, ...] = setting((5, 8, 10, 15, 20), "numbers of network evaluations")
    grids: Literal["all", "own"] = setting("all", "time grids of every solver: all, or its own, a fifth of the time")
    forecasts: tuple[str, ...] = setting(("3,3", "4,2", "5,2", "8,2", "10,2"), "forecasts N,O between 50 steps")
    solver_tables: tuple[str, ...] = setting((), "tables of search_solver.py for these networks")
    reference_evaluations: int = setting(1000, "evaluations of what counts as the solution")
    cfg_scale: float | None = setting(None, "guidance scale", shown="1.1 by diffusion, where there are scores; 1 else")
    num_images: int = setting(100, "images of every row, of all classes in turn")
    seeds: tuple[int, ...] = setting((0,), "seeds of the noise")
    output_dir: Path = setting(Path("results/samplers"), "folder of the tables and the picture")
    device: Literal["cuda", "cpu"] | None = setting(None, "where to compute", shown="cuda if there is one")

    def __post_init__(self) -> None:
        for name in ("ckpt", "evaluations", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name}: give at least one")
        if min(self.evaluations) < 3:
            raise ValueError(f"--evaluations {min(self.evaluations)}: must be at least 3, for solvers of order 3")
        check_at_least(self, 4, "num_images")  # for the scores
        check_at_least(self, 100, "reference_evaluations")


def plan(config: SamplersSettings) -> list[tuple[Opened, list[Setup]]]:
    """Networks, and the setups to sample from each.

    Raises:
        UserError: If a place holds no checkpoint, or a forecast does not fit.
    """
    device, planned = choose_device(config.device), []
    for place in config.ckpt:
        paths = list(small.find_checkpoints([place]))
        if not any(path.exists() for path in paths):
            raise UserError(f"--ckpt {place}: no checkpoint there")
        for path in paths:
            opened = samplers.open_network(path, device)
            process = opened.pipeline.info.process
            setups = [setup for count in config.evaluations for setup in samplers.solvers(process, count)]
            setups = [setup for setup in setups if setup.default or config.grids == "all"]
            setups += samplers.forecasts(process, config.forecasts)
            for setup in setups[-len(config.forecasts) :]:
                opened.pipeline.prepare(**setup.settings)
            setups += samplers.searched(opened, config.solver_tables)
            planned.append((opened, setups))
    return planned


def guidance(config: SamplersSettings, opened: Opened) -> float:
    """Guidance scale of a network."""
    if config.cfg_scale is not None:
        return config.cfg_scale
    return small.PROTOCOLS[opened.pipeline.info.process][1] if opened.scores is not None else 1.0


def groups(results: Sequence[SamplerResult]) -> dict[tuple[str, str], dict[int, list[SamplerResult]]]:
    """Results by solver and spacing, then by evaluations: those of all seeds together."""
    rows: dict[tuple[str, str], dict[int, list[SamplerResult]]] = {}
    for result in results:
        label = f"{result.spacing}{'' if not result.default or 'forecast' in result.solver else ' (default)'}"
        rows.setdefault((result.solver, label), {}).setdefault(result.evaluations, []).append(result)
    return rows


def cell(results: Sequence[SamplerResult], value: Value, digits_shown: int) -> str:
    """Mean over the seeds, and half the range of several."""
    known = [number for result in results if (number := value(result)) is not None]
    if not known:
        return ""
    mean, half = sum(known) / len(known), (max(known) - min(known)) / 2
    return f"{mean:.{digits_shown}f}" + (f" ±{half:.{digits_shown}f}" if half else "")


def pivot(results: Sequence[SamplerResult], value: Value, digits_shown: int) -> str:
    """A row for each solver and spacing, a column for each number of evaluations."""
    rows, counts = groups(results), sorted({result.evaluations for result in results})
    cells = [
        [*names, *(cell(row.get(count, ()), value, digits_shown) for count in counts)] for names, row in rows.items()
    ]
    return aligned(["solver", "spacing", *map(str, counts)], [row for row in cells if any(row[2:])], left=2)


def tables(results: Sequence[SamplerResult]) -> str:
    """Distances of one network as Markdown; PSNR, seconds and scores on the solvers' own spacings."""
    shown: dict[str, tuple[Value, int]] = {
        "RMSE to the solution of the ODE, by evaluations": (lambda result: result.rmse, 4),
        "PSNR to its images, dB": (lambda result: result.psnr, 1),
        "Seconds": (lambda result: result.seconds, 2),
    }
    if results[0].scores is not None:
        shown["Frechet distance"] = (lambda result: score(result, "frechet_distance"), 2)
        shown["Recognised"] = (lambda result: score(result, "accuracy"), 3)
    own = [result for result in results if result.default]
    pivots = [pivot(own if number else results, *column) for number, column in enumerate(shown.values())]
    parts = [f"**{title}**\n\n{table}" for title, table in zip(shown, pivots, strict=True)]
    return "\n\n".join([f"## {results[0].name}", *parts])


def score(result: SamplerResult, name: str) -> float | None:
    """One of the scores."""
    value: float | None = getattr(result.scores, name, None)
    return value


def plot_errors(results: Sequence[SamplerResult], path: Path) -> None:
    """Draw distances against evaluations, a panel a network: solvers on their own spacing, and forecasts."""
    plt, names = pyplot(), list(dict.fromkeys(result.name for result in results))
    figure, axes = plt.subplots(1, len(names), figsize=(7.4 * len(names), 5), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        curves: dict[str, dict[int, list[float]]] = {}
        for result in results:
            if result.name == name and result.default and result.rmse is not None:
                curves.setdefault(result.solver, {}).setdefault(result.evaluations, []).append(result.rmse)
        for solver, points in curves.items():
            plot_curve(axis, solver, points)
        axis.set_xscale("log")
        axis.set_yscale("log")
        counts = sorted({count for points in curves.values() for count in points})
        axis.set_xticks(counts, [str(count) for count in counts], fontsize=8)
        axis.minorticks_off()
        axis.set_title(name, fontsize=10, color="0.35")
        style(axis, "network evaluations", "RMSE to the solution of the ODE")
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def plot_curve(axis: Axes, solver: str, points: dict[int, list[float]]) -> None:
    """Draw the means of one solver, with the range of seeds."""
    counts = sorted(points)
    means = [sum(points[count]) / len(points[count]) for count in counts]
    low = [mean - min(points[count]) for mean, count in zip(means, counts, strict=True)]
    high = [max(points[count]) - mean for mean, count in zip(means, counts, strict=True)]
    dashed = "--" if "forecast" in solver else "-"
    axis.errorbar(counts, means, [low, high], label=solver, marker="o", markersize=4, linewidth=1.3, linestyle=dashed)


def main(argv: Sequence[str]) -> None:
    """Parse flags, sample by everything, print and write tables and picture."""
    config = parse_config(SamplersSettings, argv, program="compare_samplers.py", doc=__doc__)
    check_writable(config.output_dir / "samplers.json", "--output-dir")
    planned, results = plan(config), list[SamplerResult]()
    for opened, setups in planned:
        scale = guidance(config, opened)
        for seed in config.seeds:
            print(f"{opened.name}, training seed {opened.seed}, noise {seed}: {len(setups)} runs", file=sys.stderr)
            each = samplers.measure(
                opened, setups, config.num_images, seed, config.reference_evaluations, cfg_scale=scale
            )
            results += each
    names = dict.fromkeys(result.name for result in results)
    text = "\n\n".join(tables([result for result in results if result.name == name]) for name in names)
    machine = machine_info(choose_device(config.device), "wall time")
    document: Values = {
        "settings": to_dict(config),
        "machine": machine,
        "rows": [dataclasses.asdict(result) for result in results],
    }
    write_tables(config.output_dir, "samplers", document, text)
    plot_errors(results, config.output_dir / "samplers.png")
    print(text)


if __name__ == "__main__":
    sys.exit(run(main, "compare_samplers.py"))
