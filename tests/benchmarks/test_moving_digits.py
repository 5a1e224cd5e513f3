"""Scores of moving digits: real clips, clips with a fault, and the limits of what counts as motion."""

import numpy as np
import pytest

from benchmarks.moving_digits import ClipScorer, centres, direction_of, pictures
from data.moving_digits import DIRECTIONS, SPEEDS, MovingDigits


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer(MovingDigits("train"), MovingDigits("test"))


def test_held_out_clips_are_recognised_and_all_move(scorer: ClipScorer) -> None:
    scores = scorer.score(*scorer.real(scorer.test))
    assert scores.num_samples == 500 and scores.accuracy > 0.97 and scores.motion == scores.direction == 1.0
    assert scores.nearest_ratio == 1.0 and 0.7 < scores.frechet_ratio < 1.4


def test_shuffled_frames_do_not_move_and_wrong_labels_are_not_recognised(scorer: ClipScorer) -> None:
    clips, labels = scorer.real(scorer.test, 100)
    rng = np.random.default_rng(0)
    shuffled = scorer.score(np.stack([clip[rng.permutation(len(clip))] for clip in clips]), labels)
    assert shuffled.motion < 0.1 and shuffled.accuracy > 0.9, "the digit is still there"
    other = scorer.score(clips, (labels + 4) % 40)
    assert other.accuracy < 0.05 and other.direction == 1.0, "the next digit, in the same direction"
    other = scorer.score(clips, labels ^ 2)
    assert other.accuracy > 0.9 and (other.direction, other.motion) == (0, 1), "the opposite direction"
    still = scorer.score(np.repeat(clips[:, :1], clips.shape[1], axis=1), labels)
    assert still.motion == 0
    assert shuffled.frechet_ratio > 2 and still.frechet_ratio > 2


def test_copies_and_noise_are_told_from_new_clips(scorer: ClipScorer) -> None:
    clips, labels = scorer.real(scorer.train, 50)
    copies = scorer.score(clips, labels)
    assert copies.nearest_ratio == 0 and copies.frechet_ratio < 2
    noise = np.random.default_rng(0).integers(0, 256, clips.shape, dtype=np.uint8)
    scores = scorer.score(noise, labels)
    assert scores.motion == 0 and scores.accuracy < 0.4 and scores.nearest_ratio > 1.5
    assert scores.frechet_ratio > 5


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("name", DIRECTIONS)
def test_directions_are_those_of_steady_paths(name: str, speed: float) -> None:
    path = 5 + speed * np.arange(8)[:, None] * np.array(DIRECTIONS[name])
    assert direction_of(path, 8) == name
    jump = path.copy()
    jump[4] += 3
    assert direction_of(jump, 8) is None
    assert direction_of(path + np.arange(8)[:, None] * np.array(DIRECTIONS[name])[::-1] * 0.9, 8) is None, "oblique"


def test_a_digit_is_followed_and_faint_noise_is_not() -> None:
    clip = np.zeros((1, 8, 16, 16, 1), np.uint8)
    for frame in range(8):
        clip[0, frame, 4:6, frame : frame + 2] = 200
    assert np.allclose(centres(clip)[0], [[4.5, frame + 0.5] for frame in range(8)])
    assert np.array_equal(centres(np.maximum(clip, 30)), centres(clip))
    assert np.allclose(centres(np.zeros_like(clip)), 7.5)
    picture = pictures(clip)[0]
    assert picture.shape == (10, 10) and picture.max() == 200 and (picture > 0).sum() == 4, (
        "sharp: aligned in all frames"
    )


def test_sizes_and_numbers_without_a_frechet_distance(scorer: ClipScorer) -> None:
    assert scorer.score(*scorer.real(scorer.test, 1)).frechet_ratio is None
    other = ClipScorer(MovingDigits("train", frames=4), MovingDigits("test", frames=4))
    assert other.score(*other.real(other.test, 3)).frechet_ratio is None


def test_clips_of_another_size_are_refused(scorer: ClipScorer) -> None:
    with pytest.raises(ValueError, match=r"\(2, 8, 12, 12, 1\) with 2 labels; these are \(8, 1, 16, 16\)"):
        scorer.score(np.zeros((2, 8, 12, 12, 1), np.uint8), np.zeros(2, np.int64))
