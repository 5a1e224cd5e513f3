"""Files of samples: images and clips through one interface.

    writer = writer_of(shape)                    # by the shape of a sample, (C, H, W) or (F, C, H, W)
    samples = writer.to_uint8(pixels)            # (N, H, W, C) or (N, F, H, W, C)
    writer.save(samples, path, columns=4)        # a picture or an animation, by the suffix

A further kind of samples is a subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from data.pixels import GAP, Images, grid, save_gif, save_mp4, save_png, strips, to_picture, to_uint8

FPS = 8  # frames a second, as published


class Writer:
    """Files of images; base class of the other kinds.

    Attributes:
        unit: Word for one sample.
        suffixes: Files of one sample that can be written.
    """

    unit: ClassVar[str] = "image"
    suffixes: ClassVar[tuple[str, ...]] = (".png",)

    def to_uint8(self, pixels: Tensor) -> Tensor:
        """Map (N, ..., C, H, W) in [-1, 1] to (N, ..., H, W, C) uint8, rounded as in published jobs."""
        return to_uint8(pixels)

    def overviews(self, path: Path) -> tuple[Path, ...]:
        """Files that show all samples, where `path` is that of the picture."""
        return (path,)

    def sheet(self, samples: Images, columns: int, gap: int = GAP, texts: Sequence[str] = ()) -> Images:
        """Lay all samples out in one picture (H', W', C), with a text under each if there are any."""
        return grid(with_texts(samples, texts), columns, gap=gap)[0]

    def save(
        self,
        samples: Images,
        path: Path,
        columns: int = 1,
        *,
        gap: int = 0,
        software: str = "",
        texts: Sequence[str] = (),
        note: str = "",
    ) -> None:
        """Write samples into one file, whole or not at all.

        Args:
            samples: (N, ..., H, W, C) with 1 or 3 channels.
            path: The file; its suffix decides what is written.
            columns: Samples in a row.
            gap: White pixels around each.
            software: Noted in the file.
            texts: Texts under the samples; none if it is empty.
            note: Further text in pictures and GIFs, as `data.pixels.save_png` takes it.
        """
        save_png(self.sheet(samples, columns, gap, texts), path, software, note)


class ClipWriter(Writer):
    """Files of clips: animations with the clips side by side, or a picture with one row a clip.

    Args:
        fps: Frames a second of animations, 1 to 50.
    """

    unit = "clip"
    suffixes = (".png", ".gif", ".mp4")
    animations: ClassVar[dict[str, Callable[[Sequence[Images], Path, int, str, str], None]]] = {}

    def __init__(self, fps: int = FPS) -> None:
        self.fps = fps

    def to_uint8(self, pixels: Tensor) -> Tensor:
        """Map (N, F, C, H, W) in [-1, 1] to (N, F, H, W, C) uint8, rounded as in Skip-DiT's and Latte's samplers."""
        return to_picture(pixels)

    def overviews(self, path: Path) -> tuple[Path, ...]:
        """The picture, and the animation that is always written."""
        return path, path.with_suffix(".gif")

    def sheet(self, samples: Images, columns: int, gap: int = GAP, texts: Sequence[str] = ()) -> Images:
        """Lay the clips out in one picture (H', W', C), one row a clip, its frames side by side."""
        if not texts:
            return super().sheet(samples, samples.shape[1], gap)
        rows = np.concatenate([grid(clip, len(clip), gap=gap) for clip in samples])
        return super().sheet(rows, 1, 0, texts)

    def save(
        self,
        samples: Images,
        path: Path,
        columns: int = 1,
        *,
        gap: int = 0,
        software: str = "",
        texts: Sequence[str] = (),
        note: str = "",
    ) -> None:
        """Write clips (N, F, H, W, C) into one file: .gif and .mp4 are animations, others pictures."""
        animation = self.animations.get(path.suffix.lower())
        if animation is None:
            return super().save(samples, path, columns, gap=gap, software=software, texts=texts, note=note)
        frames = [grid(with_texts(moment, texts), columns, gap=gap)[0] for moment in samples.swapaxes(0, 1)]
        animation(frames, path, self.fps, software, note)


def with_texts(images: Images, texts: Sequence[str]) -> Images:
    """Images (N, H, W, C) with a text under each, if there are any."""
    if not texts:
        return images
    return np.concatenate([images, strips(texts, images.shape[2], images.shape[3])], axis=1)


def _save_gif(frames: Sequence[Images], path: Path, fps: int, software: str, note: str) -> None:
    """Write a GIF; its unit of time is 1/100 second, so durations alternate where they have to."""
    ends = [round(100 * k / fps) for k in range(len(frames) + 1)]
    save_gif(frames, path, [10 * (b - a) for a, b in zip(ends, ends[1:], strict=False)], software, note)


def _save_mp4(frames: Sequence[Images], path: Path, fps: int, software: str, note: str) -> None:
    """Write a video, which has no note."""
    save_mp4(frames, path, fps, software)


ClipWriter.animations.update({".gif": _save_gif, ".mp4": _save_mp4})


def writer_of(shape: Sequence[int], fps: int = FPS) -> Writer:
    """Writer for samples of a shape, (C, H, W) or (F, C, H, W)."""
    return Writer() if len(shape) == 3 else ClipWriter(fps)
