"""The sets of small images that have scores, by their names: the digits, and Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.digits import Split, load_digits
from data.idx import load_split


def load_small(name: str, split: Split, path: Path | None) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Load images (N, H, W, 1) uint8 and labels (N,) int64 of a split.

    Args:
        name: digits, which need no path, or fashion.
        split: train or test.
        path: The one of `--data-path`.

    Raises:
        ValueError: Naming what is missing or damaged.
    """
    if name == "digits":
        return load_digits(split)
    if path is None:
        raise ValueError("Fashion-MNIST needs the folder of its idx files")
    return load_split(path, split)
