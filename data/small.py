"""The sets of small images and clips that have scores, by their names: digits, moving digits, and Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.digits import Split, load_digits
from data.idx import load_split
from data.moving_digits import DIRECTIONS, SPEEDS, MovingDigits


def load_small(name: str, split: Split, path: Path | None) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Load images (N, H, W, 1) uint8 and labels (N,) int64 of a split; of moving digits as `load_moving_digits`.

    Args:
        name: digits or moving-digits, which need no path, or fashion.
        split: train or test.
        path: The one of `--data-path`.

    Raises:
        ValueError: Naming what is missing or damaged.
    """
    if name == "digits":
        return load_digits(split)
    if name == "moving-digits":
        return load_moving_digits(split)
    if path is None:
        raise ValueError("Fashion-MNIST needs the folder of its idx files")
    return load_split(path, split)


def load_moving_digits(split: Split) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Load all clips of a split and what is in them.

    Returns:
        Clips (N, F, S, S, 1) uint8, and labels (N, 3) int64: digit, direction and speed, the last two by their place
        among `DIRECTIONS` and `SPEEDS`.
    """
    data = MovingDigits(split)
    motions = [data.motion(i) for i in range(len(data))]
    directions = list(DIRECTIONS)
    labels = [
        (data.digit(i), directions.index(motion.direction), SPEEDS.index(motion.speed))
        for i, motion in enumerate(motions)
    ]
    clips = np.stack([data.clip(i) for i in range(len(data))])[..., None]
    return clips, np.array(labels, np.int64)
