"""Scores of drawn images during training: for the digits by themselves, for photographs where a reference is given."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from evaluator.inception.network import load_network
from evaluator.inception.weights import default_cache, find_weights, inspect_weights
from evaluator.metrics import feature_statistics, frechet_distance, inception_score
from evaluator.npz import ImageFile
from runtime import distributed
from runtime.errors import UserError, blame

if TYPE_CHECKING:
    from training.config import TrainConfig


class Scorer(NamedTuple):
    """How images are scored a few at a time, so that never all of them are kept.

    Attributes:
        features: what is kept of (n, H, W, C) uint8 images: a row each; on all processes.
        scores: of the features of all images (N, ...) and the labels asked for (N,), on the main process.
    """

    features: Callable[[Tensor], Tensor]
    scores: Callable[[Tensor, Tensor], dict[str, float]]


def open_scorer(config: TrainConfig, image_size: tuple[int, int], device: torch.device) -> Scorer | None:
    """The scorer that a run's settings ask for; None where nothing scores its images. Called by all processes.

    Args:
        config: of the run.
        image_size: (H, W) of what it draws.
        device: where features are computed.

    Raises:
        UserError: if the reference or the network's weights cannot be used.
    """
    if config.eval_every is None or not config.eval_samples:
        return None
    if config.dataset == "digits":
        return Scorer(lambda images: images, digits_scores)
    return None if config.eval_reference is None else open_inception(config.eval_reference, image_size, device)


def digits_scores(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Frechet distance and recognised share of digits, from the committed feature network."""
    from data import load_digits
    from evaluator.digits import score_digits

    scores = score_digits(images.cpu().numpy(), labels.numpy(), train=load_digits("train"), test=load_digits("test"))
    assert scores.accuracy is not None  # they have labels
    return {"frechet_distance": scores.frechet_distance, "accuracy": scores.accuracy}


def open_inception(reference: Path, image_size: tuple[int, int], device: torch.device) -> Scorer:
    """FID to a reference's stored statistics and Inception Score, by ADM's network.

    FID falls with the number of images: a few thousand show a run's course, and compare with as many only.
    """
    flag = f"--eval-reference {reference}"
    file = ImageFile(reference)
    if file.size not in (None, image_size):
        raise UserError(f"{flag}: its images are of {file.size} pixels, this run's of {image_size}")
    if file.statistics is None:
        raise UserError(f"{flag}: holds no mu and sigma, as ADM's references do; take one of those")
    known = file.statistics.pool
    weights = distributed.by_main(lambda: inspect_weights(find_weights(None, default_cache(), offline=False)))
    with blame(str(weights.path)):
        network = load_network(weights.path, device)

    def features(images: Tensor) -> Tensor:
        return network.features(images.cpu().numpy()).pool

    def scores(rows: Tensor, labels: Tensor) -> dict[str, float]:
        found = feature_statistics(rows.cpu())
        score = inception_score(network.probabilities(rows))
        return {"fid": frechet_distance(known, found), "inception_score": score}

    with blame(flag):
        width = network.features(torch.zeros(1, *image_size, 3, dtype=torch.uint8).numpy()).pool.shape[1]
        if len(known.mean) != width:
            raise ValueError(f"its mu has {len(known.mean):,} numbers, the network {width:,} features")
    if weights.doubt is not None and os.environ.get("RANK", "0") == "0":
        print(f"note: {weights.doubt}: these scores compare with nobody's", file=sys.stderr)
    return Scorer(features, scores)
