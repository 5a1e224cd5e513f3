"""A network and a process, made into losses: the module that DDP wraps.

Networks and processes draw nothing themselves. All randomness of a training step is made here, for the GLOBAL batch,
from a generator seeded by (seed, step), and cut by rank and micro-batch. So training does not depend on the number of
ranks, a checkpoint needs no random state, and a test can put recorded numbers in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffusion.alignment import Alignment
from runtime.seeds import derive_seed

if TYPE_CHECKING:
    from models.contract import Network, TimeConvention


class Process(Protocol):
    """What training needs from a noise process; `GaussianDiffusion` and `FlowMatching` have it.

    Attributes:
        name: in checkpoints and flags.
    """

    name: ClassVar[str]

    def output_channels(self, in_channels: int) -> int:
        """Channels that a network must put out."""
        ...

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) times in the process's own units."""
        ...

    def network_times(self, t: Tensor, convention: TimeConvention) -> Tensor:
        """The same times as the network wants to be told."""
        ...

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noised images."""
        ...

    def losses(self, sample: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Per-sample losses, (N,) each, "loss" among them."""
        ...


@dataclass(frozen=True)
class Batch:
    """What a training step learns from.

    Attributes:
        x_start: (N, C, H, W) float32 clean latents (or pixels in [-1, 1]).
        y: (N,) int64 labels.
        index: (N,) int64 place in the data set.
        image: (N, 3, H, W) float32 raw images in [0, 1], for alignment losses.
    """

    x_start: Tensor
    y: Tensor
    index: Tensor
    image: Tensor | None = None


class Draws(NamedTuple):
    """All randomness of a training step, rows in the order of the global batch.

    Attributes:
        t: (N,) times in the process's units.
        noise: (N, C, H, W) standard normal.
        encoder_noise: (N, C, H, W) standard normal, for sampling an autoencoder's posterior.
        label_dropped: (passes, N) bool, whose labels are replaced by the null class in each forward pass.
    """

    t: Tensor
    noise: Tensor
    encoder_noise: Tensor
    label_dropped: Tensor

    def rows(self, start: int, stop: int) -> Draws:
        """The draws of rows start..stop-1, for one rank or micro-batch."""
        rows = slice(start, stop)
        return Draws(self.t[rows], self.noise[rows], self.encoder_noise[rows], self.label_dropped[:, rows])


class Objective(nn.Module):
    """Losses of a network under a process.

    Args:
        network: to be trained.
        process: how images are noised and what is predicted.
        seed: of all training draws.
        autocast: lower precision that the networks, and nothing else, run in; None is the weights' own.
        alignment: of the network's features with those of a vision encoder, from the batch's raw images.

    Raises:
        ValueError: if the network does not put out what the process needs.
    """

    def __init__(
        self,
        network: Network,
        process: Process,
        *,
        seed: int = 0,
        autocast: torch.dtype | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        super().__init__()
        wanted = process.output_channels(network.in_channels)
        if network.out_channels != wanted:
            raise ValueError(
                f"the network puts out {network.out_channels} channels, but the process needs {wanted} for "
                f"{network.in_channels} input channels; check --learn-sigma on both sides"
            )
        self.network, self.process, self.seed, self.autocast = network, process, seed, autocast
        self.alignment = alignment

    def draw(self, step: int, count: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Draws:
        """Makes the draws of one step's global batch; the same on every rank.

        Args:
            step: number of the training step.
            count: rows of the GLOBAL batch.
            shape: (C, H, W) of one latent.
            device: where they are needed; CPU and CUDA give different numbers.
        """
        generator = torch.Generator(device).manual_seed(derive_seed("train", self.seed, step))
        times = self.process.draw_times(count, generator)
        noise, encoder_noise = torch.randn((2, count, *shape), generator=generator, device=device)
        passes = len(self.network.training_passes)
        uniform = torch.rand((passes, count), generator=generator, device=device)
        return Draws(times, noise, encoder_noise, uniform < self.network.class_dropout_prob)

    def forward(self, batch: Batch, step: int, draws: Draws | None = None) -> dict[str, Tensor]:
        """Noises a batch, evaluates the network once per training pass, and adds the passes' losses up.

        Args:
            batch: N rows.
            step: number of the training step; used when `draws` is None.
            draws: N rows of `draw`'s result, or recorded ones; None makes them, for a batch that is the global one.

        Returns:
            Per-sample losses, (N,) float32 each; "loss" is the one to minimise.
        """
        x_start = batch.x_start
        if draws is None:
            draws = self.draw(step, len(x_start), x_start.shape[1:], x_start.device)
        x_t = self.process.q_sample(x_start, draws.t, draws.noise)
        t = self.process.network_times(draws.t, self.network.time_convention)
        total: dict[str, Tensor] = {}
        for dropped, options in zip(draws.label_dropped, self.network.training_passes, strict=True):
            y = batch.y
            if self.network.class_dropout_prob > 0:
                y = torch.where(dropped, self.network.null_class, y)
            if self.alignment is not None:
                options = {**options, "features_at": self.alignment.block}
            with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
                out = self.network(x_t, t, y, **options)
            losses = self.process.losses(out.sample, x_start, x_t, draws.t, draws.noise)
            if self.alignment is not None:
                with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
                    losses = self.alignment.add_to(losses, out.features, batch.image)
            total = {name: total.get(name, 0) + value for name, value in losses.items()}
        return total
