"""Fixed positions of a clip's frames, and those of weights resampled for another number of frames."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

FramePositions = Literal["interpolate", "extend"]


def frame_positions(width: int, places: np.ndarray) -> np.ndarray:
    """Compute fixed positions of frames at places (F,) in a clip, (F, D) float64."""
    angles = places[:, None] * _frequencies(width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def frame_position_table(width: int, frames: int) -> Tensor:
    """Compute fixed positions of frames (F, D) float64: sines, then cosines, of f * 10,000^(-k / (D / 2))."""
    return torch.from_numpy(frame_positions(width, np.arange(frames)))


def resample_frame_positions(table: Tensor, frames: int, how: FramePositions | None) -> Tensor:
    """Compute the positions of another number of frames from those in weights.

    The places of frames are read off the table, changed, and their sines and cosines computed: values between those of
    two rows would be too small, because the fastest sine turns by a radian a frame.

    Args:
        table: (1, F, D) positions in the weights, of evenly spaced frames.
        frames: F', the number of frames of the network.
        how: "interpolate" spreads F' frames over the span of F; "extend" keeps their spacing, so that the network sees
            later places than in its training if F' is larger.

    Returns:
        (1, F', D), of the table's type and device.

    Raises:
        ValueError: Without `how`, if the numbers differ; with it, if they are the same, or if it cannot be done.
    """
    own = table.shape[1]
    if own == frames:
        if how is not None:
            raise ValueError(f"--frame-positions {how}: has no effect, because the weights have these {frames} frames")
        return table
    if how is None:
        raise ValueError(
            f"made for {own} frames, not {frames}; give --frame-positions interpolate (the time of {own} frames in "
            f"{frames}) or extend (the interval of {own} frames), or --num-frames {own}"
        )
    if own < 2 and how == "interpolate":
        raise ValueError("--frame-positions interpolate: needs weights of at least 2 frames; give extend")
    places = _places(table[0].double().cpu().numpy())
    spacing = 1.0 if own < 2 else (places[-1] - places[0]) / (own - 1)
    if how == "interpolate":
        spacing *= (own - 1) / max(1, frames - 1)
    made = frame_positions(table.shape[2], places[0] + spacing * np.arange(frames))
    return torch.from_numpy(made)[None].to(table)


def _frequencies(width: int) -> np.ndarray:
    return np.asarray(10_000.0 ** -(np.arange(width // 2, dtype=np.float64) / (width // 2)))


def _places(table: np.ndarray) -> np.ndarray:
    """Read the places of frames off their slowest sine; a ValueError if the table (F, D) has other values."""
    half = table.shape[1] // 2
    places = np.arctan2(table[:, half - 1], table[:, -1]) / _frequencies(2 * half)[-1]
    if not np.allclose(frame_positions(2 * half, places), table, atol=1e-3):
        raise ValueError("--frame-positions: the weights have positions of frames that are no sines and cosines")
    return np.asarray(places)
