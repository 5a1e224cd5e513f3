"""Samplers that follow a table: published steps against their formulas, closed forms, files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import DDIMSampler, EulerSampler, FlowMatching, create_diffusion, evaluations, sample_loop
from diffusion.gaussian import GaussianSettings
from diffusion.sampling import Evaluation
from diffusion.solver_table import SolverTable, TableSampler, read_table, write_table
from models import ModelOutput
from sampling.published_solvers import PUBLISHED, open_table, published_table

GAUSSIAN, FLOW = create_diffusion(learn_sigma=False), FlowMatching()
LINES = [(name, count) for name, tables in PUBLISHED.items() for count in tables.rows]


def outputs(x: Tensor, evaluation: Evaluation, state: object = None, /) -> ModelOutput:
    """A network of x and time that is not linear."""
    return ModelOutput(torch.sin(3 * x) * 0.5 + float(evaluation.t) / 1000)


def run(sampler: Any, x: Tensor) -> Tensor:
    return sample_loop(outputs, sampler, x, evaluations(sampler.times))


@pytest.mark.parametrize(("name", "count"), [line for line in LINES if line[0].startswith("DiT")])
def test_published_steps_of_the_diffusion_are_the_papers(name: str, count: int) -> None:
    """Written out in the paper's variables: clean samples, and x / sigma."""
    sizes, rows = PUBLISHED[name].rows[count]
    x = start = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, clean = 0.999, []
    for i, size in enumerate(sizes):
        after = min(max(t - size, 1e-3), 1.0)
        (alpha, sigma), (alpha1, sigma1) = (
            (a := torch.exp(torch.tensor(-(9.95 * s * s + 0.1 * s) / 2, dtype=torch.float64)), (1 - a * a).sqrt())
            for s in (t, after)
        )
        clean.append((x - sigma * outputs(x, Evaluation(1000 * t)).sample) / alpha)
        c = rows[i - 1] if i else ()
        mean = sum((w * value for w, value in zip(c, clean, strict=False)), (1 - sum(c)) * clean[i])
        x = sigma1 / sigma * x + sigma1 * (alpha1 / sigma1 - alpha / sigma) * mean
        t = after
    ours = run(TableSampler(GAUSSIAN, published_table(name, count)), start)
    assert torch.allclose(ours, x, rtol=0, atol=1e-7 * float(x.abs().max()))


@pytest.mark.parametrize(("name", "count"), [line for line in LINES if line[0].startswith("SiT")])
def test_published_steps_of_the_flow_are_the_papers(name: str, count: int) -> None:
    sizes, rows = PUBLISHED[name].rows[count]
    x = start = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, velocities = 0.0, []
    for i, size in enumerate(sizes):
        velocities.append(outputs(x, Evaluation(t)).sample)
        c = rows[i - 1] if i else ()
        x = x + size * sum((w * v for w, v in zip(c, velocities, strict=False)), (1 - sum(c)) * velocities[i])
        t += size
    ours = run(TableSampler(FLOW, published_table(name, count)), start)
    assert torch.allclose(ours, x, rtol=0, atol=2e-3 * float(x.abs().max()))  # published sizes sum to 1 within 2e-4
    assert abs(sum(sizes) - 1) < 3e-4


def plain(process: str, count: int) -> SolverTable:
    """DDIM's and Euler's steps as a table."""
    eye = tuple(tuple(float(j == i) for j in range(i + 1)) for i in range(count))
    if process == "flow":
        times = tuple(i / count for i in range(count + 1))
        return SolverTable("flow", times, tuple((t, 1 - t) for t in times), eye)
    sampler = DDIMSampler(GAUSSIAN, str(count))
    abar = sampler.process.tables["alphas_cumprod"][::-1]
    levels = (*((float(a**0.5), float((1 - a) ** 0.5)) for a in abar), (1.0, 0.0))
    return SolverTable("gaussian", (*sampler.times, -1.0), levels, eye)


@pytest.mark.parametrize("count", [2, 7])
def test_tables_of_first_order_are_ddim_and_euler(count: int) -> None:
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    ddim, euler = DDIMSampler(GAUSSIAN, str(count)), EulerSampler(FLOW, count)
    assert torch.allclose(run(TableSampler(GAUSSIAN, plain("gaussian", count)), x), run(ddim, x), atol=1e-12)
    assert torch.allclose(run(TableSampler(FLOW, plain("flow", count)), x), run(euler, x), atol=1e-12)


def test_a_second_run_gives_the_same_bits() -> None:
    sampler, x = TableSampler(GAUSSIAN, published_table("DiT-XL/2", 6)), torch.randn(2, 4, 8, 8)
    first = run(sampler, x)
    run(sampler, -x)
    assert torch.equal(run(sampler, x), first)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = published_table("SiT-XL/2", 5)
    write_table(table, tmp_path / "a.json")
    assert read_table(tmp_path / "a.json") == table == open_table(str(tmp_path / "a.json"), 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [[1.0], [0.5, 0.4]]}, "weights of a step must sum to 1"),
        ({"weights": [[1.0]]}, "1 rows of weights need 2 times"),
        ({"weights": [[1.0], [1.0]]}, "row i of the weights must have i [+] 1 numbers"),
        ({"times": [0.0, 0.5, 0.4]}, "from noise to data"),
        ({"times": [0.0, float("nan"), 1.0]}, "must be finite"),
        ({"levels": [[0, 1], [0.5, -0.5], [1, 0]]}, "must not be negative"),
        ({"format": 2}, "format 2"),
        ({"times": None}, "not a table"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.json"
    write_table(plain("flow", 2), path)
    document = json.loads(path.read_text()) | change
    assert document.pop("crc32")  # without it the document is checked for its meaning alone
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as error:
        read_table(path)
    assert "\n" not in str(error.value)


def test_tables_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_table(plain("flow", 4), tmp_path / "a.json")
    for source, count, message in [
        (str(tmp_path / "a.json"), 5, "a table of 4 evaluations, not 5"),
        ("DiT-XL/2", 4, "tables for 5, 6, 7, 8, 9, 10 evaluations, not 4"),
        (str(tmp_path / "none.json"), None, "give a file of search_solver.py"),
        (str(tmp_path), None, "give a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            open_table(source, count)
    with pytest.raises(ValueError, match="searched for process 'flow', and the network's is 'gaussian'"):
        TableSampler(GAUSSIAN, plain("flow", 4))
    with pytest.raises(ValueError, match="another noise schedule"):
        TableSampler(GaussianSettings(noise_schedule="squaredcos_cap_v2").make(False), plain("gaussian", 4))
