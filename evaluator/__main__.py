"""Score generated images against real ones: Inception Score, FID, sFID, precision and recall, as ADM defines them.

    python evaluator/evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz
    torchrun --nproc-per-node 8 evaluator/evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz
    python -m evaluator photos/ samples.npz --metrics kid
    python -m evaluator compare a.scores.json b.scores.json

Standard output is ADM's lines. samples.scores.json holds everything that is needed to compare the numbers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import runtime  # noqa: F401  # first: it reports other packages named models
from data.clip_folder import ClipFolder
from data.clip_settings import ClipSettings
from data.photos import Photos
from data.video_files import EXTENSIONS
from evaluator.compare import CompareConfig, compare
from evaluator.evaluation import evaluate
from evaluator.inputs import Openers
from evaluator.settings import EvaluatorConfig
from evaluator.video.folder import VideoOpener, Videos
from evaluator.video.i3d import CLIP_FRAMES
from runtime import distributed
from runtime.command_line import parse_config
from runtime.errors import run

COMPARE = """Say in which points the protocols of two results differ, and which of their scores may be compared.

    python -m evaluator compare a.scores.json b.scores.json
"""


def open_videos(path: Path, size: tuple[int, int], interval: int) -> tuple[Videos, list[str]]:
    """Open a folder of videos, those that are long enough; returns it, and warnings about the others.

    Raises:
        ValueError: If it has none.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        settings = ClipSettings(frame_interval=interval)
        folder = ClipFolder(path, size, frames=CLIP_FRAMES, settings=settings, flip=False)
    return folder, [str(warning.message) for warning in caught]


OPENERS = Openers(VideoOpener(EXTENSIONS, open_videos), Photos)


def main(argv: Sequence[str]) -> None:
    """Parse the flags and evaluate, or compare two results."""
    if argv[:1] == ["compare"]:
        compare(parse_config(CompareConfig, argv[1:], program="evaluator compare", doc=COMPARE))
        return
    config = parse_config(EvaluatorConfig, argv, program="evaluator", doc=__doc__)
    with distributed.world(config.device) as world:
        evaluate(config, world, OPENERS)


if __name__ == "__main__":
    sys.exit(run(main, "evaluator"))
