"""Weights that come with the code: small, whole, and of what they say."""

from pathlib import Path

import numpy as np
import pytest

from evaluator.small import DIGITS, FASHION, SmallSet, predict_targets
from sampling.pipeline import Pipeline

FOLDER = Path(__file__).resolve().parents[2] / "demo"


@pytest.mark.parametrize(("name", "images", "share"), [("digits", DIGITS, 0.95), ("clothes", FASHION, 0.6)])
def test_weights_in_the_repository_make_pictures_of_their_classes(name: str, images: SmallSet, share: float) -> None:
    """Judged by the networks that scores of these sets are computed with, in as few evaluations as their cards say."""
    assert sum(file.stat().st_size for file in (FOLDER / name).iterdir()) < 2_000_000
    pipeline = Pipeline.from_pretrained(FOLDER / name, device="cpu")
    assert sum(row.call for row in pipeline.prepare().table) == 10
    labels = [*range(10)] * 10
    classes = predict_targets(pipeline.sample(labels, seed=1), images)[:, 0]
    assert np.mean(classes == labels) >= share, "of real test pictures .99 and .87"


def test_cards_of_the_weights_have_a_licence_and_scores_of_these_weights() -> None:
    for name in ("digits", "clothes"):
        card = (FOLDER / name / "README.md").read_text()
        assert "license: apache-2.0" in card and f"sample.py --ckpt demo/{name}\n" in card
        assert "| accuracy | 0." in card and "measured with weights" not in card
