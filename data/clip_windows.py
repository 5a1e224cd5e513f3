"""All clips of a folder of videos in a fixed order, for what reads each of them once."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data.clip_folder import ClipFolder
from data.clip_settings import ClipSettings


class Place(NamedTuple):
    """Place of a clip: its video, and the number of its first frame there."""

    video: int
    start: int


class ClipWindows:
    """The clips of a folder of videos that follow each other without a common frame, at least one of each video.

    Arguments and errors as those of `ClipFolder`.

    Attributes:
        classes: Names of the classes.
        image_shape: (F, C, H, W).
    """

    def __init__(
        self, root: Path, size: tuple[int, int], *, frames: int, settings: ClipSettings, channels: int, strict: bool
    ) -> None:
        self._videos = ClipFolder(
            root, size, frames=frames, settings=settings, channels=channels, flip=False, strict=strict
        )
        self._settings = settings
        self.classes, self.image_shape = self._videos.classes, self._videos.image_shape
        hop = frames * settings.frame_interval
        self._places = [
            Place(video, start)
            for video in range(len(self._videos))
            for start in range(0, self._videos.count_places(video), hop)
        ]

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._places)

    def path(self, index: int) -> str:
        """Path of a clip's video relative to the root, and the number of its first frame: "cat/a.mp4#32"."""
        video, start = self._places[index]
        return f"{self._videos.path(video)}#{start}"

    def label(self, index: int) -> int:
        """Label of a clip, 0 without classes."""
        return self._videos.label(self._places[index].video)

    def read(self, index: int) -> Tensor:
        """Decode and crop a clip, not mirrored: (F, C, H, W), uint8, or float32 in [-1, 1] with published crops.

        Raises:
            UnreadableImageError: Naming the file, if it cannot be decoded.
            OSError: Naming the file, if it cannot be opened.
        """
        video, start = self._places[index]
        return self._videos.read(video, self._videos.numbers(video, start))

    def sizes_sha256(self) -> str:
        """Digest of the sizes and numbers of frames of all videos."""
        return self._videos.digest()

    def describe(self) -> dict[str, object]:
        """Settings of the clips, as JSON values."""
        return asdict(self._settings)
