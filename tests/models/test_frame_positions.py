"""Positions of frames against their closed form."""

import math
from itertools import pairwise

import pytest
import torch

from models.frame_positions import frame_position_table, resample_frame_positions

WIDTH = 1152
TABLE = frame_position_table(WIDTH, 16)[None].float()


def closed_form(place: float) -> torch.Tensor:
    angles = [place * 10_000 ** (-2 * k / WIDTH) for k in range(WIDTH // 2)]
    return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)


@pytest.mark.parametrize("frames", [1, 2, 8, 16, 31, 64])
def test_interpolated_frames_span_the_time_of_the_weights(frames: int) -> None:
    made = resample_frame_positions(TABLE, frames, "interpolate" if frames != 16 else None)
    assert made.dtype == torch.float32 and made.shape == (1, frames, WIDTH)
    for i, row in enumerate(made[0]):
        torch.testing.assert_close(row.double(), closed_form(15 * i / max(1, frames - 1)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("frames", [1, 8, 40])
def test_extended_frames_keep_their_interval(frames: int) -> None:
    made = resample_frame_positions(TABLE, frames, "extend")
    torch.testing.assert_close(made[0].double(), frame_position_table(WIDTH, frames), rtol=0, atol=2e-5)
    halves = resample_frame_positions(TABLE, 31, "interpolate")
    further = resample_frame_positions(halves, frames, "extend")  # every half frame
    for i, row in enumerate(further[0]):
        torch.testing.assert_close(row.double(), closed_form(i / 2), rtol=0, atol=1e-4)


def test_interpolated_frames_are_interpolated_once_more() -> None:
    twice = resample_frame_positions(resample_frame_positions(TABLE, 31, "interpolate"), 61, "interpolate")
    torch.testing.assert_close(twice, resample_frame_positions(TABLE, 61, "interpolate"), rtol=0, atol=1e-4)
    lengths, steps = twice[0].norm(dim=1), [(b - a).norm() for a, b in pairwise(twice[0])]
    assert lengths.std() < 1e-4 < min(steps) and max(steps) / min(steps) < 1.001  # no frame is nearer to the origin


def test_what_has_no_meaning_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^made for 16 frames, not 8; give --frame-positions interpolate .* or --num-fra"
    ):
        resample_frame_positions(TABLE, 8, None)
    with pytest.raises(ValueError, match=r"^--frame-positions extend: has no effect, because .* these 16 frames$"):
        resample_frame_positions(TABLE, 16, "extend")
    with pytest.raises(ValueError, match="needs weights of at least 2 frames; give extend"):
        resample_frame_positions(TABLE[:, :1], 4, "interpolate")
    with pytest.raises(ValueError, match="no sines and cosines"):
        resample_frame_positions(torch.randn(1, 4, 64), 8, "extend")
    assert resample_frame_positions(TABLE, 16, None) is TABLE
