"""Scores of samples during training: digits have their own, photographs are compared with a given reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluator.inception.network import load_network
from evaluator.inception.weights import default_cache, find_weights, inspect_weights
from evaluator.metrics import frechet_distance, frechet_distance_from_features, inception_score
from evaluator.npz import ImageFile
from evaluator.small import MOVING_DIGITS, compute_features, predict_targets
from evaluator.statistics import feature_statistics
from runtime import distributed
from runtime.errors import UserError, error_prefix, is_first
from runtime.stores import fetch
from training.config import TrainSettings


class Scorer(NamedTuple):
    """The score of images that arrive a few at a time, so that never all of them are kept.

    Attributes:
        features: Maps (n, H, W, C) uint8 images to the rows that are kept; on all processes.
        scores: Maps the features of all images (N, ...) and their labels (N,), None without any, to scores; on rank 0.
    """

    features: Callable[[Tensor], Tensor]
    scores: Callable[[Tensor, Tensor | None], dict[str, float]]


def open_scorer(config: TrainSettings, image_shape: tuple[int, ...], device: torch.device) -> Scorer | None:
    """The scorer that a run's settings ask for; None without one. A collective operation.

    Args:
        config: Settings of the run.
        image_shape: (C, H, W) of the samples, or (F, C, H, W).
        device: Device of the feature network.

    Raises:
        UserError: If the reference or the network's weights cannot be used.
    """
    settings = config.validation
    if config.data.dataset == "digits":
        return Scorer(lambda images: images, digits_scores)
    if config.data.dataset == "moving-digits":
        return Scorer(lambda clips: clips, moving_digits_scores) if has_scores(image_shape) else None
    return (
        None
        if settings.eval_reference is None
        else open_inception(fetch(settings.eval_reference, "--eval-reference"), image_shape[-2:], device)
    )


def has_scores(image_shape: tuple[int, ...]) -> bool:
    """True if the committed network takes moving digits of this shape (F, 1, H, W)."""
    frames, channels, *size = image_shape
    return (frames, *size, channels) == MOVING_DIGITS.shape


def moving_digits_scores(clips: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Frechet distance of clips, and shares with the requested digit and direction, from the committed network."""
    from data.moving_digits import DIRECTIONS

    samples = clips.cpu().numpy()
    features, _ = compute_features(samples, MOVING_DIGITS)
    scores = {"frechet_distance": frechet_distance_from_features(_features_of_training(), features, biased=True)}
    if labels is None:
        return scores
    digit, direction, *_ = predict_targets(samples, MOVING_DIGITS).T
    requested = labels.numpy()
    right = {"accuracy": digit == requested // len(DIRECTIONS), "direction": direction == requested % len(DIRECTIONS)}
    return scores | {name: float(each.mean()) for name, each in right.items()}


@cache
def _features_of_training() -> npt.NDArray[np.float32]:
    from data.small import load_moving_digits

    return compute_features(load_moving_digits("train")[0], MOVING_DIGITS)[0]


def digits_scores(images: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Frechet distance and recognised share of digits, from the committed feature network."""
    from data import load_digits
    from evaluator.small import SmallScorer

    classes = None if labels is None else labels.numpy()
    scores = SmallScorer(load_digits("train"), load_digits("test")).score(images.cpu().numpy(), classes)
    accuracy = {} if scores.accuracy is None else {"accuracy": scores.accuracy}
    return {"frechet_distance": scores.frechet_distance, **accuracy}


def open_inception(reference: Path, image_size: tuple[int, ...], device: torch.device) -> Scorer:
    """FID to a reference's stored statistics and Inception Score, by ADM's network.

    FID falls with the number of images: a few thousand show a run's course, and compare with as many only.
    """
    flag = f"--eval-reference {reference}"
    file = ImageFile(reference)
    if file.size not in (None, image_size):
        raise UserError(f"{flag}: its images are of {file.size} pixels, this run's of {image_size}")
    if file.statistics is None or file.statistics.pool is None:
        raise UserError(f"{flag}: holds no mu and sigma, as ADM's references do; take one of those")
    reference_statistics = file.statistics.pool
    weights = distributed.on_rank0(lambda: inspect_weights(find_weights(None, default_cache(), offline=False)))
    with error_prefix(str(weights.path)):
        network = load_network(weights.path, device)

    def features(images: Tensor) -> Tensor:
        return network.features(images.cpu().numpy()).pool

    def scores(rows: Tensor, labels: Tensor | None) -> dict[str, float]:
        statistics = feature_statistics(rows.cpu())
        score = inception_score(network.probabilities(rows))
        return {"fid": frechet_distance(reference_statistics, statistics), "inception_score": score}

    with error_prefix(flag):
        width = network.features(torch.zeros(1, *image_size, 3, dtype=torch.uint8).numpy()).pool.shape[1]
        if len(reference_statistics.mean) != width:
            raise ValueError(f"its mu has {len(reference_statistics.mean):,} numbers, the network {width:,} features")
    if weights.warning is not None and is_first():
        print(f"warning: {weights.warning}: these scores are not comparable with published ones", file=sys.stderr)
    return Scorer(features, scores)
