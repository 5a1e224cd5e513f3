"""Compares networks trained on the digits, each with what saves it work: quality beside executed multiply-adds.

    python scripts/compare_families.py                                            # all that the scripts have trained
    python scripts/compare_families.py --ckpt digits_ddt_out --intervals 2 4 10

Every network is sampled with ever fewer steps and, where it can reuse state between evaluations, at several intervals:
plain DiTs and Skip-DiTs by Skip-Cache, DDTs by sharing their encoder. Routed networks leave out what they leave out.
All draw the same labels from the same noise. Runs that differ by their seed alone become one row, with their spread.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from runtime.config import parse_config, setting, to_dict

from benchmarks.digits import Result, Subject, Way, examine, find_checkpoints, newest, open_subject, ways
from benchmarks.plotting import pyplot, save_figure
from benchmarks.report import aligned
from runtime import distributed
from runtime.errors import UserError, run
from runtime.files import atomic_path, check_writable
from sampling.config import SAMPLERS

# Where the scripts leave what they train.
MADE_BY = {
    Path("quickstart_out"): "quickstart.sh",
    Path("digits_dydit_out"): "digits_dydit.sh",
    Path("digits_ddt_out"): "digits_ddt.sh",
    Path("digits_skip_dit_out"): "digits_skip_dit.sh",
}
INTERVALS = (2, 4, 6)
CLOSE = 0.02  # of a routed network's work to its target


@dataclass(frozen=True)
class CompareConfig:
    """Settings of compare_families.py."""

    ckpt: tuple[Path, ...] = setting(tuple(MADE_BY), "checkpoints of train.py, or folders of runs: the newest of each")
    steps: tuple[int, ...] = setting((50, 25, 10), "sampling steps; reuse is looked at with the first of them")
    intervals: tuple[int, ...] | None = setting(
        None, "evaluations from one that computes kept state to the next; 2, 4 and 6"
    )
    cache_depth: int | None = setting(None, "blocks that cached steps run at an end; a quarter of all, and 4 at most")
    sampler: str | None = setting(None, "by the process: ddim, or euler for flows", tuple(SAMPLERS))
    cfg_scale: float | None = setting(None, "guidance scale; by the process: 1.1, or 1 (none) for flows")
    num_samples: int = setting(1000, "digits of every row, of all classes in turn")
    seed: int = setting(0, "seed of the noise")
    check: bool = setting(False, f"exit with status 1 if a routed network's work is off its target by over {CLOSE}")
    output_dir: Path = setting(Path("results/families"), "where the table and the picture go")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        if not self.ckpt:
            raise ValueError("--ckpt: give at least one")
        if not self.steps:
            raise ValueError("--steps: give at least one")
        if self.num_samples < 4:
            raise ValueError(f"--num-samples {self.num_samples}: scores need at least 4")
        for interval in self.intervals or ():
            if not 2 <= interval <= self.steps[0]:
                raise ValueError(f"--intervals {interval}: must lie in 2..{self.steps[0]}, the number of steps")

    @property
    def chosen_intervals(self) -> tuple[int, ...]:
        """--intervals, or those of the usual ones that the steps have room for."""
        return self.intervals or tuple(interval for interval in INTERVALS if interval <= self.steps[0])


def plan(config: CompareConfig) -> list[tuple[Subject, list[Way]]]:
    """What will be sampled, and how.

    Raises:
        UserError: if a place holds no checkpoint, or a flag does not fit one.
    """
    for place in config.ckpt:
        if not any(path.exists() for path in find_checkpoints([place])):
            made_by = f"; bash scripts/{MADE_BY[place]} makes some" if place in MADE_BY else ""
            raise UserError(f"--ckpt {place}: no checkpoint there{made_by}")
    subjects = newest([open_subject(path, config.cache_depth) for path in find_checkpoints(config.ckpt)])
    device = distributed.choose_device(config.device).type
    flags: dict[str, Any] = {"sampler": config.sampler, "cfg_scale": config.cfg_scale, "device": device}
    flags["sharing_dir"] = config.output_dir / "sharing"
    planned = []
    for subject in subjects:
        try:
            planned.append((subject, ways(subject, config.steps, config.chosen_intervals, **flags)))
        except ValueError as error:
            raise UserError(f"--ckpt {subject.path}: {error}") from error
    return planned


def by_row(results: Sequence[Result]) -> list[list[Result]]:
    """Results of one name and one way together, in the order in which they first came."""
    rows: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        rows.setdefault((result.name, result.way), []).append(result)
    return list(rows.values())


def mean(values: Sequence[float]) -> float:
    """Of the seeds of a row."""
    return sum(values) / len(values)


def spread(values: Sequence[float | None], form: str) -> str:
    """Mean, and in brackets the smallest and the largest of several; empty where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle = f"{mean(known):{form}}"
    return middle if len(known) == 1 else f"{middle} ({min(known):{form}} to {max(known):{form}})"


def table(results: Sequence[Result]) -> str:
    """Markdown, a row a way of a network; work beside the network's own first way with nothing left out."""
    columns: dict[str, tuple[Callable[[Result], float | None], str]] = {
        "M multiply-adds": (lambda result: result.multiply_adds / 1e6, ",.0f"),
        "blocks' work": (lambda result: result.block_ratio, ".3f"),
        "recognised": (lambda result: result.scores.accuracy, ".3f"),
        "Frechet distance": (lambda result: result.scores.frechet_distance, ".2f"),
        "recall": (lambda result: result.scores.recall, ".3f"),
        "nearest": (lambda result: result.scores.nearest_ratio, ".2f"),
        "PSNR, dB": (lambda result: result.psnr, ".1f"),
    }
    dense = {result.name: result.dense for result in reversed(results)}  # of the first way
    rows = []
    for seeds in by_row(results):
        first = seeds[0]
        fewer = dense[first.name] / mean([result.multiply_adds for result in seeds])
        shown = [spread(list(dict.fromkeys(map(value, seeds))), form) for value, form in columns.values()]
        full = str(first.full) if first.full == first.evaluations else f"{first.full} of {first.evaluations}"
        rows.append([first.name, first.way, full, shown[0], f"{fewer:.2f} x", *shown[1:]])
    titles = ["network", "sampled by", "full evaluations", "M multiply-adds", "fewer by", *list(columns)[1:]]
    return aligned(titles, rows, left=2)


def draw_costs(results: Sequence[Result], path: Path) -> None:
    """Frechet distance against work: a colour a network; reuse in full lines, fewer steps in broken ones."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 5.6), layout="constrained")
    colours = plt.get_cmap("tab10")
    rows = by_row(results)
    for number, name in enumerate(dict.fromkeys(result.name for result in results)):
        own = [seeds for seeds in rows if seeds[0].name == name]
        lines = {
            "-": [seeds for seeds in own if seeds[0].interval > 1 or seeds is own[0]],
            "--": [seeds for seeds in own if seeds[0].interval == 1],
        }
        for style, line in lines.items():
            cost = np.array([mean([result.multiply_adds / 1e6 for result in seeds]) for seeds in line])
            scores = [[result.scores.frechet_distance for result in seeds] for seeds in line]
            middle = np.array([mean(values) for values in scores])
            low = middle - [min(values) for values in scores]
            high = np.array([max(values) for values in scores]) - middle
            axis.errorbar(
                cost, middle, np.stack([low, high]), linestyle=style, marker="o", markersize=5, linewidth=1.4,
                capsize=2, elinewidth=0.8, color=colours(number % 10),
                markerfacecolor=colours(number % 10) if style == "-" else "white",
                label=name if style == "-" else None,
            )  # fmt: skip
        axis.plot(cost[0], middle[0], "o", markersize=8, color=colours(number % 10), zorder=5)
    real = results[0].scores.frechet_distance_of_test
    axis.axhline(real, color="0.5", linewidth=1, linestyle=":")
    axis.annotate("real held-out digits", (0, real), (4, 4), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=9, color="0.4")  # fmt: skip
    ticker = plt.matplotlib.ticker
    for scale, of in ((axis.set_xscale, axis.xaxis), (axis.set_yscale, axis.yaxis)):
        scale("log")
        of.set_minor_locator(ticker.LogLocator(subs=(2, 3, 5, 7)))
        of.set_major_formatter(ticker.FormatStrFormatter("%g"))
        of.set_minor_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_xlabel("executed multiply-adds of one image, millions")
    axis.set_ylabel("Frechet distance to the training digits")
    axis.set_title(
        "full lines: state reused; broken lines: fewer steps; large dots: neither", fontsize=10, color="0.35"
    )
    axis.grid(alpha=0.25, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.95))
    save_figure(figure, path)


def off_target(results: Sequence[Result]) -> list[str]:
    """Routed networks whose work, at the first way, is not what they were trained for."""
    firsts = {(result.name, result.seed): result for result in reversed(results) if result.target is not None}
    return [
        f"{result.name}: sampling ran {result.block_ratio:.3f} of the blocks' work, not within {CLOSE} of its target"
        for result in reversed(firsts.values())
        if result.target is not None and abs(result.block_ratio - result.target) > CLOSE
    ]


def main(argv: Sequence[str]) -> None:
    """Parses flags, samples, scores, prints and writes table and picture."""
    config = parse_config(CompareConfig, argv, program="compare_families.py", description=__doc__.split("\n")[0])
    planned = plan(config)
    check_writable(config.output_dir / "families.json", "--output-dir")
    results: list[Result] = []
    for subject, all_ways in planned:
        for result in examine(subject, all_ways, config.num_samples, config.seed):
            results.append(result)
            print(f"{result.name}, seed {result.seed}: {result.way}", file=sys.stderr, flush=True)
    text = table(results)
    text += f"\n\nReal held-out digits have a Frechet distance of {results[0].scores.frechet_distance_of_test:.2f}."
    document: dict[str, Any] = {"settings": to_dict(config), "rows": [dataclasses.asdict(result) for result in results]}
    for suffix, content in (("json", json.dumps(document, indent=2)), ("md", text)):
        with atomic_path(config.output_dir / f"families.{suffix}") as temporary:
            temporary.write_text(content + "\n")
    draw_costs(results, config.output_dir / "families.png")
    print(text)
    missed = off_target(results)
    for line in missed:
        print(line, file=sys.stderr)
    if config.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run(main, "compare_families.py"))
