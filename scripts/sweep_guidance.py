"""Sample with many settings of guidance, score each, and draw the curves.

    python scripts/sweep_guidance.py --ckpt quickstart_out --scales 1 1.1 1.25 1.5 2 3
    python scripts/sweep_guidance.py --ckpt a.safetensors --guide-ckpts b.safetensors none --intervals all 200:800

Every combination of scale, interval and guide is sampled from the same noise with a budget of images. A guide is a
weaker network for autoguidance, or none for the unconditional rows. Scores are those of the data set (the
digits or Fashion-MNIST).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import samplers, small
from benchmarks.plotting import pyplot, save_figure, style
from benchmarks.report import aligned, write_tables
from benchmarks.samplers import Opened
from benchmarks.timing import check_at_least
from diffusion import SAMPLERS
from diffusion.guidance import ScaleSchedule
from evaluator.small import SmallScores
from runtime.command_line import parse_config
from runtime.devices import choose_device
from runtime.documents import to_dict
from runtime.errors import UserError, run
from runtime.files import check_writable
from runtime.settings import Values, setting
from sampling.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Settings of sweep_guidance.py."""

    ckpt: Path | None = setting(None, "checkpoint, or a folder of runs: the newest")
    scales: tuple[float, ...] = setting((1.0, 1.1, 1.25, 1.5, 2.0, 3.0), "guidance scales")
    intervals: tuple[str, ...] = setting(("all",), "intervals of timesteps LOW:HIGH, or all")
    guide_ckpts: tuple[str, ...] = setting(("none",), "weaker networks of autoguidance, or none for unconditional rows")
    guidance_schedule: ScaleSchedule = setting("constant", "scale over time")
    sampler: str | None = setting(None, "sampler", tuple(SAMPLERS), shown="unipc; flow-unipc for flows")
    num_sampling_steps: int = setting(20, "number of steps")
    num_images: int = setting(1000, "images of every combination, of all classes in turn")
    seed: int = setting(0, "seed of the noise")
    output_dir: Path = setting(Path("results/guidance"), "folder of the table and the picture")
    device: Literal["cuda", "cpu"] | None = setting(None, "where to compute", shown="cuda if there is one")

    def __post_init__(self) -> None:
        if self.ckpt is None:
            raise ValueError("--ckpt: required")
        check_at_least(self, 4, "num_images")
        check_at_least(self, 1, "num_sampling_steps")
        if min(self.scales) < 1:
            raise ValueError(f"--scales {min(self.scales)}: must be at least 1 (1 is no guidance)")
        _ = self.bounds

    @property
    def bounds(self) -> dict[str, tuple[float, float] | None]:
        """Intervals by name; a ValueError for any other text."""
        bounds: dict[str, tuple[float, float] | None] = {}
        for text in self.intervals:
            low, _, high = text.partition(":")
            try:
                bounds[text] = None if text == "all" else (float(low), float(high))
            except ValueError:
                raise ValueError(f"--intervals {text}: must be LOW:HIGH, such as 200:800, or all") from None
        return bounds


@dataclass(frozen=True)
class SweepResult:
    """Scores of one combination."""

    guide: str
    interval: str
    scale: float
    scores: SmallScores


def open_all(config: SweepSettings) -> tuple[Opened, dict[str, Pipeline]]:
    """The network, and its pipeline with each of the guides.

    Raises:
        UserError: If there is no checkpoint, one does not fit, or the data set has no scores.
    """
    assert config.ckpt is not None
    paths = list(small.find_checkpoints([config.ckpt]))
    if not paths:
        raise UserError(f"--ckpt {config.ckpt}: no checkpoint there")
    device, path = choose_device(config.device), paths[-1]
    plain = samplers.open_network(path, device)
    if plain.scores is None:
        raise UserError(
            f"--ckpt {path}: trained on neither the digits nor Fashion-MNIST; there are no other scores here"
        )
    guided = {}
    for guide in config.guide_ckpts:
        settings: Values = {"device": device, "guidance": "autoguidance", "guide_ckpt": guide}
        guided[guide] = plain.pipeline if guide == "none" else Pipeline.from_pretrained(path, **settings)
    return plain, guided


def sweep(config: SweepSettings, plain: Opened, guided: dict[str, Pipeline]) -> Iterator[SweepResult]:
    """Sample and score without guidance, and by every guide, interval and scale."""
    if 1 in config.scales:
        yield score(config, plain, plain.pipeline, "none", "all", {"cfg_scale": 1.0})
    scales = [scale for scale in config.scales if scale != 1]
    for (guide, pipeline), (name, interval), scale in itertools.product(guided.items(), config.bounds.items(), scales):
        settings: Values = {"cfg_scale": scale, "guidance_schedule": config.guidance_schedule}
        settings |= {} if interval is None else {"guidance_interval": interval}
        yield score(config, plain, pipeline, guide, name, settings)


def score(
    config: SweepSettings, plain: Opened, pipeline: Pipeline, guide: str, interval: str, settings: Values
) -> SweepResult:
    """Sample by one combination and score the images."""
    assert plain.scores is not None
    sampler = config.sampler or {"gaussian": "unipc", "flow": "flow-unipc"}[pipeline.info.process]
    fixed: Values = {"sampler": sampler, "num_sampling_steps": str(config.num_sampling_steps)}
    latents, _, _ = samplers.sample(pipeline, fixed | settings, config.num_images, config.seed)
    images, labels = samplers.pictures(pipeline, latents), samplers.labels_of(pipeline, config.num_images)
    print(f"guide {guide}, interval {interval}, scale {settings['cfg_scale']:g}", file=sys.stderr)
    return SweepResult(guide, interval, settings["cfg_scale"], plain.scores(images, labels.numpy()))


def table(results: Sequence[SweepResult]) -> str:
    """Markdown, a row a combination."""
    columns = {"recognised": "accuracy", "Frechet distance": "frechet_distance", "precision": "precision"}
    columns |= {"recall": "recall", "nearest": "nearest_ratio"}
    rows = [
        [Path(each.guide).stem, each.interval, f"{each.scale:g}"]
        + [f"{getattr(each.scores, name):.3f}" for name in columns.values()]
        for each in results
    ]
    return aligned(["guide", "interval", "scale", *columns], rows, left=2)


def plot(results: Sequence[SweepResult], path: Path) -> None:
    """Draw the Frechet distance and the recall against the scale, a curve a guide and interval."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for axis, name, label in zip(axes, ("frechet_distance", "recall"), ("Frechet distance", "recall"), strict=True):
        unguided = [each for each in results if each.scale == 1]
        for guide, interval in dict.fromkeys((each.guide, each.interval) for each in results if each.scale != 1):
            own = [each for each in results if (each.guide, each.interval) == (guide, interval) and each.scale != 1]
            points = sorted((each.scale, getattr(each.scores, name)) for each in [*unguided, *own])
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"{Path(guide).stem}, {interval}")
        style(axis, "guidance scale", label)
    axes[0].axhline(results[0].scores.frechet_distance_of_test, color="0.5", linewidth=1, linestyle=":")
    axes[1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main(argv: Sequence[str]) -> None:
    """Parse flags, sample and score, print and write table and picture."""
    config = parse_config(SweepSettings, argv, program="sweep_guidance.py", doc=__doc__)
    check_writable(config.output_dir / "guidance.json", "--output-dir")
    results = list(sweep(config, *open_all(config)))
    document: Values = {"settings": to_dict(config), "rows": [dataclasses.asdict(result) for result in results]}
    text = table(results)
    write_tables(config.output_dir, "guidance", document, text)
    plot(results, config.output_dir / "guidance.png")
    print(text)


if __name__ == "__main__":
    sys.exit(run(main, "sweep_guidance.py"))
