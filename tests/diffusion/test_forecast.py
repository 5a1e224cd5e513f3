"""Forecasts: exact for polynomials on any grid; edges of guidance, hooks; kept state in the place of plain reuse."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import (
    AdamsSampler,
    DDIMSampler,
    Evaluation,
    FlowMatching,
    Reuse,
    create_diffusion,
    evaluations,
    sample_loop,
)
from diffusion.flow_samplers import HeunSampler
from diffusion.forecast import Forecast, ForecastState, forecast_schedule, lagrange_weights
from models import ModelOutput

PROCESS = create_diffusion(learn_sigma=False)


def polynomial(t: float, degree: int) -> float:
    return sum((k + 1) * (t / 1000) ** k for k in range(degree + 1))


class Recorder:
    """A denoiser that returns a polynomial of the time, and counts its calls."""

    time_convention = "index"

    def __init__(self, degree: int) -> None:
        self.degree, self.times = degree, list[float]()

    def __call__(self, x: Tensor, evaluation: Evaluation, state: Any = None, /) -> ModelOutput:
        self.times.append(float(evaluation.t))
        return ModelOutput(torch.full_like(x, polynomial(float(evaluation.t), self.degree)))


@pytest.mark.parametrize("steps", ["ddim50", "10,5,20"])  # even and uneven gaps
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_forecast_is_exact_for_polynomials_of_its_order(order: int, steps: str) -> None:
    recorder, sampler = Recorder(order), DDIMSampler(PROCESS, steps)
    forecast = Forecast(recorder, order)
    table = forecast_schedule(evaluations(sampler.times), 2)
    x, calls = torch.zeros(1, 1, 1, 1, dtype=torch.float64), 0
    for row in table:
        out, calls = forecast(x, row), calls + row.call
        if calls > order:  # before that there are too few outputs
            assert float(out.sample) == pytest.approx(polynomial(float(row.t), order), rel=1e-9)
    assert recorder.times == [row.t for row in table if row.call]


@pytest.mark.parametrize(("interval", "evaluated"), [(3, 18), (4, 14), (5, 11), (8, 8)])
def test_fifty_steps_take_two_and_every_nth_evaluation(interval: int, evaluated: int) -> None:
    table = forecast_schedule(evaluations(DDIMSampler(PROCESS, "ddim50").times), interval)
    assert sum(row.call for row in table) == evaluated == 2 + 48 // interval
    assert [i for i, row in enumerate(table) if row.call][:3] == [0, 1, 1 + interval]


def test_weights_reproduce_a_value_at_its_own_time() -> None:
    times = [900.0, 640.0, 333.0]
    for j, t in enumerate(times):
        assert lagrange_weights(times, t) == pytest.approx(np.eye(3)[j])


def test_an_edge_of_guidance_is_evaluated_and_nothing_crosses_it() -> None:
    times = DDIMSampler(PROCESS, "ddim50").times
    table = forecast_schedule(evaluations(times, 2.0, (300, 700)), 4)
    edges = [i for i in range(1, 50) if table[i].guided != table[i - 1].guided]
    assert len(edges) == 2 and all(table[i].call and table[i + 1].call for i in edges)

    def denoise(x: Tensor, row: Evaluation, state: Any = None, /) -> ModelOutput:
        return ModelOutput(torch.full_like(x, 1000.0 if row.guided else row.t / 1000))

    forecast, x = Forecast(denoise, 3), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for row in table:
        assert float(forecast(x, row).sample) == pytest.approx(1000.0 if row.guided else row.t / 1000, abs=0.03)


def test_a_hook_that_replaces_x_makes_the_next_row_an_evaluation() -> None:
    recorder, sampler = Recorder(1), DDIMSampler(PROCESS, "10")
    table = forecast_schedule(evaluations(sampler.times), 5)
    assert not table[3].call
    x = torch.zeros(1, 1, 1, 1)
    sample_loop(Forecast(recorder, 1), sampler, x, table, on_step=lambda i, x, out: x + 1 if i == 2 else None)
    assert recorder.times == [sampler.times[i] for i in (0, 1, 3, 6)]


def test_no_output_leaks_into_the_next_run() -> None:
    sampler, x = AdamsSampler(FlowMatching(), 12), torch.randn(2, 1, 2, 2)
    forecast = Forecast(lambda x, row, state=None: ModelOutput(torch.tanh(x) - row.t), 2)
    table = forecast_schedule(evaluations(sampler.times), 3)
    first = sample_loop(forecast, sampler, x, table)
    sample_loop(forecast, sampler, 5 * x, table)
    assert torch.equal(first, sample_loop(forecast, sampler, x, table))


def test_interval_one_is_no_forecast() -> None:
    table = evaluations(DDIMSampler(PROCESS, "10").times, 2.0)
    assert forecast_schedule(table, 1) == table


def test_a_forecast_is_nearer_to_the_full_run_than_a_repeated_output() -> None:
    sampler = DDIMSampler(PROCESS, "ddim50")
    x = torch.linspace(-2, 2, 64, dtype=torch.float64).view(-1, 1, 1, 1)

    def denoise(x: Tensor, row: Evaluation, state: Any = None, /) -> ModelOutput:
        abar = sampler.process.tables["alphas_cumprod"][sampler.process.timesteps.index(float(row.t))]
        variance = abar * 0.25 + 1 - abar
        return ModelOutput((1 - abar) ** 0.5 * (x - 0.5 * abar**0.5) / variance)

    table = evaluations(sampler.times)
    full = sample_loop(denoise, sampler, x, table)
    fewer = forecast_schedule(table, 4)
    errors = [(sample_loop(Forecast(denoise, o), sampler, x, fewer) - full).abs().max().item() for o in (0, 1, 2)]
    assert errors[2] < errors[1] < errors[0] / 2


# ----------------------------------------------------------------------------------------------------------------------
# Kept state


class Stateful:
    """A denoiser with a state that is a polynomial of the time, on as many rows as it evaluates."""

    time_convention = "index"

    def __init__(self, degree: int, pair: bool = False) -> None:
        self.degree, self.pair, self.used = degree, pair, list[tuple[float, Any]]()

    def __call__(self, x: Tensor, row: Evaluation, state: Any = None, /) -> ModelOutput:
        if state is None:
            rows = len(x) * (2 if row.guided else 1)
            own = torch.full((rows, 1), polynomial(float(row.t), self.degree), dtype=torch.float64)
            state = (own, 2 * own) if self.pair else own
        else:
            self.used.append((float(row.t), state))
        return ModelOutput(torch.zeros_like(x), state)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_forecast_state_is_exact_for_polynomials_of_its_order(order: int, pair: bool) -> None:
    denoise, sampler = Stateful(order, pair), DDIMSampler(PROCESS, "ddim50")
    refresh = [i % 3 == 0 for i in range(50)]
    table = evaluations(sampler.times, refresh=refresh)
    x = torch.zeros(1, 1, 1, 1)
    sample_loop(denoise, sampler, x, table, cache=ForecastState(order))
    for t, state in denoise.used:
        if t <= sampler.times[3 * order]:
            first = state[0] if pair else state
            assert float(first) == pytest.approx(polynomial(t, order), rel=1e-9)


def test_order_zero_is_plain_reuse_bit_for_bit() -> None:
    sampler, x = DDIMSampler(PROCESS, "10"), torch.zeros(1, 1, 1, 1)
    table = evaluations(sampler.times, refresh=[i % 2 == 0 for i in range(10)])
    used = []
    for cache in (Reuse(), ForecastState(0)):
        denoise = Stateful(2)
        sample_loop(denoise, sampler, x, table, cache=cache)
        used.append(denoise.used)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(*used, strict=True))


def test_states_of_other_rows_are_forgotten() -> None:
    sampler, x = DDIMSampler(PROCESS, "10"), torch.zeros(1, 1, 1, 1)
    table = evaluations(sampler.times, 2.0, (300, 1000), refresh=[i % 2 == 0 for i in range(10)])
    denoise = Stateful(1)
    sample_loop(denoise, sampler, x, table, cache=ForecastState(2))
    rows = {row.t: 2 if row.guided else 1 for row in table}
    assert {row.guided for row in table} == {True, False}
    assert all(len(state) == rows[t] for t, state in denoise.used)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Forecast(Recorder(0), -1), "order of a forecast must be at least 0, not -1"),
        (lambda: ForecastState(-1), "order of a forecast must be at least 0, not -1"),
        (lambda: forecast_schedule(evaluations((3.0, 2.0)), 0), "interval must be at least 1, not 0"),
        (
            lambda: forecast_schedule(evaluations(HeunSampler(FlowMatching(), 5, exact=True).times), 3),
            "needs a sampler that evaluates the network once a step",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
