"""The two files of an evaluation, checked against the needs of the metrics before anything long begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluator.npz import BadImageFile, ImageFile, StoredStatistics
from evaluator.png_folder import open_images
from evaluator.report import is_sampled
from evaluator.scores import METRICS
from runtime.errors import UserError


@dataclass(frozen=True)
class EvaluationInput:
    """The reference or the samples, and the features that the metrics need of them.

    Attributes:
        title: "reference" or "samples".
        file: The images, their statistics, or both.
        count: Number of images to use, from the first one on.
        stored: Statistics in the file of exactly these images; preferred to computed ones, as in ADM.
        features: True if the network must process the images.
        spatial: True if statistics of spatial features must be computed.
    """

    title: str
    file: ImageFile
    count: int
    stored: StoredStatistics | None
    features: bool
    spatial: bool


def open_inputs(
    reference: Path, samples: Path, metrics: Sequence[str], num_samples: int | None = None
) -> tuple[EvaluationInput, EvaluationInput]:
    """Open both files.

    Args:
        reference: .npz of real images, their statistics, or both; or a folder of PNG files.
        samples: The same of generated images.
        metrics: Keys of `METRICS`.
        num_samples: Number of samples to use, the first ones; None takes all.

    Returns:
        The reference and the samples.

    Raises:
        UserError: If a file cannot be used, the resolutions differ, or a metric needs more than a file holds.
    """
    real, generated = open_images(reference), open_images(samples)
    if real.size and generated.size and real.size != generated.size:
        raise UserError(
            f"{samples}: images of {_shown(generated.size)} pixels, but {reference} has {_shown(real.size)}; "
            "take a reference of the same resolution"
        )
    count = generated.count if num_samples is None else num_samples
    if count > generated.count:
        raise UserError(f"--num-samples {count}: {samples} has {generated.count:,} images")
    of_reference = [name for name in metrics if METRICS[name].of_reference]
    return (
        _plan_input("reference", real, real.count, of_reference),
        _plan_input("samples", generated, count, metrics),
    )


def _plan_input(title: str, file: ImageFile, count: int, metrics: Sequence[str]) -> EvaluationInput:
    stored = file.statistics if count == file.count else None
    computed = [name for name in metrics if not (METRICS[name].statistics and _holds(stored, METRICS[name].spatial))]
    for name in computed:
        if count < METRICS[name].images:
            raise BadImageFile(
                f"{file.path}: {count or 'no'} images to use, but metric {name} needs at least {METRICS[name].images} "
                f"in the {title}; --metrics without {name} leaves it out"
            )
    spatial = any(METRICS[name].spatial for name in computed)
    return EvaluationInput(title, file, count, stored, bool(computed), spatial)


def _holds(stored: StoredStatistics | None, spatial: bool) -> bool:
    """True if statistics of these features are stored."""
    return stored is not None and (stored.spatial if spatial else stored.pool) is not None


def order_warnings(reference: EvaluationInput, samples: EvaluationInput) -> list[str]:
    """Signs that the two files are one, or in the wrong order."""
    first, second = reference.file.path, samples.file.path
    if first.resolve() == second.resolve():
        return [f"{second}: reference and samples are the same file"]
    signs = []
    if is_sampled(first) and not is_sampled(second):
        signs.append(f"{first} has the settings of a sampling job")
    if "VIRTUAL_imagenet" in second.name and "VIRTUAL_imagenet" not in first.name:
        signs.append(f"{second} has the name of a reference")
    if samples.file.has_statistics and not reference.file.has_statistics:
        signs.append(f"{second} holds statistics, as references do")
    return [f"{'; '.join(signs)}: the reference comes first, then the samples"] if signs else []


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
