"""Scores of captioned digits: real samples are right, and faults are found."""

import numpy as np
import pytest

from benchmarks.captioned_digits import TextScorer
from data.captioned_digits import CaptionedDigits


@pytest.mark.parametrize("frames", [8, 1])
def test_real_samples_are_what_their_captions_say_and_others_are_not(frames: int) -> None:
    scorer = TextScorer(CaptionedDigits("train", frames=frames))
    samples, contents = scorer.real(CaptionedDigits("test", frames=frames))
    right = scorer.score(samples, contents)
    assert right.digit > 0.97 and right.size > 0.99 and right.direction > 0.97
    wrong = scorer.score(samples, contents[1:] + contents[:1])
    assert wrong.digit < 0.2 and wrong.direction < 0.1
    turned = scorer.score(samples[:, ::-1] if frames > 1 else samples[:, :, ::-1, ::-1], contents)
    assert turned.direction < 0.02 and turned.size == right.size
    noise = np.random.default_rng(0).integers(0, 256, samples[:50].shape, dtype=np.uint8)
    assert scorer.score(noise, contents[:50]).digit < 0.4
    assert scorer.directions(np.zeros_like(samples[:2])) == [None, None]
