"""Search of a solver: what it starts from, its gradients, and that it finds what is best in closed form."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import (
    DDIMSampler,
    EulerSampler,
    FlowMatching,
    FlowUniPCSampler,
    UniPCSampler,
    create_diffusion,
    evaluations,
    sample_loop,
)
from diffusion.sampling import Evaluation
from diffusion.solver_search import Lion, Path, SearchedSolver, search_loss, teacher_path
from diffusion.solver_table import TableSampler
from models import ModelOutput

GAUSSIAN, FLOW = create_diffusion(learn_sigma=False), FlowMatching()


def denoise(process: Any) -> Any:
    """Exact predictions for data of deviation 0.5 around 0.3, at tensors of times."""

    def evaluate(x: Tensor, evaluation: Evaluation, state: object = None, /) -> ModelOutput:
        t = torch.as_tensor(evaluation.t, dtype=torch.float64).reshape(-1, 1, 1, 1)
        if process.name == "flow":
            alpha, sigma = t, 1 - t
        else:
            log = torch.from_numpy(process.alphas_cumprod_at(t.detach().clamp(0, 999).numpy())).log()
            alpha, sigma = (log / 2).exp(), (-log.expm1()).sqrt()
        noise = sigma * (x - 0.3 * alpha) / (0.25 * alpha**2 + sigma**2)
        clean = 0.3 + 0.25 * alpha * (x - 0.3 * alpha) / (0.25 * alpha**2 + sigma**2)
        return ModelOutput((clean - noise if process.name == "flow" else noise).to(x.dtype))

    return evaluate


@pytest.mark.parametrize("process", [GAUSSIAN, FLOW], ids=["gaussian", "flow"])
def test_the_table_samples_as_the_search_did(process: Any) -> None:
    solver = SearchedSolver(process, 6)
    with torch.no_grad():
        solver.logits += torch.linspace(-0.3, 0.3, 6)
        solver.earlier += torch.randn(6, 6, generator=torch.Generator().manual_seed(1)) / 10
    x = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    sampler = TableSampler(process, solver.table({}))
    path = solver(denoise(process), x)
    end = sample_loop(denoise(process), sampler, x, evaluations(sampler.times))
    assert torch.allclose(path.points[-1], end, atol=1e-9) and len(path.points) == 7


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("count", [2, 3, 6, 9])
@pytest.mark.parametrize("process", [GAUSSIAN, FLOW], ids=["gaussian", "flow"])
def test_the_search_begins_at_unipc(process: Any, count: int, order: int) -> None:
    x, solver = torch.randn(4, 1, 2, 2, dtype=torch.float64), SearchedSolver(process, count, order)
    unipc: Any = FlowUniPCSampler(FLOW, count, order=min(order, count))
    if process is GAUSSIAN:
        grid = sorted(solver.times()[:-1].tolist())
        unipc = UniPCSampler(process.restricted(grid), order=min(order, count))
        assert grid[-1] == 999 and 0 < grid[0] < 1000 / count
    end = sample_loop(denoise(process), unipc, x, evaluations(unipc.times))
    assert torch.allclose(solver(denoise(process), x).points[-1], end, atol=1e-6)
    assert torch.allclose(solver.times()[:-1], torch.tensor(unipc.times, dtype=torch.float64))


@pytest.mark.parametrize("process", [GAUSSIAN, FLOW], ids=["gaussian", "flow"])
def test_the_search_gets_closer_to_the_teacher(process: Any) -> None:
    x = torch.randn(64, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher: Any = DDIMSampler(GAUSSIAN, "100") if process is GAUSSIAN else EulerSampler(FLOW, 100)
    path, solver = teacher_path(denoise(process), teacher, x), SearchedSolver(process, 4)
    optimizer, errors = Lion([*solver.parameters()], 1e-2), []
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 60)
        solved = solver(denoise(process), x)
        errors.append(float((solved.points[-1] - path.points[-1]).detach().square().mean().sqrt()))
        optimizer.zero_grad()
        search_loss(solved, path).backward()
        optimizer.step()
    assert errors[-1] < errors[0] / 3
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in solver.parameters())


def test_points_between_those_of_a_path_are_interpolated() -> None:
    points = torch.tensor([0.0, 1.0, 4.0]).reshape(3, 1, 1)
    for times, wanted in (([9.0, 4.0, -1.0], [6.5, -1.0, 1.5]), ([0.0, 0.5, 1.0], [0.25, 1.0, 0.75])):
        path = Path(torch.tensor(times, dtype=torch.float64), points)
        assert path.at(torch.tensor(wanted, dtype=torch.float64)).flatten().tolist() == pytest.approx([0.5, 4.0, 2.5])


def test_levels_end_at_the_clean_sample_and_are_the_processs() -> None:
    solver = SearchedSolver(GAUSSIAN, 5)
    alpha, sigma = (level.detach() for level in solver.levels(solver.times()))
    assert (alpha[-1], sigma[-1]) == (1, 0) and torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha))
    whole = solver.times().detach()[:-1].numpy()
    assert alpha[:-1].numpy() ** 2 == pytest.approx(GAUSSIAN.alphas_cumprod_at(whole.clip(0)), rel=1e-9)
