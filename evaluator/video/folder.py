"""A folder of videos, or of folders of frames, in the place of an .npz of clips."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from evaluator.npz import BadImageFile, ImageFile, Images
from evaluator.video.i3d import CLIP_FRAMES


class Videos(Protocol):
    """Videos that can be decoded frame by frame (`data.clip_folder.ClipFolder`)."""

    def __len__(self) -> int:
        """Number of videos that are long enough."""

    def count_places(self, index: int) -> int:
        """Number of first frames that a window of a video may have."""

    def files(self, index: int, numbers: Sequence[int]) -> list[Path]:
        """Files that hold some frames of a video."""

    def decode(self, index: int, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Yield some frames of a video as they are."""

    def read(self, index: int, numbers: Sequence[int]) -> Tensor:
        """Decode and crop some frames of a video: (len(numbers), C, H, W) uint8."""


class VideoOpener(NamedTuple):
    """Opens folders of videos.

    Attributes:
        suffixes: Suffixes of video files, in lower case.
        open: Maps a folder, the size (H, W) that its frames are cropped to, and an interval of frames to its videos
            that are long enough for a window, and warnings.
    """

    suffixes: tuple[str, ...]
    open: Callable[[Path, tuple[int, int], int], tuple[Videos, list[str]]]

    def recognises(self, path: Path) -> bool:
        """True for a folder that holds video files, itself or in the folders of its classes."""
        files = itertools.chain(path.glob("*.*"), path.glob("*/*.*"))
        return path.is_dir() and any(file.suffix.lower() in self.suffixes for file in files)


class VideoFolder(ImageFile):
    """The videos of a folder; windows are decoded when they are needed.

    Args:
        path: The folder.
        opener: Opens it.
        size: Height and width that frames are cropped to, as ADM crops images; None keeps them as they are, which must
            all be of one size.
        interval: Frames from one of a window to the next.

    Attributes:
        warnings: Lines about videos that cannot be used.

    Raises:
        BadImageFile: If it holds no usable videos.
    """

    has_statistics, statistics = False, None

    def __init__(self, path: Path, opener: VideoOpener, size: tuple[int, int] | None, interval: int) -> None:
        self.path, self._crops, self._interval = path, size is not None, interval
        try:
            # frames that keep their size are never cropped
            self._videos, self.warnings = opener.open(path, size or (1, 1), interval)
            if size is None:
                first = next(iter(self._videos.decode(0, [0])))
                size = first.height, first.width
        except (OSError, ValueError) as error:
            raise self._refusal(error) from error
        self._size = size

    @property
    def count(self) -> int:
        """Number of videos."""
        return len(self._videos)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self._size

    @property
    def frames(self) -> int:
        """Number of frames of the shortest video."""
        span = (CLIP_FRAMES - 1) * self._interval
        return span + min(map(self._videos.count_places, range(self.count)))

    def as_frames(self) -> ImageFile:
        """Raise a BadImageFile: lengths differ, and all frames would be decoded for every metric."""
        raise BadImageFile(f"{self.path}: a folder of videos has metric fvd alone; give an .npz of clips for others")

    def count_starts(self, index: int, span: int) -> int:
        """Number of first frames that a window may have in a video, at the interval that the folder was opened with."""
        return self._videos.count_places(index)

    def windows(self, chosen: Mapping[int, range]) -> Iterator[Images]:
        """Decode the chosen frames (n, H, W, 3) of videos."""
        for index, numbers in chosen.items():
            try:
                yield self._read(index, numbers)
            except (OSError, ValueError) as error:
                raise self._refusal(error) from error

    def windows_sha256(self, chosen: Mapping[int, range]) -> str:
        """Return the sha256 of the sha256 of all files that hold these frames, in their order."""
        digest = hashlib.sha256()
        try:
            for index, numbers in chosen.items():
                for file in self._videos.files(index, numbers):
                    digest.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError as error:
            raise self._refusal(error) from error
        return digest.hexdigest()

    def describe_source(self) -> dict[str, object]:
        """Describe where the clips are from, for the result."""
        return {"source": "folder of videos"}

    def describe_windows(self) -> dict[str, object]:
        """Describe how frames are read, for the result."""
        height, width = self._size
        crop = f"to {height} x {width} pixels, as ADM crops images" if self._crops else "none"
        return {"source": "folder of videos", "crop": crop}

    def _read(self, index: int, numbers: Sequence[int]) -> Images:
        if self._crops:
            return self._videos.read(index, numbers).movedim(1, -1).numpy()
        frames = np.stack([np.asarray(frame) for frame in self._videos.decode(index, numbers)])
        if frames.shape[1:3] != self._size:
            sides = (f"{width} x {height}" for height, width in (frames.shape[1:3], self._size))
            raise ValueError(
                f"{self._videos.files(index, numbers)[0]}: {' pixels, but the first video has '.join(sides)}; samples "
                "are not resized"
            )
        return frames

    def _refusal(self, error: Exception) -> BadImageFile:
        reason = getattr(error, "strerror", None) or str(error)
        named = getattr(error, "filename", None) or self.path
        return BadImageFile(reason if str(self.path) in reason else f"{named}: {reason}")
