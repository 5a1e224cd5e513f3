"""Clips of videos: which frames they have, and how frames are cropped; as is usual, and as published.

Source: the data code released with Latte (arXiv 2401.03048) and Skip-DiT (arXiv 2411.17616), for "linspace", "strided",
"resize" and "square".
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from data.clip_settings import Crop, Window
from data.image_folder import center_crop


def frames_needed(rule: Window, frames: int, interval: int) -> int:
    """Smallest number of frames of a video that a clip is cut from."""
    return frames if rule == "linspace" else (frames - 1) * interval + 1


def count_places(rule: Window, total: int, frames: int, interval: int) -> int:
    """Number of first frames 0, 1, ... that a clip may have in a video of `total` frames; 0 if it is too short.

    Those of "linspace" and "strided" are one fewer than fit, as published.
    """
    if total < frames_needed(rule, frames, interval):
        return 0
    if rule == "every":
        return total - (frames - 1) * interval
    return max(0, total - frames * interval - 1) + 1


def frame_numbers(rule: Window, total: int, start: int, frames: int, interval: int) -> list[int]:
    """Numbers of the frames of a clip that starts at `start` in a video of `total` frames."""
    if rule == "linspace":
        end = min(start + frames * interval, total)
        numbers: list[int] = np.linspace(start, end - 1, frames).astype(np.int64).tolist()
        return numbers
    return list(range(start, start + frames * interval, interval))


def crop_frame(frame: Image.Image, size: tuple[int, int], crop: Crop) -> Tensor:
    """Crop an image to (H, W): (C, H, W) uint8 by "adm", float32 in [-1, 1] by the published ones (squares only)."""
    if crop == "adm":
        frame = center_crop(frame, size)
    pixels = torch.from_numpy(np.array(frame))
    pixels = pixels.view(*pixels.shape[:2], -1).permute(2, 0, 1)
    return pixels.contiguous() if crop == "adm" else published_crop(pixels[None], size[0], crop)[0]


def published_crop(frames: Tensor, side: int, crop: Crop) -> Tensor:
    """Crop frames (N, C, H, W) uint8 to squares (N, C, S, S) float32 in [-1, 1], bilinearly without antialiasing."""
    x, shorter = frames.float() / 255, min(frames.shape[-2:])
    if crop == "square":
        x = interpolate(_centre(x, shorter), size=(side, side), mode="bilinear", align_corners=False)
    else:
        scale = side / shorter
        if int(shorter * scale) == side:
            x = interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
        else:  # the factor is rounded, and the side would be a pixel short
            size = [max(side, int(n * scale)) for n in x.shape[-2:]]
            x = interpolate(x, size=size, mode="bilinear", align_corners=False)
        x = _centre(x, side)
    return (x - 0.5) / 0.5


def _centre(x: Tensor, side: int) -> Tensor:
    top, left = (round((n - side) / 2) for n in x.shape[-2:])
    return x[..., top : top + side, left : left + side]
