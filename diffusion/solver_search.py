"""Search of a solver for one network: times and weights of `SolverTable`, by gradients through the frozen network.

The network is sampled by the table and, from the same noise, by many small steps (the teacher). The loss is the mean
square distance of the table's points from the teacher's path, and a Huber loss of their ends.

Source: Wang et al., 2025 (arXiv 2505.21114), also for loss and optimizer. The search begins at UniPC instead
of Euler's steps, and ends at the best table on held-out noise, not at the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion.flow import FlowMatching
from diffusion.flow_multistep import FlowUniPCSampler
from diffusion.gaussian import GaussianDiffusion
from diffusion.multistep import UniPCSampler
from diffusion.predictions import conversion
from diffusion.sampling import Denoiser, Evaluation, Sampler, evaluations, inside_interval, sample_loop
from diffusion.solver_table import SolverTable
from models.contract import ModelOutput

Process = GaussianDiffusion | FlowMatching
END_WEIGHT, HUBER = 1000.0, 0.001  # of the loss at the end
CLEAN = -1.0  # time of the clean sample in the Gaussian diffusion: one step before index 0


@dataclass(frozen=True)
class Path:
    """A trajectory.

    Attributes:
        times: (P,) float64, from noise to data.
        points: (P, N, ..., C, H, W) at these times.
    """

    times: Tensor
    points: Tensor

    def at(self, times: Tensor) -> Tensor:
        """Points at times (Q,) between its own, by linear interpolation: (Q, N, ..., C, H, W)."""
        falling = bool(self.times[0] > self.times[-1])
        grid, wanted = (-self.times, -times) if falling else (self.times, times)
        below = (torch.searchsorted(grid, wanted.detach()) - 1).clamp(0, len(grid) - 2)
        part = (wanted - grid[below]) / (grid[below + 1] - grid[below])
        shape = (-1, *[1] * (self.points.ndim - 1))
        return torch.lerp(self.points[below], self.points[below + 1], part.to(self.points.dtype).reshape(shape))


class SearchedSolver(nn.Module):
    """A solver table as parameters: logits of the step sizes, and weights of earlier predictions.

    Args:
        process: Process of the network.
        count: Number of evaluations N.
        order: Order of the UniPC that it begins at.
        clip_denoised: As for `TableSampler`.
    """

    def __init__(self, process: Process, count: int, order: int = 2, *, clip_denoised: bool = False) -> None:
        super().__init__()
        self.process, self.count = process, count
        self._clip = clip_denoised and process.name == "gaussian"
        if isinstance(process, GaussianDiffusion):
            abar = process.alphas_cumprod_at(np.arange(process.timesteps[-1] + 1))
            self.register_buffer("log_abar", torch.from_numpy(np.append(0.0, np.log(abar))))
            self.start, self.end = float(process.timesteps[-1]), CLEAN
        else:
            self.start, self.end = 0.0, 1.0
        sizes, earlier = first_guess(process, count, order)
        self.logits = nn.Parameter(torch.tensor(sizes, dtype=torch.float64).log())
        self.earlier = nn.Parameter(torch.tensor(earlier, dtype=torch.float64))  # (N, N), used below the diagonal

    def times(self) -> Tensor:
        """(N + 1,) float64 times of the evaluations, and the end."""
        passed = self.logits.softmax(0).cumsum(0)
        inner = self.start + (self.end - self.start) * passed[:-1]
        ends = inner.new_tensor([self.start, self.end])
        return torch.cat([ends[:1], inner, ends[1:]])

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at times, (N + 1,) float64 each."""
        if isinstance(self.process, FlowMatching):
            return times, 1 - times
        log_abar: Tensor = self.get_buffer("log_abar")
        place = (times[:-1] - CLEAN).clamp(0, len(log_abar) - 1)  # of the evaluations; the end is exact
        below = place.detach().floor().long().clamp(max=len(log_abar) - 2)
        log = torch.lerp(log_abar[below], log_abar[below + 1], place - below)
        ends = log.new_tensor([1.0, 0.0])
        return torch.cat([(log / 2).exp(), ends[:1]]), torch.cat([(-torch.expm1(log)).sqrt(), ends[1:]])

    def weights(self) -> Tensor:
        """(N, N) float64 weights of the predictions of each step; rows sum to 1."""
        lower = self.earlier.tril(-1)
        return lower + torch.diag(1 - lower.sum(1))

    def forward(self, denoise: Denoiser, x: Tensor, scale: float = 1.0, interval: Interval = None) -> Path:
        """Sample from noise x (N, ..., C, H, W); returns all points, the noise first."""
        times, weights = self.times(), self.weights().to(x)
        alpha, sigma = (level.to(x) for level in self.levels(times))
        points, predictions = [x], list[Tensor]()
        for i in range(self.count):
            t = times[i].to(x).expand(len(x))
            inside = interval is None or inside_interval(float(times[i]), interval)
            row = Evaluation(t, scale if inside else 1.0, inside and scale != 1)
            predictions.append(self.prediction(x, denoise(x, row).sample, alpha[i], sigma[i], t))
            mean = sum((w * p for w, p in zip(weights[i], predictions, strict=False)), torch.zeros_like(x))
            if isinstance(self.process, FlowMatching):
                x = x + (times[i + 1] - times[i]).to(x) * mean
            else:
                ratio = sigma[i + 1] / sigma[i]
                x = ratio * x + (alpha[i + 1] - ratio * alpha[i]) * mean
            points.append(x)
        return Path(times, torch.stack(points))

    def prediction(self, x: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor, t: Tensor) -> Tensor:
        """Clean sample, or velocity, of a raw output."""
        sample = sample.to(x.dtype)
        if isinstance(self.process, FlowMatching):
            return self.process.convert(sample, x, t, "velocity")
        by_x, by_output = conversion(self.process.prediction, "x_start", alpha, sigma)
        clean = by_x * x + by_output * self.process.prediction_in(sample, x)
        return clean.clamp(-1, 1) if self._clip else clean

    @torch.no_grad()
    def table(self, protocol: Mapping[str, object]) -> SolverTable:
        """The solver as it is now."""
        times = self.times()
        pairs = zip(*(level.tolist() for level in self.levels(times)), strict=True)
        rows = tuple(tuple(row[: i + 1]) for i, row in enumerate(self.weights().tolist()))
        return SolverTable(self.process.name, tuple(times.tolist()), tuple(pairs), rows, protocol)


Interval = tuple[float, float] | None


def first_guess(process: Process, count: int, order: int) -> tuple[list[float], list[list[float]]]:
    """Step sizes and weights of UniPC, where the search begins: (N,) shares, and (N, N) weights below the diagonal.

    Both of its forms are tables: each step adds a weighted sum of the predictions so far.
    """
    earlier = np.zeros((count, count))
    if isinstance(process, FlowMatching):
        flow = FlowUniPCSampler(process, count, order=min(order, count))
        for i, weights in enumerate(flow.weights):
            earlier[i, i + 1 - len(weights) : i + 1] = weights
        sizes = np.diff(flow.points)
    else:
        # As UniPC's own grid, but without an evaluation at t = 0, where a table has nothing to gain
        falling = (1 + np.cos(np.pi * np.arange(count) / count)) / 2 * (process.timesteps[-1] - CLEAN) + CLEAN
        gaussian = UniPCSampler(process.restricted(falling[::-1].tolist()), order=min(order, count))
        for i, step in enumerate(gaussian.table):
            newest_first = np.trim_zeros(np.array(step.weights), "b")
            earlier[i, i + 1 - len(newest_first) : i + 1] = newest_first[::-1] / newest_first.sum()
        times = [*gaussian.times, CLEAN]
        sizes = -np.diff(times) / (times[0] - CLEAN)
    return sizes.tolist(), np.tril(earlier, -1).tolist()


def teacher_path(denoise: Denoiser, sampler: Sampler, x: Tensor, scale: float = 1.0, interval: Interval = None) -> Path:
    """Path of a sampler of many small steps from noise x: the points of its evaluations, and its end."""
    visited = [x]

    def keep(i: int, x: Tensor, out: ModelOutput) -> None:
        visited.append(x)

    sample_loop(denoise, sampler, x, evaluations(sampler.times, scale, interval), on_step=keep)
    end = 1.0 if sampler.time_convention == "unit" else CLEAN
    return Path(torch.tensor([*sampler.times, end], dtype=torch.float64, device=x.device), torch.stack(visited))


def search_loss(solved: Path, teacher: Path) -> Tensor:
    """Loss of the published search: distances along the path, and at its end."""
    along = functional.mse_loss(solved.points[1:-1], teacher.at(solved.times[1:-1]))
    end = functional.huber_loss(solved.points[-1], teacher.points[-1], delta=HUBER)
    return along + END_WEIGHT * end


class Lion(torch.optim.Optimizer):
    """Steps of one length in every parameter, with the sign of a running mean of gradients.

    Source: Chen et al., 2023 (arXiv 2302.06675), algorithm 2, without weight decay.
    """

    def __init__(self, params: Sequence[nn.Parameter], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                parameter.sub_(torch.lerp(parameter.grad, mean, first).sign(), alpha=group["lr"])
                mean.lerp_(parameter.grad, 1 - second)
