"""The two files of an evaluation, checked against the needs of the metrics before anything long begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evaluator.metrics import ADM_SPLIT_SIZE
from evaluator.npz import BadImageFile, ImageFile, StoredStatistics
from evaluator.picture_folder import PictureFolder, PictureOpener
from evaluator.report import is_sampled
from evaluator.scores import METRICS
from evaluator.video.folder import VideoFolder, VideoOpener
from evaluator.video.windows import ClipWindows
from runtime.errors import UserError

TITLES = ("reference", "samples")


class Openers(NamedTuple):
    """Openers of folders, which other packages read: of videos and of images."""

    videos: VideoOpener
    pictures: PictureOpener


@dataclass(frozen=True)
class EvaluationInput:
    """The reference or the samples, and the features that the metrics need of them.

    Attributes:
        title: "reference" or "samples".
        file: The images, their statistics, or both; frames or windows of clips are files, too.
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


Pair = tuple[EvaluationInput, EvaluationInput]  # the reference and the samples


def open_files(
    reference: Path, samples: Path, openers: Openers, *, of_clips: bool = False, interval: int = 1
) -> tuple[ImageFile, ImageFile]:
    """Open both files.

    Args:
        reference: .npz of real images, their statistics, or both; a folder of images, which are cropped to the size of
            the samples; or an .npz of clips, or a folder of videos or of folders of frames.
        samples: The same of generated images or clips, none of them resized.
        openers: How folders are opened.
        of_clips: True if a metric of clips is asked for, so that folders hold videos; they do, too, if they hold video
            files, or if the other file holds clips.
        interval: Frames from one to the next in windows of the reference.

    Raises:
        UserError: If a file cannot be used, or the two differ in resolution, or in being clips.
    """
    files = [None if path.is_dir() else ImageFile(path) for path in (reference, samples)]
    of_clips = of_clips or any(file is not None and file.frames is not None for file in files)
    of_clips = of_clips or any(map(openers.videos.recognises, (reference, samples)))

    def open_folder(path: Path, size: tuple[int, int] | None, interval: int) -> ImageFile:
        if of_clips:
            return VideoFolder(path, openers.videos, size, interval)
        return PictureFolder(path, openers.pictures, size)

    generated = files[1] or open_folder(samples, None, 1)
    real = files[0] or open_folder(reference, generated.size, interval)
    if (real.frames is None) != (generated.frames is None):
        clips, images = (reference, samples) if generated.frames is None else (samples, reference)
        raise UserError(
            f"{images}: holds no clips, but {clips} does; give two files of clips, arr_0 (N, F, H, W, 3), or two of "
            "images, (N, H, W, 3)"
        )
    if real.size and generated.size and real.size != generated.size:
        raise UserError(
            f"{samples}: images of {_shown(generated.size)} pixels, but {reference} has {_shown(real.size)}; "
            "take a reference of the same resolution"
        )
    return real, generated


def plan_inputs(
    real: ImageFile, generated: ImageFile, metrics: Sequence[str], num_samples: int | None = None
) -> Pair | None:
    """Plan the metrics of images; of clips, all frames are the images.

    Args:
        real: The reference.
        generated: The samples.
        metrics: Keys of `METRICS`; those of clips are left out.
        num_samples: Number of samples to use, the first ones; None takes all.

    Returns:
        The reference and the samples; None without a metric of images.

    Raises:
        UserError: If a metric needs more than a file holds.
    """
    count = count_samples(generated, num_samples) * (generated.frames or 1)
    metrics = [name for name in metrics if not METRICS[name].clips]
    if not metrics:
        return None
    real, generated = real.as_frames(), generated.as_frames()
    of_reference = [name for name in metrics if METRICS[name].of_reference]
    return (
        _plan_input(TITLES[0], real, real.count, of_reference),
        _plan_input(TITLES[1], generated, count, metrics),
    )


def plan_clips(
    real: ImageFile, generated: ImageFile, num_samples: int | None, num_reference: int | None, interval: int, seed: int
) -> Pair:
    """Plan the metrics of clips: windows of real ones, and the first frames of generated ones.

    Args:
        real: The reference.
        generated: The samples.
        num_samples: Number of samples to use, the first ones; None takes all.
        num_reference: Number of clips of the reference to use, a random choice; None takes all.
        interval: Take every interval-th frame of the reference.
        seed: Seed of the choice, and of the first frames of the reference's windows.

    Raises:
        UserError: If there are too few clips, or they are too short.
    """
    chosen = real.count if num_reference is None else num_reference
    if chosen > real.count:
        raise UserError(f"--num-reference {chosen}: {real.path} has {real.count:,} clips")
    windows = (
        ClipWindows(real, chosen, interval=interval, seed=seed),
        ClipWindows(generated, count_samples(generated, num_samples)),
    )
    first, second = (_plan_input(title, each, each.count, ["fvd"]) for title, each in zip(TITLES, windows, strict=True))
    return first, second


def count_samples(generated: ImageFile, num_samples: int | None) -> int:
    """Number of samples to use; a UserError if there are fewer than asked for."""
    count = generated.count if num_samples is None else num_samples
    if count > generated.count:
        kind = "images" if generated.frames is None else "clips"
        raise UserError(f"--num-samples {count}: {generated.path} has {generated.count:,} {kind}")
    return count


def _plan_input(title: str, file: ImageFile, count: int, metrics: Sequence[str]) -> EvaluationInput:
    stored = file.statistics if count == file.count else None
    computed = [name for name in metrics if not (METRICS[name].statistics and _holds(stored, METRICS[name].spatial))]
    for name in computed:
        if count < METRICS[name].images:
            kind = "images" if file.frames is None else "clips"
            raise BadImageFile(
                f"{file.path}: {count or 'no'} {kind} to use, but metric {name} needs at least {METRICS[name].images} "
                f"in the {title}; --metrics without {name} leaves it out"
            )
    spatial = any(METRICS[name].spatial for name in computed)
    return EvaluationInput(title, file, count, stored, bool(computed), spatial)


def _holds(stored: StoredStatistics | None, spatial: bool) -> bool:
    """True if statistics of these features are stored."""
    return stored is not None and (stored.spatial if spatial else stored.pool) is not None


def order_warnings(reference: ImageFile, samples: ImageFile, num_samples: int | None = None) -> list[str]:
    """Signs that files or images are in the wrong order, or the files are one; and what opening them found."""
    first, second = reference.path, samples.path
    if first.resolve() == second.resolve():
        return [f"{second}: reference and samples are the same file", *reference.warnings]
    signs, found = [], [*reference.warnings, *samples.warnings]
    if samples.is_sorted_by_folder and (num_samples is not None or samples.count > ADM_SPLIT_SIZE):
        found.append(
            f"{second}: its images come folder by folder; if these are classes, --num-samples takes few of them, and "
            "so does each split of the Inception Score, which comes out too low; number images through all folders"
        )
    if is_sampled(first) and not is_sampled(second):
        signs.append(f"{first} has the settings of a sampling job")
    if "VIRTUAL_imagenet" in second.name and "VIRTUAL_imagenet" not in first.name:
        signs.append(f"{second} has the name of a reference")
    if samples.has_statistics and not reference.has_statistics:
        signs.append(f"{second} holds statistics, as references do")
    return found + ([f"{'; '.join(signs)}: the reference comes first, then the samples"] if signs else [])


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
