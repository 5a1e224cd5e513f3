"""Settings of clips that are cut from videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.settings import setting

Window = Literal["every", "linspace", "strided"]
Crop = Literal["adm", "resize", "square"]
FRAMES = 16  # of a clip, unless stated otherwise


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """Cutting of clips from videos.

    Raises:
        ValueError: Naming the flag and its value.
    """

    frame_interval: int = setting(1, "frames of a video from one frame of a clip to the next")
    clip_window: Window = setting(
        "every",
        "place of a clip: every one that fits, or as published: linspace (FaceForensics, UCF101; short videos at a "
        "smaller interval), strided (SkyTimelapse, Taichi); these never take the last place",
    )
    clip_crop: Crop = setting(
        "adm",
        "crop of frames: adm, as of images, or as published: resize, then crop (FaceForensics, UCF101, Taichi), or "
        "square: crop, then resize (SkyTimelapse); these do not smooth what they shrink",
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.frame_interval < 1:
            raise ValueError(f"--frame-interval {self.frame_interval}: must be at least 1")
