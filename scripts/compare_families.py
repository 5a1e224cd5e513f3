"""Compare small networks, each with its way to save work: quality against executed MACs.

    python scripts/compare_families.py                             # everything that the digits' scripts have trained
    python scripts/compare_families.py --ckpt digits_ddt_out --intervals 2 4 10

Networks are those trained on the digits, on moving digits or on Fashion-MNIST. Every one is sampled with ever fewer
steps and, where it can reuse state between evaluations, at several intervals: under Gaussian diffusion by Skip-Cache,
in a flow by sharing. Routed networks leave out what they leave out. All sample the same labels from the same noise.
Runs that differ by their seed alone become one row, with their spread. Networks for clips have a table and a picture
of their own, because their scores are those of motion, too.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from benchmarks import small
from benchmarks.moving_digits import ClipScores
from benchmarks.plotting import pyplot, save_figure, style
from benchmarks.report import aligned, write_tables
from benchmarks.small import Result, SamplingSetup, TrainedModel
from benchmarks.timing import check_at_least
from diffusion import SAMPLERS
from evaluator.small import SmallScores
from runtime.command_line import parse_config
from runtime.devices import choose_device
from runtime.documents import to_dict
from runtime.errors import UserError, run
from runtime.files import check_writable
from runtime.settings import Values, flag_name, setting

# Scripts and the folders of their runs.
MADE_BY = {
    Path("quickstart_out"): "quickstart.sh",
    Path("digits_dydit_out"): "digits_dydit.sh",
    Path("digits_ddt_out"): "digits_ddt.sh",
    Path("digits_skip_dit_out"): "digits_skip_dit.sh",
}
INTERVALS = (2, 4, 6)
CLOSE = 0.02  # of a routed network's work to its target


class Shown(NamedTuple):
    """Scores of one kind in tables and pictures."""

    columns: Mapping[str, tuple[str, str]]  # title -> field of the scores, form
    distance: str  # field of the Frechet distance
    axis: str  # what it is
    file: str  # name of the picture


KINDS: dict[type, Shown] = {
    SmallScores: Shown(
        {
            "recognised": ("accuracy", ".3f"),
            "Frechet distance": ("frechet_distance", ".2f"),
            "recall": ("recall", ".3f"),
            "nearest": ("nearest_ratio", ".2f"),
        },
        "frechet_distance",
        "Frechet distance to the training split",
        "families.png",
    ),
    ClipScores: Shown(
        {
            "recognised": ("accuracy", ".3f"),
            "direction": ("direction", ".3f"),
            "Frechet distance": ("frechet_ratio", ".2f"),
            "nearest": ("nearest_ratio", ".2f"),
        },
        "frechet_ratio",
        "Frechet distance to the training clips, over that of real held-out ones",
        "families_of_clips.png",
    ),
}


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Settings of compare_families.py."""

    ckpt: tuple[Path, ...] = setting(tuple(MADE_BY), "checkpoints of train.py, or folders of runs: the newest of each")
    num_sampling_steps: tuple[int, ...] = setting(
        (50, 25, 10), "numbers of steps; state is reused with the first of them", was={"--steps": None}
    )
    intervals: tuple[int, ...] | None = setting(
        None, "evaluations from one that computes kept state to the next", shown="2 4 6, up to the number of steps"
    )
    cache_depth: int | None = setting(
        None, "blocks that cached steps run at an end", shown="a quarter of all, and 4 at most"
    )
    sampler: str | None = setting(None, "sampler", tuple(SAMPLERS), shown="ddim; euler for flows")
    cfg_scale: float | None = setting(None, "guidance scale", shown="1.1; 1, no guidance, for flows")
    num_images: int = setting(1000, "images of every row, of all classes in turn", was={"--num-samples": None})
    seed: int = setting(0, "seed of the noise")
    check: bool = setting(False, f"exit with status 1 if a routed network's work is off its target by over {CLOSE}")
    output_dir: Path = setting(Path("results/families"), "folder of the table and the picture")
    device: Literal["cuda", "cpu"] | None = setting(None, "where to compute", shown="cuda if there is one")

    def __post_init__(self) -> None:
        for name in ("ckpt", "num_sampling_steps"):
            if not getattr(self, name):
                raise ValueError(f"{flag_name(name)}: give at least one")
        check_at_least(self, 4, "num_images")  # for the scores
        check_at_least(self, 1, "cache_depth")
        for interval in self.intervals or ():
            if not 2 <= interval <= self.num_sampling_steps[0]:
                raise ValueError(
                    f"--intervals {interval}: must lie in 2..{self.num_sampling_steps[0]}, the number of steps"
                )

    @property
    def chosen_intervals(self) -> tuple[int, ...]:
        """--intervals, or those of the usual ones that are not above the number of steps."""
        return self.intervals or tuple(interval for interval in INTERVALS if interval <= self.num_sampling_steps[0])


def plan(config: CompareSettings) -> list[tuple[TrainedModel, list[SamplingSetup]]]:
    """Models, and the setups to sample from each.

    Raises:
        UserError: If a place holds no checkpoint, or a flag does not fit one.
    """
    for place in config.ckpt:
        if not any(path.exists() for path in small.find_checkpoints([place])):
            made_by = f"; bash scripts/{MADE_BY[place]} makes some" if place in MADE_BY else ""
            raise UserError(f"--ckpt {place}: no checkpoint there{made_by}")
    device = choose_device(config.device)
    paths = small.find_checkpoints(config.ckpt)
    models = small.newest([small.open_model(path, config.cache_depth, device) for path in paths])
    settings: Values = {"sampler": config.sampler, "cfg_scale": config.cfg_scale}
    settings["sharing_dir"] = config.output_dir / "sharing"
    steps, intervals = config.num_sampling_steps, config.chosen_intervals
    return [(model, small.sampling_setups(model, steps, intervals, **settings)) for model in models]


def by_row(results: Sequence[Result]) -> list[list[Result]]:
    """Results of one name and one setup together, in the order in which they first came."""
    rows: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        rows.setdefault((result.name, result.setup), []).append(result)
    return list(rows.values())


def mean(values: Sequence[float]) -> float:
    """Mean over the seeds of a row."""
    return sum(values) / len(values)


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean, and in brackets the smallest and the largest of several; empty without any."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle = f"{mean(known):{form}}"
    return middle if len(known) == 1 else f"{middle} ({min(known):{form}} to {max(known):{form}})"


def by_kind(results: Sequence[Result]) -> list[tuple[Shown, list[Result]]]:
    """Results of images and of clips apart."""
    kinds = [(shown, [row for row in results if isinstance(row.scores, kind)]) for kind, shown in KINDS.items()]
    return [(shown, own) for shown, own in kinds if own]


def table(results: Sequence[Result], shown: Shown) -> str:
    """Markdown, a row for each setup of a network; work against the network's first setup with nothing left out."""

    def score(field: str) -> Callable[[Result], float | None]:
        return lambda result: getattr(result.scores, field)

    columns: dict[str, tuple[Callable[[Result], float | None], str]] = {
        "M MACs": (lambda result: result.macs / 1e6, ",.0f"),
        "blocks' work": (lambda result: result.block_ratio, ".3f"),
        **{title: (score(field), form) for title, (field, form) in shown.columns.items()},
        "PSNR, dB": (lambda result: result.psnr, ".1f"),
    }
    dense = {result.name: result.dense for result in reversed(results)}  # of the first setup
    rows = []
    for seeds in by_row(results):
        first = seeds[0]
        fewer = dense[first.name] / mean([result.macs for result in seeds])
        cells = [spread(list(dict.fromkeys(map(value, seeds))), form) for value, form in columns.values()]
        full = str(first.full) if first.full == first.evaluations else f"{first.full} of {first.evaluations}"
        rows.append([first.name, first.setup, full, cells[0], f"{fewer:.2f} x", *cells[1:]])
    titles = ["network", "sampled by", "full evaluations", "M MACs", "fewer by", *list(columns)[1:]]
    return aligned(titles, rows, left=2)


def distance_of_real(results: Sequence[Result]) -> float:
    """Frechet distance of real held-out images; of clips 1, because theirs are ratios to it."""
    scores = results[0].scores
    return scores.frechet_distance_of_test if isinstance(scores, SmallScores) else 1.0


def plot_line(axis: Any, rows: Sequence[Sequence[Result]], field: str, **options: object) -> tuple[float, float]:
    """Draw Frechet distances against work, with the range of seeds; returns the first point."""
    cost = np.array([mean([result.macs / 1e6 for result in seeds]) for seeds in rows])
    scores = [[getattr(result.scores, field) for result in seeds] for seeds in rows]
    middle = np.array([mean(values) for values in scores])
    low = middle - [min(values) for values in scores]
    high = np.array([max(values) for values in scores]) - middle
    axis.errorbar(
        cost,
        middle,
        np.stack([low, high]),
        marker="o",
        markersize=5,
        linewidth=1.4,
        capsize=2,
        elinewidth=0.8,
        **options,
    )
    return cost[0], middle[0]


def plot_costs(results: Sequence[Result], shown: Shown, path: Path) -> None:
    """Draw Frechet distance against work: a colour a network; reuse in full lines, fewer steps in broken ones."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 5.6), layout="constrained")
    rows = by_row(results)
    for number, name in enumerate(dict.fromkeys(result.name for result in results)):
        colour = plt.get_cmap("tab10")(number % 10)
        own = [seeds for seeds in rows if seeds[0].name == name]
        reusing = [seeds for seeds in own if seeds[0].interval > 1 or seeds is own[0]]
        fewer = [seeds for seeds in own if seeds[0].interval == 1]
        first = plot_line(
            axis, reusing, shown.distance, linestyle="-", color=colour, markerfacecolor=colour, label=name
        )
        plot_line(axis, fewer, shown.distance, linestyle="--", color=colour, markerfacecolor="white")
        axis.plot(*first, "o", markersize=8, color=colour, zorder=5)
    real = distance_of_real(results)
    axis.axhline(real, color="0.5", linewidth=1, linestyle=":")
    axis.annotate("real, held out", (0, real), (4, 4), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=9, color="0.4")  # fmt: skip
    ticker = plt.matplotlib.ticker
    for scale, of in ((axis.set_xscale, axis.xaxis), (axis.set_yscale, axis.yaxis)):
        scale("log")
        of.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5, 7)))
        of.set_major_formatter(ticker.FormatStrFormatter("%g"))
        of.set_minor_formatter(ticker.FormatStrFormatter("%g"))
    title = "full lines: state reused; broken lines: fewer steps; large dots: neither"
    axis.set_title(title, fontsize=10, color="0.35")
    style(axis, "executed MACs of one sample, millions", shown.axis, which="both")
    axis.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.95))
    save_figure(figure, path)


def off_target(results: Sequence[Result]) -> list[str]:
    """A line for each routed network that misses its target of work at the first setup."""
    firsts = {(result.name, result.seed): result for result in reversed(results) if result.target is not None}
    return [
        f"{result.name}: sampling ran {result.block_ratio:.3f} of the blocks' work, not within {CLOSE} of its target"
        for result in reversed(firsts.values())
        if result.target is not None and abs(result.block_ratio - result.target) > CLOSE
    ]


def main(argv: Sequence[str]) -> None:
    """Parse flags, sample, score, print and write table and picture."""
    config = parse_config(CompareSettings, argv, program="compare_families.py", doc=__doc__)
    planned = plan(config)
    check_writable(config.output_dir / "families.json", "--output-dir")
    results: list[Result] = []
    for model, setups in planned:
        for result in small.examine(model, setups, config.num_images, config.seed):
            results.append(result)
            print(f"{result.name}, seed {result.seed}: {result.setup}", file=sys.stderr, flush=True)
    parts = []
    for shown, own in by_kind(results):
        parts.append(table(own, shown))
        parts.append(f"{shown.axis}: of real held-out ones {distance_of_real(own):.2f}.")
    text = "\n\n".join(parts)
    document: Values = {"settings": to_dict(config), "rows": [dataclasses.asdict(result) for result in results]}
    write_tables(config.output_dir, "families", document, text)
    for shown, own in by_kind(results):
        plot_costs(own, shown, config.output_dir / shown.file)
    print(text)
    missed = off_target(results)
    for line in missed:
        print(line, file=sys.stderr)
    if config.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run(main, "compare_families.py"))
