"""Solvers in the form of a table that was searched: times, and weights of all earlier predictions in every step.

A step from time s to time t moves x by the exact solution of the ODE for a constant prediction, which is the weighted
mean of all predictions so far: of clean samples in the Gaussian diffusion, of velocities in a flow.

Source: Wang et al., 2025 (arXiv 2505.21114).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.flow import FlowMatching
from diffusion.gaussian import GaussianDiffusion
from diffusion.predictions import conversion
from diffusion.sampling import NoiseFn
from diffusion.time_grids import half_log_snr
from models.contract import TimeConvention
from runtime.json_file import read_json, write_json

FORMAT = 1
SAME_LEVELS = 0.5  # half log-SNR; the continuous and the discrete form of linear betas differ by 0.3 near t = 0
Levels = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class SolverTable:
    """Steps of a searched solver.

    Attributes:
        process: Name of the process that it was searched for.
        times: Times of the N evaluations, and the end; in [0, 999] and falling, where -1 is the clean sample, in the
            Gaussian diffusion, and rising in [0, 1] in a flow.
        levels: (alpha, sigma) at these times, of x = alpha clean + sigma noise.
        weights: Row i has the i + 1 weights of the predictions up to evaluation i, oldest first, which sum to 1.
        protocol: How it was found, as JSON values.

    Raises:
        ValueError: If the numbers do not fit each other.
    """

    process: str
    times: tuple[float, ...]
    levels: Levels
    weights: tuple[tuple[float, ...], ...]
    protocol: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate the fields."""
        count = len(self.weights)
        if not count or len(self.times) != count + 1 or len(self.levels) != count + 1:
            raise ValueError(f"{count} rows of weights need {count + 1} times and levels, at least 2")
        if [len(row) for row in self.weights] != [*range(1, count + 1)]:
            raise ValueError("row i of the weights must have i + 1 numbers")
        numbers = [*self.times, *(x for pair in self.levels for x in pair), *(x for row in self.weights for x in row)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("numbers must be finite")
        if any(abs(sum(row) - 1) > 1e-4 for row in self.weights):
            raise ValueError("weights of a step must sum to 1")
        if any(alpha < 0 or sigma < 0 or alpha + sigma == 0 for alpha, sigma in self.levels):
            raise ValueError("levels must not be negative")
        sign = 1 if self.process == "flow" else -1
        if any(sign * (end - start) <= 0 for start, end in pairwise(self.times)):
            raise ValueError("times must go from noise to data")

    @property
    def evaluations(self) -> int:
        """Number of network evaluations."""
        return len(self.weights)

    def check_process(self, process: GaussianDiffusion | FlowMatching) -> None:
        """Raise a ValueError unless the table was searched for this process and its noise schedule."""
        if process.name != self.process:
            raise ValueError(f"searched for process {self.process!r}, and the network's is {process.name!r}")
        if isinstance(process, GaussianDiffusion):
            own = half_log_snr(process.alphas_cumprod_at(np.clip(self.times[:-1], 0, None)))
            alpha, sigma = np.array(self.levels[:-1]).T
            if not np.allclose(np.log(alpha / sigma), own, rtol=0, atol=SAME_LEVELS):
                raise ValueError("searched for another noise schedule")


def read_table(path: Path) -> SolverTable:
    """Read a table of search_solver.py.

    Raises:
        ValueError: If there is none, or it is damaged.
    """
    try:
        document = read_json(path)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}; this version reads {FORMAT}")
        levels = tuple((float(alpha), float(sigma)) for alpha, sigma in document["levels"])
        weights = tuple(tuple(map(float, row)) for row in document["weights"])
        times = tuple(map(float, document["times"]))
        return SolverTable(str(document["process"]), times, levels, weights, dict(document["protocol"]))
    except OSError as error:
        raise ValueError(f"{error.strerror or error}; give a file of search_solver.py") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a table of search_solver.py, or damaged ({error})") from error


def write_table(table: SolverTable, path: Path) -> None:
    """Write a table as JSON, whole or not at all."""
    document = {"format": FORMAT, **{name: getattr(table, name) for name in SolverTable.__dataclass_fields__}}
    write_json(path, document)


class TableSampler:
    """A sampler that follows a table.

    Args:
        process: Process that the network was trained under.
        table: The table.
        clip_denoised: Clamp predicted clean samples to [-1, 1]; has no effect in a flow.

    Raises:
        ValueError: If the table was searched for another process or noise schedule.
    """

    def __init__(
        self, process: GaussianDiffusion | FlowMatching, table: SolverTable, *, clip_denoised: bool = False
    ) -> None:
        table.check_process(process)
        self.process, self.table, self.times = process, table, table.times[:-1]
        self.time_convention: TimeConvention = process.time_convention
        self._clip = clip_denoised and process.name == "gaussian"
        self._steps = [constant_step(table.process, *ends) for ends in pairwise(table.levels)]
        self._history: list[Tensor] = []

    def prediction(self, i: int, x: Tensor, sample: Tensor) -> Tensor:
        """Clean sample, or velocity, of the raw output of evaluation i, in the dtype of x."""
        sample = sample.to(x.dtype)
        if isinstance(self.process, FlowMatching):
            return self.process.convert(sample, x, self.times[i], "velocity")
        by_x, by_output = conversion(self.process.prediction, "x_start", *self.table.levels[i])
        clean = torch.add(by_x * x, self.process.prediction_in(sample, x), alpha=float(by_output))
        return clean.clamp(-1, 1) if self._clip else clean

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step; evaluation 0 forgets the history of an earlier run."""
        earlier = [] if i == 0 else self._history
        self._history = [*earlier, self.prediction(i, x, sample)]
        by_x, by_mean = self._steps[i]
        x = by_x * x
        for value, weight in zip(self._history, self.table.weights[i], strict=True):
            if weight:
                x = torch.add(x, value, alpha=by_mean * weight)
        return x


def constant_step(process: str, start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    """Factors of x and of a constant prediction in the exact step between two levels (alpha, sigma)."""
    if process == "flow":
        return 1.0, end[0] - start[0]
    ratio = end[1] / start[1]
    return ratio, end[0] - ratio * start[0]
