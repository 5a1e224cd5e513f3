"""Score sampled digits, or clothes of Fashion-MNIST: a table, a picture (real next to sampled), the loss curve.

python scripts/digits_report.py --run quickstart_out/runs/000-DiT-digits-2 --samples quickstart_out/samples.npz
python scripts/digits_report.py --samples samples.npz --output-dir report --check
python scripts/digits_report.py --samples samples.npz --data-path /usr/share/datasets/fashion-mnist --output-dir report
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.plotting import pyplot, save_figure, style
from benchmarks.report import aligned
from data.array_images import array_digest
from data.pixels import grid
from data.small import load_small
from evaluator.report import read_protocol, write_document
from evaluator.small import DIGITS, FASHION, SmallScorer, SmallScores, SmallSet
from evaluator.small.report import scores_document
from evaluator.small.sets import NUM_CLASSES, SPLITS
from runtime.command_line import parse_config
from runtime.download import sha256_of
from runtime.errors import UserError, error_prefix, run
from runtime.files import check_writable
from runtime.json_file import json_lines
from runtime.settings import Values, setting

TILES_PER_CLASS = 10
TILE_SIZE = 48
CLASSES = {
    "digits": list("0123456789"),
    "fashion": "T-shirt,trousers,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(","),
}


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of digits_report.py."""

    samples: Path = setting(Path("quickstart_out/samples.npz"), "sampled images: arr_0, and their labels: arr_1")
    data_path: Path | None = setting(None, "folder of the idx files of Fashion-MNIST, if the samples are of it")
    run: Path | None = setting(None, "folder of the training run, for its loss curve")
    output_dir: Path = setting(Path("quickstart_out"), "folder of pictures and scores")
    check: bool = setting(False, "exit with status 1 if a goal is missed")


class Goal(NamedTuple):
    """One row of the table: a score, the goal or nothing, and the score of held-out real images."""

    name: str
    value: float
    goal: str
    met: bool
    real: float | None


def goals(scores: SmallScores, real_accuracy: float, of: SmallSet) -> list[Goal]:
    """All goals at once: accuracy alone would reward a model that samples the same ten images for ever."""
    assert scores.accuracy is not None
    real = scores.frechet_distance_of_test
    manifold = {"train": "training"}.get(of.manifold, of.manifold)
    least, limit, recall = (0.97, real, 0.85) if of is DIGITS else (real_accuracy - 0.05, 5 * real, None)
    return [
        Goal("recognised by an independent classifier", scores.accuracy, f">= {least:.2f}", scores.accuracy >= least,
             real_accuracy),
        Goal("Frechet distance to the training split", scores.frechet_distance, f"<= {limit:.2f}",
             scores.frechet_distance <= limit, real),
        Goal(f"recall of the {manifold} split", scores.recall, "" if recall is None else f">= {recall:.2f}",
             recall is None or scores.recall >= recall, None),
        Goal("distance to the nearest training image, ratio", scores.nearest_ratio, "> 0.80",
             scores.nearest_ratio > 0.8, 1.0),
    ]  # fmt: skip


def table(rows: Sequence[Goal]) -> str:
    """The goals as a Markdown table."""
    shown = [
        ("" if row.real is None else f"{row.real:.3f}", row.goal and "met" if row.met else "MISSED") for row in rows
    ]
    cells = [[row.name, f"{row.value:.3f}", row.goal, met, real] for row, (real, met) in zip(rows, shown, strict=True)]
    return aligned(["score", "samples", "goal", "", "real test split"], cells)


def read_samples(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images and labels of a sample file.

    Raises:
        UserError: If the file is missing, damaged, or lacks either.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["arr_0"], file["arr_1"]
    except OSError as error:
        raise UserError(f"--samples {path}: {error.strerror or error}") from error
    except KeyError as error:
        raise UserError(f"--samples {path}: lacks {error.args[0].split()[0]}; write it with sample_ddp.py") from error
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"--samples {path}: not a readable .npz of plain arrays") from error


def describe(path: Path, scores: SmallScores, scorer: SmallScorer, protocol: object) -> Values:
    """Describe the scores of a sample file in the form of the evaluator's results."""
    of, size = scorer.of, {"image_size": [scorer.of.image_size] * 2, "statistics": "computed"}
    real, held_out = (array_digest(*split) for split in (scorer.train, scorer.test))
    return scores_document(
        scores,
        of,
        reference={"sha256": real, "images": len(scorer.train[0]), "held_out_sha256": held_out, **size},
        samples={"path": str(path), "sha256": sha256_of(path), "images": scores.num_samples, **size},
        protocol=protocol,
        config={"set": of.name, "pr_precision": "float32", "manifold": of.manifold},
    )


def rows_by_class(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The first few images of each class as one sheet (H, W), a row a class; white where there are too few."""
    tiles = np.full((NUM_CLASSES * TILES_PER_CLASS, TILE_SIZE, TILE_SIZE, 1), 255, np.uint8)
    for k in range(NUM_CLASSES):
        for place, image in enumerate(images[labels == k][:TILES_PER_CLASS]):
            # Smoothly: eight by eight squares are hard to recognise
            enlarged = Image.fromarray(image[..., 0]).resize((TILE_SIZE, TILE_SIZE), Image.Resampling.BICUBIC)
            tiles[k * TILES_PER_CLASS + place, :, :, 0] = np.asarray(enlarged)
    return grid(tiles, TILES_PER_CLASS, gap=4)[0, :, :, 0]


def plot_sheets(
    real: npt.NDArray[np.uint8], sampled: npt.NDArray[np.uint8], classes: Sequence[str], caption: str, path: Path
) -> None:
    """Draw two sheets side by side, over a caption."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.8), layout="compressed")
    centres = TILE_SIZE / 2 + 4 + np.arange(NUM_CLASSES) * (TILE_SIZE + 4)
    for axis, sheet, title in zip(axes, (real, sampled), ("real", "sampled"), strict=True):
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(title, fontsize=13)
        axis.set_xticks([])
        axis.set_yticks(centres, classes, color="0.35")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.supxlabel(caption, fontsize=11, color="0.35")
    save_figure(figure, path)


def plot_loss(metrics: Sequence[Values], path: Path) -> None:
    """Draw the logged training loss against steps."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axis.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color="#1f5fa8", linewidth=1.8)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(plt.matplotlib.ticker.ScalarFormatter())
    axis.yaxis.set_minor_formatter(plt.matplotlib.ticker.ScalarFormatter())
    style(axis, "training step", "mean squared error of the noise", which="both")
    axis.annotate(f"{metrics[-1]['loss']:.3f}", (metrics[-1]["step"], metrics[-1]["loss"]), (4, 4),
                  textcoords="offset points", fontsize=9)  # fmt: skip
    save_figure(figure, path)


def read_metrics(folder: Path) -> list[Values]:
    """Read the metrics of a training run.

    Raises:
        UserError: If there are none.
    """
    try:
        records = [record for _, record in json_lines(folder / "metrics.jsonl") if record is not None]
    except OSError as error:
        raise UserError(f"--run {folder}: no metrics.jsonl there ({error.strerror})") from error
    if not records:
        raise UserError(f"--run {folder}: metrics.jsonl is empty; train for more steps than --log-every")
    return records


def main(argv: Sequence[str]) -> None:
    """Parse flags, score, plot, print."""
    config = parse_config(ReportSettings, argv, program="digits_report.py", doc=__doc__)
    images, labels = read_samples(config.samples)
    metrics = read_metrics(config.run) if config.run else []
    of, protocol = DIGITS if config.data_path is None else FASHION, read_protocol(config.samples)
    picture = config.output_dir / f"{of.name}.png"
    check_writable(picture, "--output-dir")
    with error_prefix("--data-path"):
        train, test = (load_small(of.name, split, config.data_path) for split in SPLITS)
    scorer = SmallScorer(train, test, of)
    with error_prefix(f"--samples {config.samples}"):
        scores = scorer.score(images, labels)
    rows = goals(scores, scorer.accuracy(*test), of)

    caption = f"{len(images):,} sampled: {scores.accuracy:.1%} recognised, Frechet distance "
    caption += f"{scores.frechet_distance:.1f} (real test images: {scores.frechet_distance_of_test:.1f})"
    pictures = [picture]
    plot_sheets(rows_by_class(*train), rows_by_class(images, labels), CLASSES[of.name], caption, picture)
    if metrics:
        pictures.append(config.output_dir / "loss.png")
        plot_loss(metrics, pictures[1])
    write_document(describe(config.samples, scores, scorer, protocol), config.output_dir / "scores.json")

    print(table(rows))
    print(f"(inception score {scores.inception_score:.2f}, precision {scores.precision:.3f})")
    print("Pictures: " + ", ".join(map(str, pictures)))
    if config.check and not all(row.met for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run(main, "digits_report.py"))
