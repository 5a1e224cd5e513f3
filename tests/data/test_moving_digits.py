"""The moving digits: what moves where, and the split."""

import hashlib

import numpy as np
import pytest
import torch

from data import MovingDigits, open_dataset
from data.digits import load_digits
from data.moving_digits import DIRECTIONS, SPEEDS, Motion


@pytest.fixture(scope="module")
def clips() -> MovingDigits:
    return MovingDigits("test")


def centre(frame: np.ndarray) -> np.ndarray:
    """Centre of mass of a frame: row, column."""
    weights = frame.astype(np.float64)
    grid = np.indices(frame.shape)
    return np.array([(axis * weights).sum() for axis in grid]) / weights.sum()


def test_every_digit_moves_in_every_direction_at_every_speed(clips: MovingDigits) -> None:
    kinds = len(DIRECTIONS) * len(SPEEDS)
    assert len(clips) == 500 * kinds and clips.image_shape == (8, 1, 16, 16)
    assert {clips.motion(i) for i in range(kinds)} == {Motion(d, s) for d in DIRECTIONS for s in SPEEDS}
    assert [clips.digit(i) for i in range(0, 80, kinds)] == load_digits("test")[1][:10].tolist()
    for index in range(40):
        assert clips.classes[clips.label(index)] == f"{clips.digit(index)} {clips.motion(index).direction}"


def test_the_centre_of_mass_moves_as_said(clips: MovingDigits) -> None:
    for index in range(160):
        clip, motion = clips.clip(index), clips.motion(index)
        moved = centre(clip[-1]) - centre(clip[0])
        assert np.allclose(moved, np.array(DIRECTIONS[motion.direction]) * int(motion.speed * 7))
        assert len({int(frame.astype(np.int64).sum()) for frame in clip}) == 1, "no pixel is lost at a border"


def test_places_are_spread_over_the_square(clips: MovingDigits) -> None:
    first = np.array([centre(clips.clip(index)[0]) for index in range(400)])
    assert (first.min(0) < 4.5).all() and (first.max(0) > 10.5).all()


def test_clips_are_a_function_of_split_and_index_and_the_splits_are_disjoint(clips: MovingDigits) -> None:
    again, train = MovingDigits("test"), MovingDigits("train")
    assert all(np.array_equal(clips.clip(i), again.clip(i)) for i in (0, 17, 3999))
    assert len(train) == 1297 * 8 and train.digest() != clips.digest() == again.digest()
    content = hashlib.sha256(np.stack([clips.clip(i) for i in range(0, 4000, 40)]).tobytes()).hexdigest()
    assert content == "d9a1f13d28f3d374dbf7f2345a3c63ceebdec7d6b2db7e537a455fa95b846044"


def test_items_are_clips_with_labels_and_joint_images_have_their_own() -> None:
    plain, joint = MovingDigits("train"), MovingDigits("train", joint_images=3, seed=1)
    clip, label, index = plain[0, 9]
    assert clip.shape == (8, 1, 16, 16) and clip.dtype == torch.uint8 and (label, index) == (plain.label(9), 9)
    both, labels, _ = joint[0, 9]
    assert joint.image_shape == both.shape == (11, 1, 16, 16) and torch.equal(both[:8], clip)
    assert isinstance(labels, dict) and int(labels["y"]) == label and labels["image_labels"].shape == (3,)
    assert torch.equal(joint[0, 9][0], both) and not torch.equal(joint[1, 9][0], both), "others in every epoch"
    pictures = {train.tobytes(): k for train, k in zip(*load_digits("train"), strict=True)}
    for image, k in zip(both[8:, 0].numpy(), labels["image_labels"].tolist(), strict=True):
        windows = (image[r : r + 8, c : c + 8] for r in range(9) for c in range(9))
        assert k // 4 in {pictures.get(window.tobytes()) for window in windows}, "a whole digit of its label"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 10, "image_size": 16}, r"10 frames of 16 pixels: digits would leave the square; 17 pixels"),
        ({"frames": 1, "image_size": 16}, "1 frames: a clip needs at least 2"),
        ({"image_size": (16, 20)}, "are square, not 16 x 20"),
        ({"image_size": 16, "flip": True}, "--flip: the moving digits are not mirrored"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset("moving-digits", None, channels=1, **options)


def test_image_data_have_no_frames() -> None:
    with pytest.raises(ValueError, match="--num-frames 8: the data set digits has images, not clips"):
        open_dataset("digits", None, None, 1, frames=8)
    with pytest.raises(ValueError, match="--joint-images 2: the data set digits has images, not clips"):
        open_dataset("digits", None, None, 1, joint_images=2)
