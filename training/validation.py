"""What a run says about itself while it trains: the loss on held-out images, pictures, a score where one can be had.

All of it is a function of the averaged weights and the seed: the same images, times, noise and labels every time, so
that two lines of a log differ by the weights alone; the same for any number of processes, up to rounding; and training
goes on as if nobody had looked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
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
SHOWN = 100  # pictures at most
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
        """Writes the pictures, about as wide as high."""
        if self.pictures is None:
            return
        shown = enlarge(self.pictures, max(1, SMALLEST_PICTURE // self.pictures.shape[1]))
        path.parent.mkdir(exist_ok=True)
        save_png(grid(shown, columns=int(np.ceil(len(shown) ** 0.5)))[0], path)


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
        pictures = None
        if self.config.eval_samples:
            pictures, scores = self.look()
            values |= scores
        return Report(values, pictures, time.perf_counter() - started)

    def look(self) -> tuple[npt.NDArray[np.uint8] | None, dict[str, float]]:
        """Draws images of all classes in turn, shows the first of them, scores them all; results are on main alone."""
        labels = torch.arange(self.config.eval_samples) % self.network.num_classes
        scorer, shown, rows = self.setup.scorer, [], []
        for first, pixels in self.draw(labels):
            shown.append(to_picture(pixels[: max(0, SHOWN - first)]))
            if scorer is not None:
                rows.append(scorer.features(to_uint8(pixels)))
        pictures = distributed.rows_on_main(torch.cat(shown))
        features = distributed.rows_on_main(torch.cat(rows)) if rows else None
        scores: dict[str, float] = {}
        if scorer is not None and features is not None:
            scores = scorer.scores(features[: len(labels)], labels)
        return None if pictures is None else pictures[: min(SHOWN, len(labels))].cpu().numpy(), scores

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
    def draw(self, labels: Tensor) -> Iterator[tuple[int, Tensor]]:
        """This process's share of images of these labels, a few at a time; behind the last label the first come again.

        Yields:
            Number of the first of them, and pixels (n, C, H, W) float32.
        """
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
        for start in range(self.world.rank * share, (self.world.rank + 1) * share, rows):
            indices = range(start, start + rows)
            y = labels[[i % len(labels) for i in indices]].to(device)
            noise = ImageNoise(self.objective.seed, indices, self.setup.latent_shape, device)
            latents = sample_loop(guided(evaluate, y, null_class, scale), sampler, noise.initial(), noise_fn=noise)
            yield start, self.setup.autoencoder.decode(latents)
