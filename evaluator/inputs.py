"""The two files of an evaluation, checked against what the metrics need before anything long begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluator.npz import BadImageFile, ImageFile, StoredStatistics
from evaluator.scores import METRICS
from runtime.errors import UserError


@dataclass(frozen=True)
class Side:
    """The reference or the samples, and what has to be found out about them.

    Attributes:
        title: "reference" or "samples".
        file: the images, the statistics, or both.
        count: images to use, from the first one on.
        stored: statistics that the file brings for just these images; they go before computed ones, as in ADM.
        features: whether the network must see the images.
        spatial: whether statistics of spatial features must be computed.
    """

    title: str
    file: ImageFile
    count: int
    stored: StoredStatistics | None
    features: bool
    spatial: bool


def open_sides(
    reference: Path, samples: Path, metrics: Sequence[str], num_samples: int | None = None
) -> tuple[Side, Side]:
    """Opens both files.

    Args:
        reference: .npz of real images, their statistics, or both.
        samples: .npz of generated images.
        metrics: keys of `METRICS`.
        num_samples: use only the first images of the samples; None takes all.

    Returns:
        The reference and the samples.

    Raises:
        UserError: if a file is no good, both do not belong together, or one lacks what a metric needs.
    """
    real, generated = ImageFile(reference), ImageFile(samples)
    if real.size and generated.size and real.size != generated.size:
        raise UserError(
            f"{samples}: images of {_shown(generated.size)} pixels, but {reference} has {_shown(real.size)}; "
            "take a reference of the same resolution"
        )
    count = generated.count if num_samples is None else num_samples
    if count > generated.count:
        raise UserError(f"--num-samples {count}: {samples} has {generated.count:,} images")
    of_reference = [name for name in metrics if METRICS[name].of_reference]
    return _side("reference", real, real.count, of_reference), _side("samples", generated, count, metrics)


def _side(title: str, file: ImageFile, count: int, metrics: Sequence[str]) -> Side:
    stored = file.statistics if count == file.count else None
    to_compute = [name for name in metrics if stored is None or not METRICS[name].statistics]
    for name in to_compute:
        if count < METRICS[name].images:
            raise BadImageFile(
                f"{file.path}: {count or 'no'} images to use, but metric {name} needs at least {METRICS[name].images} "
                f"in the {title}; --metrics without {name} leaves it out"
            )
    spatial = any(METRICS[name].spatial for name in to_compute)
    return Side(title, file, count, stored, bool(to_compute), spatial)


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
