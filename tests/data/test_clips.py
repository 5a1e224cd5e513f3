"""Windows and crops of clips, against recorded ones and by their properties."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.clip_settings import ClipSettings
from data.clips import count_places, crop_frame, frame_numbers, frames_needed, published_crop
from data.image_folder import center_crop
from data.pixels import to_picture
from tests.golden_data import arrays, table

ARRAYS = arrays("latte/c2v_data/io")
WINDOWS = table("latte/c2v_data/windows")


@pytest.mark.parametrize("row", WINDOWS)
def test_recorded_windows(row: dict) -> None:
    total, frames, interval = row["total_frames"], row["num_frames"], row["frame_interval"]
    for rule in ("linspace", "strided"):
        places = count_places(rule, total, frames, interval)
        assert places == (row["max_start"] + 1 if rule == "linspace" or row["strided_is_usable"] else 0)
        start = 0 if row["draw"] == "low" else places - 1
        if places:
            assert frame_numbers(rule, total, start, frames, interval) == row[rule]


def test_every_place_that_fits_is_taken_and_no_other() -> None:
    assert count_places("every", 46, 16, 3) == 1 and count_places("every", 45, 16, 3) == 0
    for total in range(1, 30):
        places = count_places("every", total, 4, 3)
        ends = [frame_numbers("every", total, start, 4, 3)[-1] for start in range(places)]
        assert ends == list(range(9, total)), "up to the last frame, and never beyond"
        assert (total >= frames_needed("every", 4, 3)) == bool(places)


def test_frames_of_published_windows_are_in_the_video() -> None:
    for rule in ("linspace", "strided"):
        for total in range(1, 60):
            for start in range(count_places(rule, total, 4, 3)):
                numbers = frame_numbers(rule, total, start, 4, 3)
                assert len(numbers) == 4 and 0 <= numbers[0] and numbers[-1] < total and numbers == sorted(numbers)


@pytest.mark.parametrize(("crop", "name"), [("resize", "ucf"), ("square", "sky")])
def test_recorded_crops(crop: str, name: str) -> None:
    for clip, case in ((ARRAYS["clip"], name), (ARRAYS["clip"].transpose(-1, -2), f"tall.{name}")):
        torch.testing.assert_close(published_crop(clip, 16, crop), ARRAYS[f"{case}.out"], rtol=0, atol=1e-6)
        frame = Image.fromarray(clip[1].permute(1, 2, 0).contiguous().numpy())
        torch.testing.assert_close(crop_frame(frame, (16, 16), crop), ARRAYS[f"{case}.out"][1], rtol=0, atol=1e-6)


def test_recorded_pixels() -> None:
    values: Tensor = ARRAYS["pixels.in"]
    assert torch.equal(to_picture(values.view(-1, 1, 1)).flatten(), ARRAYS["pixels.out"])


@pytest.mark.parametrize("side", [63, 64, 240, 256])
def test_published_crops_have_the_side_whatever_the_factor_rounds_to(side: int) -> None:
    for height, width in ((49, 61), (48, 48), (61, 107), (64, 64), (271, 270)):
        frames = torch.full((1, 3, height, width), 255, dtype=torch.uint8)
        for crop in ("resize", "square"):
            torch.testing.assert_close(published_crop(frames, side, crop), torch.ones(1, 3, side, side))


def test_frames_are_cropped_as_images_by_default() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 35, 3)).astype(np.uint8)
    frame = Image.fromarray(pixels)
    expected = torch.from_numpy(np.array(center_crop(frame, (8, 12)))).permute(2, 0, 1)
    assert torch.equal(crop_frame(frame, (8, 12), "adm"), expected)
    assert crop_frame(frame.convert("L"), (8, 8), "adm").shape == (1, 8, 8)


def test_an_interval_is_positive() -> None:
    with pytest.raises(ValueError, match="--frame-interval 0: must be at least 1"):
        ClipSettings(frame_interval=0)
