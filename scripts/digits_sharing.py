"""Draws digits with ever fewer encoder calls, and shows what that saves and costs: a table of sharing against quality.

    python scripts/digits_sharing.py --ckpt digits_ddt_out/ddt/000-DDT-digits-2/checkpoints/0001700.safetensors

Every row draws the same labels from the same noise with the same sampler. The schedules come from similarities measured
once; a network without an encoder to share has a single row. Multiply-adds are counted while sampling.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data import load_digits
from data.pixels import to_uint8
from diffusion import Calibration, FlowMatching, ImageNoise, guided, sample_loop
from diffusion.refresh import cheapest, sharing_budget
from diffusion.sampling import Sampler
from evaluator.digits import DigitsScores, score_digits
from models import ModelOutput, Network, create_model
from runtime.checkpoint import load_weights, read_checkpoint
from runtime.config import flag_name, parse_config, setting
from runtime.errors import UserError, blame, run
from runtime.files import atomic_path, check_writable

CHUNK = 125


@dataclass(frozen=True)
class SharingConfig:
    """Settings of digits_sharing.py."""

    ckpt: Path | None = setting(None, "checkpoint of train.py, trained on the digits as a flow (required)")
    rates: tuple[int, ...] = setting((1, 2, 4, 10), "steps to each encoder call, on average")
    num_samples: int = setting(1000, "images of each row")
    num_sampling_steps: int = setting(50, "Euler steps")
    cfg_scale: float = setting(1.0, "guidance scale; 1 is none")
    seed: int = setting(0, "seed of noise and calibration")
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        if self.ckpt is None:
            raise ValueError("--ckpt: required; give a checkpoint of train.py")
        if self.num_samples < 4:
            raise ValueError(f"--num-samples {self.num_samples}: the scores need at least 4")
        if not 1 <= self.cfg_scale < float("inf"):
            raise ValueError(f"--cfg-scale {self.cfg_scale}: must be at least 1 (1 is no guidance), and finite")
        with blame(f"--num-sampling-steps {self.num_sampling_steps}"):
            FlowMatching().euler(self.num_sampling_steps)
        for rate in self.rates:
            with blame(f"--rates {rate}"):
                sharing_budget(self.num_sampling_steps, rate)


class CountingNetwork:
    """A network that adds up the multiply-adds of its evaluations."""

    def __init__(self, network: Network) -> None:
        self._network, self.multiply_adds, self.encoder_calls = network, 0, 0
        self._cost = {
            True: sum(network.multiply_adds().values()),
            False: sum(network.multiply_adds_with_state().values()),
        }

    def __call__(self, x: Tensor, t: float | Tensor, y: Tensor, state: Any = None) -> ModelOutput:
        """Evaluates and counts."""
        self.multiply_adds += len(x) * self._cost[state is None]
        self.encoder_calls += state is None
        return self._network(x, t, y, state)


@dataclass(frozen=True)
class SharingRow:
    """What one refresh rate gave; `multiply_adds` are those of one image, all its steps and both halves of guidance."""

    rate: int
    encoder_calls: int
    evaluations: int
    multiply_adds: float
    scores: DigitsScores

    @property
    def shared(self) -> float:
        """Share of the evaluations that reused state."""
        return 1 - self.encoder_calls / self.evaluations


def load(path: Path) -> tuple[Network, FlowMatching]:
    """The averaged network of a checkpoint, ready to sample from, and its process.

    Raises:
        UserError: if it is not a flow on digits.
    """
    checkpoint = read_checkpoint(path)
    meta = checkpoint.meta
    if meta is None or meta["process"]["name"] != FlowMatching.name or tuple(meta["data"]["image_shape"]) != (1, 8, 8):
        raise UserError(f"--ckpt {path}: not of a flow trained on the digits; use train.py --dataset digits")
    network = create_model(**meta["model"])
    load_weights(network, checkpoint.weights, f"--ckpt {path}")
    settings = {name: value for name, value in meta["process"].items() if name != "name"}
    return network.eval().requires_grad_(False), FlowMatching(**settings)


def draw(
    network: CountingNetwork, null_class: int, sampler: Sampler, refresh: Sequence[bool], config: SharingConfig
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Balanced digits with their labels: images (N, 8, 8, 1)."""
    labels = torch.arange(config.num_samples) % 10
    images = []
    for start in range(0, config.num_samples, CHUNK):
        indices = range(start, min(start + CHUNK, config.num_samples))
        noise = ImageNoise(config.seed, indices, (1, 8, 8))
        denoise = guided(network, labels[list(indices)], null_class, config.cfg_scale)
        images.append(to_uint8(sample_loop(denoise, sampler, noise.initial(), refresh, noise)).numpy())
    return np.concatenate(images), labels.numpy()


def measure(config: SharingConfig) -> list[SharingRow]:
    """A row for each rate, in the order given; one alone for a network that keeps no state."""
    assert config.ckpt is not None  # __post_init__ saw to it
    network, process = load(config.ckpt)
    sampler = process.euler(config.num_sampling_steps, convention=network.time_convention)
    with blame(f"--cfg-scale {config.cfg_scale}"):
        null_class = network.null_class if config.cfg_scale > 1 else 0
    prepared, evaluations = network.for_sampling(sampler.times), len(sampler.times)
    calibration = Calibration(
        network=prepared,
        sampler=sampler,
        sampling={"sampler": "euler"},
        scale=config.cfg_scale,
        shape=(1, 8, 8),
        seed=config.seed,
    )
    similarity = calibration.measure() if network.keeps_state else np.ones((evaluations, evaluations))
    splits = {"train": load_digits("train"), "test": load_digits("test")}
    rows = []
    for rate in config.rates if network.keeps_state else (1,):
        refresh = cheapest(similarity, sharing_budget(evaluations, rate))
        counting = CountingNetwork(prepared)
        images, labels = draw(counting, null_class, sampler, refresh, config)
        scores = score_digits(images, labels, **splits)
        work = counting.multiply_adds / config.num_samples
        rows.append(SharingRow(rate, sum(refresh), evaluations, work, scores))
    return rows


def markdown(rows: Sequence[SharingRow]) -> str:
    """The table."""
    lines = [
        "| encoder calls | shared | M multiply-adds | fewer by | recognised | Frechet distance | recall | nearest |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        scores, fewer = row.scores, rows[0].multiply_adds / row.multiply_adds
        lines.append(
            f"| {row.encoder_calls} of {row.evaluations} | {row.shared:.0%} | {row.multiply_adds / 1e6:,.0f} | "
            f"{fewer:.2f} x | {scores.accuracy:.3f} | {scores.frechet_distance:.3f} | {scores.recall:.3f} | "
            f"{scores.nearest_ratio:.3f} |"
        )
    real = rows[0].scores.frechet_distance_of_test
    return "\n".join([*lines, f"\nReal held-out digits have a Frechet distance of {real:.3f}."])


def main(argv: Sequence[str]) -> None:
    """Parses flags, samples, scores, prints the table."""
    config = parse_config(SharingConfig, argv, program="digits_sharing.py", description=__doc__.split("\n")[0])
    if config.output is not None:
        check_writable(config.output, flag_name("output"))
    rows = measure(config)
    print(markdown(rows))
    if config.output is not None:
        with atomic_path(config.output) as temporary:
            temporary.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run(main, "digits_sharing.py"))
