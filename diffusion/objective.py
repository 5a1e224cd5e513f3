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
from runtime import distributed
from runtime.seeds import derive_seed

if TYPE_CHECKING:
    from models.contract import ModelOutput, Network, Pass, TimeConvention, TrainingRecipe


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

    def stratified_times(self, count: int, strata: int, generator: torch.Generator) -> Tensor:
        """The same, but row i from part i mod `strata` of the index scale, cut into equal parts from 0 up."""
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
        gate_noise: (N, ...) logistic (the difference of two Gumbel draws), for networks with gates; None elsewhere.
    """

    t: Tensor
    noise: Tensor
    encoder_noise: Tensor
    label_dropped: Tensor
    gate_noise: Tensor | None = None

    def rows(self, start: int, stop: int) -> Draws:
        """The draws of rows start..stop-1, for one rank or micro-batch."""
        rows = slice(start, stop)
        gate_noise = None if self.gate_noise is None else self.gate_noise[rows]
        return Draws(self.t[rows], self.noise[rows], self.encoder_noise[rows], self.label_dropped[:, rows], gate_noise)


class Objective(nn.Module):
    """Losses of a network under a process.

    Args:
        network: to be trained.
        process: how images are noised and what is predicted.
        recipe: the family's, what a training step consists of; None is one plain pass, without noise in any gate.
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
        recipe: TrainingRecipe | None = None,
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
        self.recipe = network.plain_recipe if recipe is None else recipe
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
        passes, strata = self.recipe.passes(step), self.recipe.time_strata
        if strata == 1:
            times = self.process.draw_times(count, generator)
        else:
            times = self.process.stratified_times(count, strata, generator)
        noise, encoder_noise = torch.randn((2, count, *shape), generator=generator, device=device)
        uniform = torch.rand((len(passes), count), generator=generator, device=device)
        gate_noise, gates = None, self.network.gate_noise_shape
        if gates is not None and any(one.noisy_gates for one in passes):
            # The logarithm of an exponential draw is a Gumbel draw, negated
            one, other = torch.empty((2, count, *gates), device=device).exponential_(generator=generator).log_()
            gate_noise = one - other
        return Draws(times, noise, encoder_noise, uniform < self.network.class_dropout_prob, gate_noise)

    def forward(
        self, batch: Batch, step: int, draws: Draws | None = None, batch_mean: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Noises a batch, evaluates the network once per training pass, and adds losses and penalty up.

        Args:
            batch: N rows.
            step: number of the training step.
            draws: N rows of `draw`'s result, or recorded ones; None makes them, for a batch that is the global one.
            batch_mean: the recipe's statistic over the global batch, for a step in micro-batches (`mean_statistic`).
                None takes the mean over these rows and those of all other processes, which must call together.

        Returns:
            Per-sample losses, (N,) float32 each, under the names of process and recipe; "loss" is the one to minimise.
            The penalty is the global batch's, the same in every row; its gradient is spread over the rows so that
            their mean has it.
        """
        if draws is None:
            draws = self.draw(step, len(batch.y), batch.x_start.shape[1:], batch.x_start.device)
        x_t = self.process.q_sample(batch.x_start, draws.t, draws.noise)
        losses: dict[str, Tensor] = {}
        total, name = torch.zeros(len(x_t), device=x_t.device), self.recipe.statistic_name
        for number, one in enumerate(self.recipe.passes(step)):
            out = self._evaluate(one, number, batch, x_t, draws)
            found = self.process.losses(out.sample, batch.x_start, x_t, draws.t, draws.noise)
            if self.alignment is not None:
                with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
                    found = self.alignment.add_to(found, out.features, batch.image)
            losses |= {one.prefix + key: value for key, value in found.items()}
            total = total + found["loss"]
            if number == 0 and name is not None:
                losses[name] = self.recipe.statistic(self.network, out)
                losses[f"{name}_penalty"] = self._penalty(losses[name], step, batch_mean)
                total = total + losses[f"{name}_penalty"]
        return {**losses, "loss": total}

    @torch.no_grad()
    def mean_statistic(self, pieces: Sequence[tuple[Batch, Draws]], step: int) -> Tensor | None:
        """The mean of the recipe's statistic over the global batch, ahead of a step in several micro-batches.

        A penalty on a mean over the batch has to know that mean before the first backward pass; so the first forward
        pass is made twice where a step is cut. An uncut step needs no call: `forward` takes the mean on its way.

        Args:
            pieces: this process's micro-batches, equally large; all processes call together.
            step: number of the training step.

        Returns:
            A scalar, or None if the recipe has no penalty.
        """
        if self.recipe.statistic_name is None:
            return None
        first, found = self.recipe.passes(step)[0], []
        for batch, draws in pieces:
            x_t = self.process.q_sample(batch.x_start, draws.t, draws.noise)
            found.append(self.recipe.statistic(self.network, self._evaluate(first, 0, batch, x_t, draws)))
        return distributed.mean_over_ranks(torch.cat(found).mean())

    def _evaluate(self, one: Pass, number: int, batch: Batch, x_t: Tensor, draws: Draws) -> ModelOutput:
        """The network in one of the passes, with that pass's dropped labels."""
        t = self.process.network_times(draws.t, self.network.time_convention)
        y, options = batch.y, dict(one.options)
        if self.network.class_dropout_prob > 0:
            y = torch.where(draws.label_dropped[number], self.network.null_class, y)
        if one.noisy_gates:
            options["gate_noise"] = draws.gate_noise
        if self.alignment is not None:
            options["features_at"] = self.alignment.block
        with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
            return self.network(x_t, t, y, **options)

    def _penalty(self, statistic: Tensor, step: int, batch_mean: Tensor | None) -> Tensor:
        """The penalty p(m) at the global mean m, once per row, with gradient p'(m) ds for the row's statistic s.

        That is linear in the rows, so that whoever averages gradients, over rows, micro-batches or processes, gets the
        gradient of p(m).
        """
        if batch_mean is None:
            batch_mean = distributed.mean_over_ranks(statistic.detach().mean())
        with torch.enable_grad():
            at = batch_mean.detach().requires_grad_()
            penalty = self.recipe.penalty(at, step)
            (slope,) = torch.autograd.grad(penalty, at)
        return penalty.detach() + slope * (statistic - statistic.detach())
