"""Numbers to pixels, and pixels to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from runtime.files import atomic_path

Images = npt.NDArray[np.uint8]  # (N, H, W, C)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return images.float().div(127.5).sub(1)


def to_uint8(x: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> (N, H, W, C) uint8, rounded as the official 50,000-image sampler does."""
    return (127.5 * x).add_(128.0).clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def to_picture(x: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> (N, H, W, C) uint8, rounded as torchvision's `save_image` does."""
    unit = (x.clamp(-1, 1) + 1) / 2
    return torch.clamp(unit * 255 + 0.5, 0, 255).permute(0, 2, 3, 1).to(torch.uint8)


def grid(images: Images, columns: int, *, gap: int = 2, background: int = 255) -> Images:
    """Tiles images row by row: (N, H, W, C) -> (1, H', W', C); missing tiles of the last row stay background."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), background, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet[None]


def enlarge(images: Images, factor: int) -> Images:
    """Repeats pixels, so that tiny images can be looked at: (N, H, W, C) -> (N, H f, W f, C)."""
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def save_png(image: Images, path: Path) -> None:
    """Writes one image (H, W, C) with 1 or 3 channels, whole or not at all."""
    with atomic_path(path) as temporary:
        _picture(image).save(temporary)


def save_gif(images: Sequence[Images], path: Path, *, milliseconds: int = 120, last: int = 2000) -> None:
    """Writes an animation of images (H, W, C), whole or not at all; the last one stays for longer, then all repeats."""
    durations = [milliseconds] * (len(images) - 1) + [last]
    pictures = [_picture(image) for image in images]
    with atomic_path(path) as temporary:
        pictures[0].save(temporary, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def _picture(image: Images) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
