"""Measurements during training: loss on held-out images, samples, and a score where one can be had.

All of it is a function of the averaged weights and the seed: the same images, times, noise and labels every time, so
that two lines of a log differ by the weights alone; the same for any number of processes, up to rounding; and no bit of
the training depends on it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from data import Dataset, conditioning
from data.dataset import Example, read_batches
from data.pixels import enlarge, grid, save_gif, save_png, to_picture, to_uint8
from diffusion import ImageNoise, evaluations, guided, sample_loop
from diffusion.loss import Batch, DiffusionLoss
from diffusion.sampling import Sampler
from diffusion.schedules import convert_time
from models import Network
from models.acceleration import AutocastNetwork
from models.contract import NetworkLike
from runtime import distributed
from runtime.devices import float64_device
from runtime.distributed import World
from runtime.seeds import derive_seed
from training.setup import Setup, ValidationData, encode

ROWS = 32  # of one evaluation; fixed, because draws belong to a chunk of images
QUARTERS = 4
SHOWN = 100  # images in the picture, at most
FRAME_MILLISECONDS = 120
SMALLEST_PICTURE = 64  # pixels; smaller images are enlarged in the grid


@dataclass(frozen=True)
class Report:
    """Result of one validation.

    Attributes:
        values: Names and numbers for a line of metrics.
        pictures: (N, H, W, C) uint8, or (N, F, H, W, C); None without samples, and on all ranks but 0.
        seconds: Duration.
    """

    values: dict[str, float]
    pictures: npt.NDArray[np.uint8] | None
    seconds: float

    def summary(self) -> str:
        """The numbers as one line of text."""
        numbers = [f"{name.replace('_', ' ')}: {value:.4f}" for name, value in self.values.items()]
        return ", ".join([*numbers, f"validation took {self.seconds:.1f} s"])

    def save_grid(self, path: Path) -> list[Path]:
        """Write the pictures, about as wide as high; of clips the frames in a row, and a GIF of the same name.

        Returns:
            The files; none without pictures.
        """
        if self.pictures is None:
            return []
        count, *frames, height, _, _ = self.pictures.shape
        shown, columns = enlarge(self.pictures, max(1, SMALLEST_PICTURE // height)), math.ceil(count**0.5)
        path.parent.mkdir(exist_ok=True)
        save_png(grid(shown, columns=frames[0] if frames else columns)[0], path)
        if not frames:
            return [path]
        moving = [grid(shown[:, i], columns)[0] for i in range(frames[0])]
        save_gif(moving, path.with_suffix(".gif"), [FRAME_MILLISECONDS] * frames[0])
        return [path, path.with_suffix(".gif")]


class Validation:
    """Measures a network as it is now.

    Args:
        setup: Setup of the run.
        data: Data and tools.
        network: The averaged one, in eval mode.
        world: This process and its place among all.
    """

    def __init__(self, setup: Setup, data: ValidationData, network: Network, world: World) -> None:
        self.setup, self.data, self.network, self.world = setup, data, network, world
        self.settings = setup.config.validation
        self.seed = derive_seed("validation", setup.config.optimization.global_seed)
        self.loss = DiffusionLoss(
            network, setup.loss.process, seed=self.seed, dropout_prob=0.0, autocast=setup.loss.autocast
        )

    def is_due(self, step: int) -> bool:
        """True after the steps that a validation follows: every so many, and the last."""
        return step % self.data.every == 0 or step == self.setup.total_steps

    def run(self) -> Report:
        """Loss, samples and scores; a collective operation."""
        started = time.perf_counter()
        values = {} if self.data.held_out is None else self.losses(self.data.held_out)
        pictures = None
        if self.data.sampler is not None:
            pictures, scores = self.sample_and_score(self.data.sampler)
            values |= scores
        return Report(values, pictures, time.perf_counter() - started)

    def sample_and_score(self, sampler: Sampler) -> tuple[npt.NDArray[np.uint8] | None, dict[str, float]]:
        """Sample images, keep the first as pictures, score all; results are on rank 0 only."""
        count, cond = self.settings.eval_samples, self.preview_conditioning()
        scorer, shown, rows = self.data.scorer, [], []
        for first, pixels in self.sample(sampler, cond):
            shown.append(to_picture(pixels[: max(0, SHOWN - first)]))
            if scorer is not None:
                rows.append(scorer.features(to_uint8(pixels)))
        pictures = distributed.rows_on_main(torch.cat(shown))
        features = distributed.rows_on_main(torch.cat(rows)) if rows else None
        scores: dict[str, float] = {}
        if scorer is not None and features is not None:
            scores = scorer.scores(features[:count], cond.get("y"))
        return None if pictures is None else pictures[: min(SHOWN, count)].cpu().numpy(), scores

    def preview_conditioning(self) -> dict[str, Tensor]:
        """Conditioning of the samples: all classes in turn or, without classes, that of the first images."""
        count, classes = self.settings.eval_samples, len(self.setup.dataset.classes)
        if not self.network.conditioning:
            return {}
        if classes:
            return {"y": torch.arange(count) % classes}
        images = self.setup.dataset if self.data.held_out is None else self.data.held_out
        return conditioning(default_collate([images[0, i % len(images)][1] for i in range(count)]))

    @torch.no_grad()
    def losses(self, images: Dataset) -> dict[str, float]:
        """Mean loss without dropped labels, over all times and over each quarter of them, cleanest first.

        A quarter is one of [0, 250), ..., [750, 1000) in timesteps. A quarter without images is left out.
        """
        device, count = self.world.device, min(self.settings.eval_images, len(images))
        chunks = [range(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]
        rounds = -(-len(chunks) // self.world.size)  # of each process: the weights may be divided over all of them
        own = [self.world.rank + turn * self.world.size for turn in range(rounds)]  # beyond the last, not counted
        workers = min(self.setup.config.data.num_workers, os.cpu_count() or 1) if images.worth_workers else 0
        loader: DataLoader[Example] = DataLoader(
            images,  # type: ignore[arg-type]  # items are asked for by (epoch, index)
            batch_sampler=[[(0, i) for i in chunks[number % len(chunks)]] for number in own],
            num_workers=workers,
        )
        place = float64_device(device)
        sums = torch.zeros(2, QUARTERS, dtype=torch.float64, device=place)  # losses, and how many
        process = self.loss.process
        for number, (raw, y, index) in zip(own, read_batches(loader, "--eval-data-path"), strict=True):
            draws = self.loss.draw(number, len(index), device=device)
            latents = encode(self.setup, raw.to(device), number, range(len(index)), self.seed)
            cond = conditioning(y) if self.network.conditioning else {}
            batch = Batch(latents, {name: leaf.to(device) for name, leaf in cond.items()}, index)
            loss = self.loss(batch, draws, number, {})["loss"]
            timesteps = convert_time(process.to_time(draws.t), process.time_convention, "index")
            quarter = (timesteps / (1000 / QUARTERS)).long().clamp(0, QUARTERS - 1)
            if number < len(chunks):
                sums.index_add_(1, quarter.to(place), torch.stack([loss, torch.ones_like(loss)]).to(place).double())
        total, seen = distributed.mean_over_ranks(sums).tolist()
        quarters = {f"val_loss_q{q + 1}": loss / n for q, (loss, n) in enumerate(zip(total, seen, strict=True)) if n}
        return {"val_loss": sum(total) / sum(seen)} | quarters

    @torch.no_grad()
    def sample(self, sampler: Sampler, cond: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Sample this process's share of images, a few at a time; extra rows repeat the first ones.

        Args:
            sampler: Sampler of the process.
            cond: Conditioning of all images.

        Yields:
            Number of the first of them, and pixels (n, ..., C, H, W) float32.
        """
        device, encoder, network = self.world.device, self.setup.encoder, self.network
        count = self.settings.eval_samples
        times = [convert_time(t, sampler.time_convention, network.time_convention) for t in sampler.times]
        prepared: NetworkLike = network.for_sampling(times)
        if self.loss.autocast is not None:
            prepared = AutocastNetwork(prepared, device, self.loss.autocast)
        # A network that never saw unconditional rows cannot be guided.
        scale = self.settings.eval_cfg_scale if self.setup.loss.dropout_prob > 0 else 1.0
        run, rows = evaluations(sampler.times, scale), min(ROWS, count)
        null = None if scale == 1 else self.setup.null_rows(rows, device) or network.null_conditioning(rows)
        share = -(-count // (rows * self.world.size)) * rows  # of each process; all make equally many
        for start in range(self.world.rank * share, (self.world.rank + 1) * share, rows):
            indices = range(start, start + rows)
            own = {name: leaf[[i % count for i in indices]].to(device) for name, leaf in cond.items()}
            denoise = guided(prepared, own, null, times=sampler.time_convention)
            noise = ImageNoise(self.seed, indices, network.sample_shape, device)
            yield start, encoder.decode(sample_loop(denoise, sampler, noise.initial(), run, noise_fn=noise))
