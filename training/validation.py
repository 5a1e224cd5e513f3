"""What a run says about itself while it trains: the loss on held-out images, pictures, a score where one can be had.

All of it is a function of the averaged weights and the seed: the same images, times, noise and labels every time, so
that two lines of a log differ by the weights alone; the same for any number of processes, up to rounding; and training
goes on as if nobody had looked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data import ImageDataset
from data.pixels import enlarge, grid, save_png, to_picture, to_uint8
from diffusion import PROCESSES, Batch, ImageNoise, Objective, guided, sample_loop
from models import ModelOutput, Network
from runtime import distributed
from runtime.distributed import World
from runtime.seeds import derive_seed

if TYPE_CHECKING:
    from training.setup import Setup

ROWS = 32  # of one evaluation; fixed, because draws belong to a chunk of images
QUARTERS = 4
SMALLEST_PICTURE = 64  # pixels; smaller images are enlarged in the grid


@dataclass(frozen=True)
class Report:
    """What one validation found.

    Attributes:
        values: names and numbers for a line of metrics.
        pictures: (N, H, W, C) uint8; None where none were asked for, and on all but the main process.
        seconds: what it took.
    """

    values: dict[str, float]
    pictures: npt.NDArray[np.uint8] | None
    seconds: float

    def summary(self) -> str:
        """The numbers as one line for people."""
        found = [f"{name.replace('_', ' ')}: {value:.4f}" for name, value in self.values.items()]
        return ", ".join([*found, f"validation took {self.seconds:.1f} s"])

    def save_grid(self, path: Path) -> None:
        """Writes the first hundred pictures, about as wide as high."""
        if self.pictures is None:
            return
        shown = self.pictures[:100]
        shown = enlarge(shown, max(1, SMALLEST_PICTURE // shown.shape[1]))
        path.parent.mkdir(exist_ok=True)
        save_png(grid(shown, columns=int(np.ceil(len(shown) ** 0.5)))[0], path)


def digits_scores(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> dict[str, float]:
    """Frechet distance and recognised share of digits, from the committed feature network."""
    from data import load_digits
    from evaluator.digits import score_digits

    scores = score_digits(images, labels, train=load_digits("train"), test=load_digits("test"))
    assert scores.accuracy is not None  # they have labels
    return {"frechet_distance": scores.frechet_distance, "accuracy": scores.accuracy}


# Where a feature network is at hand: value of --dataset -> scores of uint8 images and the labels asked for.
SCORES: dict[str, Callable[[npt.NDArray[np.uint8], npt.NDArray[np.int64]], dict[str, float]]] = {
    "digits": digits_scores,
}


class Validation:
    """Looks at a network as it is now.

    Args:
        setup: of the run; its `held_out` images are those of the loss.
        network: the averaged one, in eval mode.
        world: this process among its peers.
    """

    def __init__(self, setup: Setup, network: Network, world: World) -> None:
        self.setup, self.config, self.network, self.world = setup, setup.config, network, world
        seed = derive_seed("validation", self.config.global_seed)
        self.objective = Objective(network, setup.objective.process, seed=seed, autocast=setup.objective.autocast)

    @property
    def every(self) -> int:
        """Steps from one validation to the next."""
        assert self.config.eval_every is not None  # else there is none
        return self.config.eval_every

    def run(self) -> Report:
        """Loss, pictures and scores; by all processes together."""
        started = time.perf_counter()
        values = {} if self.setup.held_out is None else self.losses(self.setup.held_out)
        labels = torch.arange(self.config.eval_samples) % self.network.num_classes
        pixels = self.pixels(labels) if self.config.eval_samples else None
        pictures = None
        if pixels is not None and self.world.is_main:
            pictures = to_picture(pixels).cpu().numpy()
            if self.config.dataset in SCORES:
                values |= SCORES[self.config.dataset](to_uint8(pixels).cpu().numpy(), labels.numpy())
        return Report(values, pictures, time.perf_counter() - started)

    @torch.no_grad()
    def losses(self, images: ImageDataset) -> dict[str, float]:
        """Mean loss without dropped labels, over all times and over each quarter of them, cleanest first.

        A quarter is one of [0, 250), ..., [750, 1000) on the index scale. One that no image was drawn for is left out.
        """
        device, count = self.world.device, min(self.config.eval_images, len(images))
        chunks = [range(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]
        own = range(self.world.rank, len(chunks), self.world.size)
        workers = min(self.config.num_workers, os.cpu_count() or 1) if images.worth_workers else 0
        loader: DataLoader[Any] = DataLoader(
            images,  # type: ignore[arg-type]  # items are asked for by (epoch, index)
            batch_sampler=[[(0, i) for i in chunks[number]] for number in own],
            num_workers=workers,
        )
        sums = torch.zeros(2, QUARTERS, dtype=torch.float64, device=device)  # losses, and how many
        for number, (raw, y, index) in zip(own, loader, strict=True):
            draws = self.objective.draw(number, len(y), self.setup.latent_shape, device)
            draws = draws._replace(label_dropped=torch.zeros_like(draws.label_dropped))
            latents = self.setup.autoencoder.encode(raw.to(device), draws.encoder_noise)
            loss = self.objective(Batch(latents, y.to(device), index), number, draws)["loss"]
            times = self.objective.process.network_times(draws.t, "index")
            quarter = (times / (1000 / QUARTERS)).long().clamp(0, QUARTERS - 1)
            sums.index_add_(1, quarter, torch.stack([loss, torch.ones_like(loss)]).double())
        total, seen = distributed.mean_over_ranks(sums).tolist()
        quarters = {f"val_loss_q{q + 1}": loss / n for q, (loss, n) in enumerate(zip(total, seen, strict=True)) if n}
        return {"val_loss": sum(total) / sum(seen)} | quarters

    @torch.no_grad()
    def pixels(self, labels: Tensor) -> Tensor:
        """Images of these labels, each rank drawing its share: (N, C, H, W) float32 on every rank."""
        config, device, autocast = self.config, self.world.device, self.objective.autocast
        sampler = PROCESSES[self.objective.process.name].plain_sampler(
            config.eval_steps,
            clip_denoised=config.vae == "none",
            convention=self.network.time_convention,
            **self.setup.process_settings,
        )
        network = self.network.for_sampling(sampler.times)
        guidable = network.class_dropout_prob > 0
        scale, null_class = (config.eval_cfg_scale, network.null_class) if guidable else (1.0, None)

        def evaluate(*args: Any) -> ModelOutput:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                return network(*args)

        rows = min(ROWS, len(labels))
        share = -(-len(labels) // (rows * self.world.size)) * rows  # of each process; all make equally many
        pieces = []
        for start in range(self.world.rank * share, (self.world.rank + 1) * share, rows):
            indices = range(start, start + rows)
            y = labels[[i % len(labels) for i in indices]].to(device)
            noise = ImageNoise(self.objective.seed, indices, self.setup.latent_shape, device)
            latents = sample_loop(guided(evaluate, y, null_class, scale), sampler, noise.initial(), noise_fn=noise)
            pieces.append(self.setup.autoencoder.decode(latents))
        return distributed.from_all_ranks(torch.cat(pieces)).flatten(0, 1)[: len(labels)]
