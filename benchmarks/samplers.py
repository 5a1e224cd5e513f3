"""Every way to sample from a network in few evaluations, and how far each ends from the solution of the ODE."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks import small
from data.pixels import Images, to_uint8
from diffusion import SAMPLERS
from diffusion.time_grids import TimeGrid
from evaluator.small import SmallScorer, SmallScores
from models.loading import resolve_checkpoint
from runtime.errors import UserError
from runtime.settings import Values
from sampling.pipeline import Pipeline
from sampling.resolution import chosen_table

# Settings to compare of a sampler of the registry; all others once, with their defaults
VARIANTS: dict[str, Sequence[Values]] = {
    **{name: ({"solver_order": 2}, {"solver_order": 3}) for name in ("unipc", "deis", "flow-unipc")},
    "dpm++": ({"solver_order": 2}, {"solver_order": 3}, {"sde": "sde"}),
    "heun": ({}, {"heun_exact": True}),
    "adams": ({"adams_order": 2}, {"adams_order": 3}, {"adams_order": 4}),
}
SPACINGS: dict[str, Sequence[Values]] = {
    "gaussian": [{"time_grid": grid} for grid in get_args(TimeGrid)],
    "flow": [{"time_grid": "uniform"}, {"time_grid": "uniform", "time_shift": 2.0}, {"time_grid": "chebyshev"}],
}
TWICE = ({"sampler": "edm"}, {"heun_exact": True})  # settings of samplers that evaluate twice a step
STOCHASTIC = ({"sampler": "ddpm"}, {"sde": "sde"})
# Solution of the ODE, and the steps between which outputs are forecast
REFERENCES: dict[str, Values] = {"gaussian": {"sampler": "ddim"}, "flow": {"sampler": "adams"}}
FORECAST: dict[str, Values] = {
    "gaussian": {"sampler": "ddim", "num_sampling_steps": "ddim50"},
    "flow": {"sampler": "euler", "num_sampling_steps": "50"},
}
BATCH = 250


class Opened(NamedTuple):
    """A network to sample from.

    Attributes:
        name: Name of the network; those of one name are seeds of its training.
        seed: Seed of its training.
        pipeline: Its pipeline.
        scores: Scores of uint8 images (N, H, W, C) with labels (N,); None without an evaluation of its data set.
    """

    name: str
    seed: int
    pipeline: Pipeline
    scores: Callable[[Images, npt.NDArray[np.int64]], SmallScores] | None


class Setup(NamedTuple):
    """A way to sample.

    Attributes:
        solver: Name in tables.
        spacing: Spacing of its times, or the forecast.
        settings: As `Pipeline.prepare` takes them.
        default: The sampler's own spacing.
        ends_at_solution: Tends to the solution of the ODE; a stochastic one does not.
    """

    solver: str
    spacing: str
    settings: Values
    default: bool = True
    ends_at_solution: bool = True


@dataclass(frozen=True)
class SamplerResult:
    """Result of one setup, network and seed of the noise."""

    name: str  # of the network
    training_seed: int
    seed: int  # of the noise
    solver: str
    spacing: str
    default: bool  # it is the solver's own spacing
    evaluations: int  # that called the network
    rmse: float | None  # root mean square distance of latents to the solution of the ODE; None for stochastic ones
    psnr: float | None  # peak signal-to-noise ratio of images to those of the solution, in dB
    seconds: float  # of all images, without decoding
    scores: SmallScores | None


def check_takes_no_text(pipeline: Pipeline, path: Path) -> None:
    """Raise a UserError for a network that takes text."""
    if "text" in pipeline.network.conditioning:
        raise UserError(
            f"--ckpt {path}: takes text, and samples of labels are needed here, or of a network without any"
        )


def open_network(path: Path, device: torch.device) -> Opened:
    """Open a checkpoint of any origin; scores come with the digits and Fashion-MNIST.

    Raises:
        UserError: For anything wrong with the file.
    """
    info, _ = resolve_checkpoint(path)
    scorer = small.find_scorer(info)
    if not isinstance(scorer, SmallScorer):
        pipeline = Pipeline.from_pretrained(path, device=device)
        check_takes_no_text(pipeline, path)
        return Opened(info.model, 0, pipeline, None)
    model = small.open_model(path, device=device)
    return Opened(model.name, model.seed, model.pipeline, scorer.score)


def solvers(process: str, evaluations: int) -> Iterator[Setup]:
    """All samplers of a process, on all spacings, with as many evaluations, or one less."""
    for name, row in SAMPLERS.items():
        if row.process != process:
            continue
        for variant in VARIANTS.get(name, ({},)):
            fixed = {"sampler": name, **variant}
            own = {"time_grid": default_grid(fixed)}
            twice, stochastic = (any(each.items() <= fixed.items() for each in kinds) for kinds in (TWICE, STOCHASTIC))
            steps = (evaluations + 1) // 2 if twice else evaluations
            label = " ".join([name, *(f"{key.split('_')[-1]} {value}" for key, value in variant.items())])
            for spacing in SPACINGS[process]:
                shift = f", shift {spacing['time_shift']:g}" if "time_shift" in spacing else ""
                settings = {**fixed, **spacing, "num_sampling_steps": str(steps)}
                yield Setup(label, spacing["time_grid"] + shift, settings, spacing == own, not stochastic)


def default_grid(settings: Values) -> str:
    """Time grid that a sampler takes by itself."""
    kind: Any = SAMPLERS[settings["sampler"]].sampler
    pair = getattr(kind, "few_evaluations", None)
    grid: str = kind.default_grid if pair is None else pair[settings.get("solver_order", 2) > 2]
    return grid


def searched(opened: Opened, tables: Sequence[str]) -> Iterator[Setup]:
    """Tables of search_solver.py that are of the network's process.

    Raises:
        UserError: If one cannot be read, or does not fit the network.
    """
    for source in tables:
        table = chosen_table(source, None)
        if table.process == opened.pipeline.info.process:
            opened.pipeline.prepare(solver_table=source)
            yield Setup("searched", Path(source).stem, {"solver_table": source})


def forecasts(process: str, numbers: Sequence[str]) -> Iterator[Setup]:
    """50 steps of the first-order sampler, with forecasts N,O."""
    base = FORECAST[process]
    for each in numbers:
        yield Setup(f"{base['sampler']} 50, forecasts", each, {**base, "forecast": each})


def measure(
    opened: Opened, setups: Sequence[Setup], images: int, seed: int, reference_evaluations: int, **fixed: object
) -> Iterator[SamplerResult]:
    """Sample by all setups from the same noise, and compare with the solution of the ODE.

    Args:
        opened: The network.
        setups: The ways to sample.
        images: Number of images, of all classes in turn.
        seed: Seed of the noise.
        reference_evaluations: Evaluations of the solution.
        **fixed: Settings of all, such as `cfg_scale`.
    """
    pipeline = opened.pipeline
    reference = {**REFERENCES[pipeline.info.process], "num_sampling_steps": str(reference_evaluations)}
    end, _, _ = sample(pipeline, reference | fixed, images, seed)
    ideal = pictures(pipeline, end)
    for setup in setups:
        latents, evaluations, seconds = sample(pipeline, setup.settings | fixed, images, seed)
        made = pictures(pipeline, latents)
        ode = setup.ends_at_solution
        yield SamplerResult(
            name=opened.name,
            training_seed=opened.seed,
            seed=seed,
            solver=setup.solver,
            spacing=setup.spacing,
            default=setup.default,
            evaluations=evaluations,
            rmse=float((latents - end).square().mean().sqrt()) if ode else None,
            psnr=small.psnr(made, ideal) if ode else None,
            seconds=seconds,
            scores=None if opened.scores is None else opened.scores(made, labels_of(pipeline, images).numpy()),
        )


def labels_of(pipeline: Pipeline, count: int) -> Tensor:
    """(count,) int64, all classes in turn."""
    return torch.arange(count) % max(1, pipeline.num_classes)


def sample(pipeline: Pipeline, settings: Values, count: int, seed: int) -> tuple[Tensor, int, float]:
    """Sample latents (N, C, H, W); returns them, the evaluations that called the network, and seconds."""
    run, labels = pipeline.prepare(**settings), labels_of(pipeline, count)
    start = time.perf_counter()
    parts = [
        pipeline.denoise(run, seed, rows.tolist(), {"y": labels[rows]}) for rows in torch.arange(count).split(BATCH)
    ]
    latents = torch.cat(parts).cpu()
    return latents, sum(row.call for row in run.table), time.perf_counter() - start


def pictures(pipeline: Pipeline, latents: Tensor) -> Images:
    """Decode latents to (N, H, W, C) uint8."""
    parts = [to_uint8(pipeline.decode(part.to(pipeline.device))).cpu().numpy() for part in latents.split(BATCH)]
    return np.concatenate(parts)
