"""The frames of clips that the Frechet video distance is computed from: which clips, and which 16 frames of each.

Published protocols differ here, so that their numbers do not compare: Latte's evaluation takes every third frame of
real videos, Skip-DiT's consecutive ones. Generated clips give their first 16 frames in both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from evaluator.npz import BadImageFile, ImageFile, Images
from evaluator.video.i3d import CLIP_FRAMES
from runtime.seeds import derive_seed


class ClipWindows(ImageFile):
    """Windows of 16 frames, one of each chosen clip, in the order of the clips.

    Args:
        file: File of clips.
        count: Number of clips to choose, 1 to `file.count`.
        interval: Take every interval-th frame, >= 1.
        seed: Seed of a random choice of clips and of the first frames; None takes the first clips, from their start.

    Raises:
        BadImageFile: If the clips are too short.
    """

    has_statistics, statistics = False, None

    def __init__(self, file: ImageFile, count: int, *, interval: int = 1, seed: int | None = None) -> None:
        self.file, self.path, self.interval, self.seed = file, file.path, interval, seed
        length, span = file.frames or 0, (CLIP_FRAMES - 1) * interval + 1
        if length < span:
            remedy = "give longer clips"
            if interval > 1:
                remedy += f", or --frame-interval {(length - 1) // (CLIP_FRAMES - 1)}" if length >= CLIP_FRAMES else ""
            needed = f"{CLIP_FRAMES} frames" + (f" at --frame-interval {interval} need {span}" if interval > 1 else "")
            raise BadImageFile(
                f"{file.path}: its clips have {length} frames, but {needed}"
                f"{'' if interval > 1 else ' are needed'} for metric fvd; {remedy}"
            )
        if seed is None:
            self.starts = dict.fromkeys(range(count), 0)
        else:
            order = sorted(range(file.count), key=lambda i: derive_seed("choice of clips", seed, i))
            self.starts = {
                i: derive_seed("start of a window", seed, i) % file.count_starts(i, span) for i in sorted(order[:count])
            }
        self._windows = {i: range(start, start + span, interval) for i, start in self.starts.items()}

    @property
    def count(self) -> int:
        """Number of windows."""
        return len(self.starts)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the frames."""
        return self.file.size

    @property
    def frames(self) -> int:
        """Number of frames of a window."""
        return CLIP_FRAMES

    @property
    def name(self) -> str:
        """Part of the name of a file of features, made of everything that they depend on, the clips apart."""
        return f"i3d-{self.count}-{self.interval}-{'first' if self.seed is None else self.seed}"

    def verified_sha256(self, *, read_to_end: bool = True) -> str:
        """Check the clips against their checksum, and return the sha256 of what holds them."""
        return self.file.windows_sha256(self._windows)

    def batches(self, start: int, stop: int, size: int) -> Iterator[Images]:
        """Yield windows start .. stop - 1 in batches (n, 16, H, W, 3), as `ImageFile` does."""
        windows = self.file.windows(dict(list(self._windows.items())[start:stop]))
        while batch := list(itertools.islice(windows, size)):
            yield np.stack(batch)

    def describe(self) -> dict[str, object]:
        """Describe the windows, for the result."""
        return {
            "clips": self.count,
            "clips_in_file": self.file.count,
            "frames_in_file": self.file.frames,
            "chosen": "the first" if self.seed is None else "at random",
            "window": "the first 16 frames" if self.seed is None else "from a random frame",
            "frame_interval": self.interval,
            "seed": self.seed,
            **self.file.describe_windows(),
        }

    def __str__(self) -> str:
        """Say how many clips and which frames of them, in words."""
        every = "" if self.interval == 1 else f", one in {self.interval}"
        if self.seed is None:
            return f"{self.count:,} clips ({CLIP_FRAMES} frames from the first on{every})"
        return f"{self.count:,} clips ({CLIP_FRAMES} frames from a random one on{every}, seed {self.seed})"
