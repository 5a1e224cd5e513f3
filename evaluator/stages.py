"""The networks of an evaluation, each with the files that it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from evaluator.inception.backend import Backend, FeatureBackend
from evaluator.inception.network import load_network
from evaluator.inception.tensorflow_backend import TensorFlowBackend
from evaluator.inception.weights import Weights, find_weights, inspect_weights
from evaluator.inputs import Pair
from evaluator.settings import EvaluatorConfig
from evaluator.video.i3d import CLIP_FRAMES
from evaluator.video.weights import find_i3d, load_i3d
from evaluator.video.windows import ClipWindows
from runtime import distributed
from runtime.distributed import World
from runtime.errors import error_prefix

IMAGES, CLIPS = "network", "video_network"
PUBLISHED_CLIPS = 2048  # of published video distances, on both sides


@dataclass(frozen=True)
class Stage:
    """The work of one network.

    Attributes:
        name: `IMAGES` or `CLIPS`; title in the result.
        inputs: Reference and samples.
        backend: The network.
        weights: Its file.
        network: Name of everything but file, weights and device that the reference's features depend on.
        batch_size: Images or clips at a time.
        probabilities: Map from features to class probabilities, for images.
    """

    name: str
    inputs: Pair
    backend: FeatureBackend
    weights: Weights
    network: str
    batch_size: int
    probabilities: Callable[[Tensor], Tensor] | None = None

    @property
    def unit(self) -> str:
        """Word for what the network processes."""
        return "image" if self.name == IMAGES else "clip"

    def describe(self, world: World) -> dict[str, object]:
        """Describe the network, for the result."""
        return {
            "backend": self.network if self.name == IMAGES else "torch",
            "weights": str(self.weights.path),
            "weights_sha256": self.weights.sha256,
            "precision": "float32",
            "device": world.device.type,
            "world_size": world.size,
        } | (describe_clips(self.inputs) if self.name == CLIPS else {})


def open_images_stage(config: EvaluatorConfig, world: World, inputs: Pair) -> Stage:
    """Load the Inception network; a collective operation, since one rank downloads it.

    Raises:
        UserError: If the file is damaged or something else, or TensorFlow is asked for and absent.
    """
    weights = inspect_weights(_shared_weights(config, world))
    with error_prefix(str(weights.path)):
        make: Callable[[Path, torch.device], Backend] = (
            TensorFlowBackend if config.backend == "tensorflow" else load_network
        )
        backend = make(weights.path, world.device)
    size = config.batch_size_on(world.device.type)
    return Stage(IMAGES, inputs, backend, weights, config.backend, size, backend.probabilities)


def open_clips_stage(config: EvaluatorConfig, world: World, inputs: Pair) -> Stage:
    """Load I3D.

    Raises:
        UserError: If its file is missing, damaged or something else.
    """
    weights = find_i3d(config.i3d_weights)
    backend = load_i3d(weights.path, world.device)
    size = config.batch_size_on(world.device.type, clips=True)
    return Stage(CLIPS, inputs, backend, weights, _windows(inputs)[0].name, size)


def describe_clips(inputs: Pair) -> dict[str, object]:
    """Describe the protocol of the Frechet video distance."""
    reference, samples = _windows(inputs)
    return {
        "features": "I3D (Kinetics-400) logits, mean over time",
        "frames": CLIP_FRAMES,
        "resize": "each frame to 224 x 224, bilinear, without antialiasing",
        "covariance": "biased (divided by the number of clips), float64",
        "reference": reference.describe(),
        "samples": samples.describe(),
    }


def clips_summary(inputs: Pair) -> str:
    """Say in one line how the Frechet video distance was computed."""
    reference, samples = _windows(inputs)
    return f"FVD of I3D (Kinetics-400) logits, biased covariances: reference {reference}; samples {samples}"


def clip_warnings(inputs: Pair) -> list[str]:
    """Reasons why a Frechet video distance may not be comparable with published ones."""
    counts = [each.count for each in inputs]
    if counts == [PUBLISHED_CLIPS] * 2:
        return []
    return [
        f"FVD falls with the number of clips: here {counts[0]:,} of the reference and {counts[1]:,} samples, in papers "
        f"{PUBLISHED_CLIPS:,} of each (--num-reference, --num-samples)"
    ]


def _windows(inputs: Pair) -> tuple[ClipWindows, ClipWindows]:
    first, second = (each.file for each in inputs)
    assert isinstance(first, ClipWindows) and isinstance(second, ClipWindows)
    return first, second


def _shared_weights(config: EvaluatorConfig, world: World) -> Path:
    """Path of Inception's weight file, which rank 0 alone downloads if it is missing."""
    with distributed.raise_on_all_ranks():
        if world.is_main:
            find_weights(config.weights, config.cache, offline=config.offline)
    return find_weights(config.weights, config.cache, offline=True)
