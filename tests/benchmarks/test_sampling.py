"""What the sampling benchmark compares, and the share of idle time it reads off a trace."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import sampling
from benchmarks.cases import random_network
from benchmarks.official import load_official_diffusion
from benchmarks.sampling import (
    Beginning,
    diffusers_case,
    file_cases,
    guided,
    guided_case,
    idle_share,
    loop_cases,
    prepare,
    random_pipeline,
)
from benchmarks.timing import check, relative_error
from diffusion import DPMSolverSampler, create_diffusion
from models import DiT
from models.acceleration import Capture
from runtime.errors import UserError
from sampling.pipeline import Pipeline
from tests.models.test_acceleration import rerun

CPU, MODEL = torch.device("cpu"), "DiT-debug/2"
# An official checkout's loops, as far as the benchmark calls them: written with ours, drawing like theirs.
LOOPS = """
import torch
import diffusion as ours
from models import ModelOutput

class Process:
    def __init__(self, spec):
        self.spec = spec

    def _run(self, kind, model, noise):
        sampler = kind(ours.create_diffusion(), self.spec)
        denoise = lambda x, evaluation, state: ModelOutput(model(x, torch.full((len(x),), evaluation.t)))
        return ours.sample_loop(denoise, sampler, noise, ours.evaluations(sampler.times))

    def p_sample_loop(self, model, shape, noise, clip_denoised, device):
        assert not clip_denoised and tuple(shape) == noise.shape and device == noise.device
        return self._run(ours.AncestralSampler, model, noise)

    def ddim_sample_loop(self, model, shape, noise, clip_denoised, device):
        return FACTOR * self._run(ours.DDIMSampler, model, noise)

def create_diffusion(spec):
    return Process(spec)
"""


def checkout(folder: Path, factor: float = 1.0) -> Path:
    (folder / "diffusion").mkdir(parents=True)
    (folder / "diffusion" / "__init__.py").write_text("from .loops import create_diffusion\n")
    (folder / "diffusion" / "loops.py").write_text(LOOPS.replace("FACTOR", str(factor)))
    return folder


def pipeline(compiler: str | None = None) -> Pipeline:
    return random_pipeline(MODEL, CPU, compiler)


def outcomes(cases: list[sampling.Case]) -> dict[str, list[torch.Tensor]]:
    actual = {}
    for case in cases:
        state = case.prepare()
        if case.outcome is not None:
            actual[case.name] = list(case.outcome(state, case.run(state)))
    return actual


def test_loops_are_compared_with_the_official_ones_draw_by_draw(tmp_path: Path) -> None:
    cases, skipped = loop_cases(CPU, 2, checkout(tmp_path))
    assert [(case.name, case.steps) for case in cases] == [
        ("official DDPM, 250 steps, 2 images", 250),
        ("DDPM, 250 steps, 2 images", 250),
        ("DDPM, 250 steps, 2 images, noise of each image's own", 250),
        ("official DDIM, 50 steps, 2 images", 50),
        ("DDIM, 50 steps, 2 images", 50),
        ("DPM-Solver++, 20 steps, 2 images", 20),
    ]
    assert skipped == []
    actual = outcomes(cases)
    assert [check(case, actual) for case in cases if case.reference] == [0, 0]
    assert "official_dit_diffusion" not in sys.modules
    wrong, _ = loop_cases(CPU, 2, checkout(tmp_path / "wrong", 1.001))
    actual = outcomes(wrong)
    with pytest.raises(UserError, match="DDIM, 50 steps, 2 images differs from official DDIM"):
        check(wrong[4], actual)


def test_a_checkout_without_a_diffusion_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="the checkout has no diffusion package"):
        load_official_diffusion(tmp_path)
    cases, skipped = loop_cases(CPU, 2, tmp_path)
    assert len(cases) == 4 and len(skipped) == 2 and not any(case.reference for case in cases)


def test_both_writers_leave_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "NPZ_IMAGES", 70)
    monkeypatch.setattr(sampling, "NPZ_SIDE", 8)
    plain, ours = file_cases(tmp_path)
    for case in (plain, ours):
        for _ in range(2):  # every round writes the file again
            case.run(case.prepare())
    with np.load(plain.prepare()) as a, np.load(ours.prepare()) as b:
        assert np.array_equal(a["arr_0"], b["arr_0"]) and np.array_equal(a["arr_1"], b["arr_1"])
        assert a["arr_0"].shape == (70, 8, 8, 3)


def test_a_beginning_is_the_first_steps_and_the_rest_is_extrapolated() -> None:
    whole = DPMSolverSampler(create_diffusion(), "20")
    assert Beginning(whole, 3).times == whole.times[:3]
    case = guided_case(pipeline(), 2, "DPM-Solver++", 5)
    assert case.images == 2 * 5 / 20 and case.steps == 5 and case.reference is None
    assert case.run(case.prepare()).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(("compiler", "capture"), [("eager", None), (None, rerun)])
def test_variants_are_compared_with_the_plain_run(compiler: str | None, capture: Capture | None) -> None:
    plain = guided_case(pipeline(), 2, "DDIM", 3)
    other = guided_case(pipeline(compiler), 2, "DDIM", 3, ", another way", capture)
    assert other.reference == plain.name != other.name
    assert check(other, outcomes([plain, other])) == pytest.approx(0, abs=1e-3)


def test_diffusers_takes_the_same_steps() -> None:
    network = random_network(MODEL, CPU)
    assert isinstance(network, DiT)
    plain, theirs = guided_case(pipeline(), 2, "DDIM", 3), diffusers_case(network, 2, 3)
    assert theirs.reference == plain.name
    error = check(theirs, outcomes([plain, theirs]))
    assert error is not None and 0 < error < 0.02


def test_half_precision_is_compared_on_the_same_noise() -> None:
    error = sampling.half_precision_error(MODEL, 2, "ddim5", CPU)
    assert 0 < error < 0.1
    settings = {**guided("DDIM"), "num_sampling_steps": "ddim5", "precision": "fp32"}
    ready = [prepare(pipeline(), 2, **settings) for _ in range(2)]
    assert relative_error([ready[0].latents()], [ready[1].latents()]) == 0


@pytest.mark.parametrize(
    ("intervals", "share"),
    [
        ([(0, 10)], 0.0),
        ([(0, 4), (6, 10)], 0.2),
        ([(6, 10), (0, 4)], 0.2),
        ([(0, 10), (2, 3), (5, 12), (15, 20)], 0.15),
        ([(0, 1), (0, 1), (3, 4)], 0.5),
    ],
)
def test_idle_share_is_the_time_in_which_nothing_ran(intervals: list[tuple[float, float]], share: float) -> None:
    assert idle_share(intervals) == pytest.approx(share)


def test_a_trace_without_events_is_no_idle_device() -> None:
    with pytest.raises(ValueError, match="nothing ran"):
        idle_share([])


def test_decoding_happens_while_the_next_chunk_is_drawn() -> None:
    ready, decoded = prepare(pipeline(), 2, 2, **guided("DDIM")), []
    share = sampling.idle_while_sampling(ready, 3, lambda latents: decoded.append(len(latents)) or latents)  # type: ignore[func-returns-value]
    assert 0 <= share < 1 and decoded == [2] * 4
