"""Scores of a card: of which weights they are, and what is shown of documents that say little."""

from typing import Any

import pytest

from runtime.errors import UserError
from sampling.cards.scores import check_scores, show_scores
from tests.evaluator.test_compare import BASE as IMAGES
from tests.evaluator.test_compare import CLIPS

OURS: dict[str, Any] = {
    "weights": "ema-0.9999",
    "sources": [{"file": "model.safetensors", "sha256": "b"}, {"file": "0000004.safetensors", "sha256": "a"}],
}


def document(sha256: str | None, weights: str | None = "ema-0.9999", **more: Any) -> dict[str, Any]:
    checkpoint = {"file": "0000004.safetensors", "sha256": sha256, "model": "DiT-digits/2", "weights": weights, **more}
    return {"scores": {"fid": 3.5}, "protocol": {"checkpoint": checkpoint}}


@pytest.mark.parametrize(
    "scores",
    [
        document("a"),
        document("b"),
        document("a", None),
        document("c", sources=[{"file": "0000004.safetensors", "sha256": "a"}]),  # of a published folder
        document("a", None) | {"config": {"checkpoint": {"weights": "ema"}}},
        document(None),
        {"scores": {}, "protocol": None},
        {"scores": {}},
    ],
)
def test_scores_of_these_weights_and_of_unknown_ones_are_taken(scores: dict[str, Any]) -> None:
    check_scores(scores, OURS, "--scores a.json")


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (document("c"), r"of 0000004.safetensors \(DiT-digits/2, ema-0.9999\), not of these weights$"),
        (document("a", "model"), r"\(DiT-digits/2, model\), not of these weights \(ema-0.9999\)$"),
        (document("a", "ema-0.99"), r"not of these weights \(ema-0.9999\)$"),
        (document("c", sources=[{"file": "x", "sha256": "d"}]), "not of these weights$"),
    ],
)
def test_scores_of_other_weights_are_refused(scores: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"^--scores a.json: .*{words}"):
        check_scores(scores, OURS, "--scores a.json")


def test_a_document_before_weights_were_recorded_says_them_in_its_settings() -> None:
    scores = document("a", None)
    scores["protocol"]["config"] = {"checkpoint": {"weights": "model"}}
    with pytest.raises(UserError, match="not of these weights"):
        check_scores(scores, OURS, "--scores a.json")
    scores["protocol"]["config"]["checkpoint"]["weights"] = "ema"
    check_scores(scores, OURS, "--scores a.json")


def test_what_is_not_recorded_is_said() -> None:
    text = "\n".join(show_scores({"a.json": {"scores": {"fid": 3.5}, "samples": {"images": 6}}}))
    for line in [
        "| fid | 3.5 |", "| weights | from which weights is not recorded |", "| samples | 6 images |",
        "> **Warning:** 6 samples are few", "| settings of the samples | not recorded |",
    ]:  # fmt: skip
        assert line in text, line


def test_the_evaluators_documents_are_shown() -> None:
    """One of images, and one of clips."""
    card = "\n".join(show_scores({"a": IMAGES, "b": CLIPS}))
    images, clips = card.split("### b")
    for line in [
        "| samples | 50,000 images, 256 x 256 pixels |", "| reference | VIRTUAL.npz; 10,000 images", "| fid | 2.27 |",
        "| sampler | not recorded |", "| weights | SHA-256 `cccccccccccc...` |",
    ]:  # fmt: skip
        assert line in images, line
    assert f"| samples | {CLIPS['video_network']['samples']['clips']:,} clips of" in clips
    assert "evaluator's video network" in clips and "evaluator's network" not in clips


@pytest.mark.parametrize(("scored", "own"), [(None, "bf16"), ("bf16", None), ("bf16", "bf16"), (None, None)])
def test_scores_of_weights_before_their_rounding_have_a_warning(scored: str | None, own: str | None) -> None:
    checkpoint = {"sha256": "a"} | ({} if scored is None else {"rounded": scored})
    document = {"scores": {"fid": 3.5}, "protocol": {"checkpoint": checkpoint}}
    text = "\n".join(show_scores({"a.json": document}, own))
    assert ("**Warning:** measured with weights" in text) == (scored != own)
