"""Captioned digits: what captions say is what is seen."""

from itertools import product

import numpy as np
import pytest
import torch

from data import CaptionedDigits, open_dataset
from data.captioned_digits import KINDS, SIZES, Content, caption
from data.digits import load_digits
from data.moving_digits import DIRECTIONS
from data.words import WORDS


@pytest.fixture(scope="module")
def clips() -> CaptionedDigits:
    return CaptionedDigits("test")


@pytest.fixture(scope="module")
def pictures() -> CaptionedDigits:
    return CaptionedDigits("test", frames=1)


def centre(frame: np.ndarray) -> np.ndarray:
    """Centre of mass of a frame: row, column."""
    weights = frame.astype(np.float64)
    return np.array([(axis * weights).sum() for axis in np.indices(frame.shape)]) / weights.sum()


def words(text: dict[str, torch.Tensor]) -> str:
    """The caption that was encoded."""
    numbers = text["text"][..., : len(WORDS)].argmax(dim=-1)[text["text_mask"] == 1]
    return " ".join(WORDS[i] for i in numbers)


def test_every_digit_has_every_size_and_direction(clips: CaptionedDigits, pictures: CaptionedDigits) -> None:
    assert len(clips) == len(pictures) == 500 * KINDS
    assert clips.image_shape == (8, 1, 16, 16) and pictures.image_shape == (1, 1, 16, 16)
    kinds = {clips.content(i)[1:] for i in range(KINDS)}
    assert kinds == set(product(SIZES, DIRECTIONS))
    assert [clips.content(i).digit for i in range(0, 80, KINDS)] == load_digits("test")[1][:10].tolist()


def test_clips_move_as_their_captions_say(clips: CaptionedDigits) -> None:
    starts = []
    for index in range(160):
        clip, content = clips.clip(index), clips.content(index)
        starts.append(centre(clip[0]))
        assert np.allclose(centre(clip[-1]) - starts[-1], 3 * np.array(DIRECTIONS[content.direction]))
        rows = np.flatnonzero(clip[0].any(axis=1))
        assert np.ptp(rows) + 1 <= SIZES[content.size] and len(np.unique(clip.reshape(8, -1).sum(1))) == 1
        assert words(clips[0, index][1]) == f"{caption(content, moving=True)} </s>"
    assert (np.ptp(starts, axis=0) > 4).all(), "places vary"


def test_pictures_show_their_digit_where_their_captions_say(pictures: CaptionedDigits) -> None:
    right, names, steps = 0, list(DIRECTIONS), np.array(list(DIRECTIONS.values()))
    for index in range(400):
        off, content = centre(pictures.clip(index)[0]) - 7.5, pictures.content(index)
        right += names[(steps @ off).argmax()] == content.direction
        assert words(pictures[0, index][1]) == f"{caption(content, moving=False)} </s>"
    assert right >= 396, "few digits are much heavier on one side"


def test_captions_in_words() -> None:
    seven = Content(7, "small", "right")
    assert caption(seven, moving=True) == "a small seven moving right"
    assert caption(seven._replace(direction="up"), moving=False) == "a small seven at the top"
    assert caption(seven, moving=True, size=False) == "a seven moving right"
    assert caption(seven, moving=False, size=False, place=False) == "a seven"


def test_training_captions_leave_out_details_and_change_with_the_epoch() -> None:
    data = CaptionedDigits("train", seed=3)
    said = [words(data[epoch, 12][1]).removesuffix(" </s>") for epoch in range(200)]
    content = data.content(12)
    kinds = {caption(content, True, size, place): (size, place) for size, place in product((True, False), repeat=2)}
    assert set(said) == set(kinds) and 120 < said.count(caption(content, True)) < 160
    assert words(data[7, 12][1]) == words(CaptionedDigits("train", seed=3)[7, 12][1])


def test_joint_images_are_pictures_with_their_own_captions() -> None:
    joint, plain = CaptionedDigits("train", joint_images=3), CaptionedDigits("train", frames=1)
    frames, text, _ = joint[0, 9]
    assert frames.shape == joint.image_shape == (11, 1, 16, 16) and text["text"].shape == (4, 8, 32)
    assert torch.equal(frames[:8, 0], torch.from_numpy(joint.clip(9))) and text["text_mask"].shape == (4, 8)
    known = {plain.clip(i).tobytes(): plain.content(i) for i in range(len(plain))}
    for row, frame in enumerate(frames[8:, 0].numpy(), start=1):
        said = words({name: leaf[row] for name, leaf in text.items()})
        content = known[frame.tobytes()]
        assert said.split()[-2] in (*caption(content, moving=False).split(), "small", "large") and "moving" not in said
    assert not torch.equal(joint[0, 9][0][8:], joint[1, 9][0][8:])


def test_the_empty_caption_is_the_unconditional_one(clips: CaptionedDigits) -> None:
    assert words(clips.null_conditioning) == "</s>" and clips.null_conditioning["text"].shape == (8, 32)


def test_splits_and_settings_have_digests(clips: CaptionedDigits, pictures: CaptionedDigits) -> None:
    digests = {data.digest() for data in (clips, pictures, CaptionedDigits("train"))}
    assert len(digests) == 3 and clips.digest() == CaptionedDigits("test").digest()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 11}, "11 frames of 16 pixels: digits would leave the square; 17 are enough"),
        ({"image_size": 13}, "8 frames of 13 pixels: digits would leave the square; 15 are enough"),
        ({"image_size": (16, 20)}, "are square, not 16 x 20"),
        ({"flip": True}, "--flip: the captioned digits are not mirrored"),
        ({"frames": 1, "joint_images": 2}, "--joint-images 2: follow clips, and these are pictures"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset("captioned-digits", None, **{"image_size": 16, "channels": 1, **options})
