"""How two predictions are mixed, and the scale of every evaluation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import EulerSampler, FlowMatching, Reuse, evaluations, guided, sample_loop
from diffusion.guidance import Guide, linear, scheduled, zero_init, zero_star
from models import ModelOutput


class Toy:
    """A velocity that depends on x, t and y; counts rows."""

    time_convention, conditioning = "unit", ("y",)

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.rows = factor, list[int]()

    def __call__(self, x: Tensor, t: Any, *, state: Any = None, y: Tensor) -> ModelOutput:
        self.rows.append(len(x))
        return ModelOutput(self.factor * torch.sin(x + y.view(-1, 1, 1, 1)) + t)


Y = {"y": torch.tensor([1.0, 2.0])}
NULL = {"y": torch.zeros(2)}
TIMES = EulerSampler(FlowMatching(), 50).times


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_zero_star_is_its_formula(scale: float) -> None:
    first, second = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64).unbind(0)
    expected = torch.empty_like(first)
    for row in range(3):
        c, u = first[row].flatten(), second[row].flatten()
        share = (c @ u) / (u @ u)
        expected[row] = ((1 - scale) * share * u + scale * c).view_as(first[row])
    assert torch.allclose(zero_star(first, second, scale), expected, atol=1e-7)
    assert not torch.allclose(zero_star(first, second, scale), linear(first, second, scale))
    assert torch.allclose(zero_star(first, 7 * second, scale), zero_star(first, second, scale), atol=1e-6)


@pytest.mark.parametrize(("count", "zeros"), [(4, 0), (10, 0), (13, 1), (25, 1), (50, 2), (100, 4)])
def test_zero_init_is_four_percent_and_calls_no_network(count: int, zeros: int) -> None:
    sampler, toy = EulerSampler(FlowMatching(), count), Toy()
    table, visited = zero_init(evaluations(sampler.times, 2.0)), list[Tensor]()
    noise = torch.randn(2, 1, 2, 2)
    sample_loop(guided(toy, Y, NULL), sampler, noise, table, on_step=lambda i, x, out: visited.append(x))
    assert len(toy.rows) == count - zeros and set(toy.rows) == {4}
    assert [torch.equal(x, noise) for x in visited[: zeros + 1]] == [True] * zeros + [False]


def test_after_zero_init_state_is_computed_anew() -> None:
    table = zero_init(evaluations(TIMES, 2.0, refresh=[i % 4 == 0 for i in range(50)]))
    assert [row.refresh for row in table[:6]] == [True, False, True, False, True, False]
    sampler = EulerSampler(FlowMatching(), 50)
    sample_loop(guided(Toy(), Y, NULL), sampler, torch.randn(2, 1, 2, 2), table, cache=Reuse())


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_schedules_rise_from_no_guidance_with_the_scale_as_their_mean(scale: float) -> None:
    for convention, times in (("unit", [i / 1000 for i in range(1001)]), ("index", [*range(1000, -1, -1)])):
        scales = {kind: scheduled(kind, scale, times, convention) for kind in ("constant", "linear", "cosine")}  # type: ignore[arg-type]
        assert scales["constant"] == [scale] * 1001
        for kind in ("linear", "cosine"):
            values = scales[kind]
            assert values[0] == 1 and values[-1] == pytest.approx(2 * scale - 1) and values == sorted(values)
            assert sum(values) / 1001 == pytest.approx(scale)
    with pytest.raises(ValueError, match="unknown schedule 'up'; choose from constant, linear, cosine"):
        scheduled("up", 2.0, TIMES, "unit")  # type: ignore[arg-type]


def test_a_scheduled_run_is_guided_wherever_its_scale_is_not_one() -> None:
    table = evaluations(TIMES, scheduled("linear", 2.0, TIMES, "unit"), (0.1, 0.5))
    assert [row.guided for row in table] == [0.1 < t < 0.5 for t in TIMES]
    assert table[20].scale == pytest.approx(1.8) and table[0].scale == 1 and not table[0].guided


def test_an_interval_around_all_times_is_none() -> None:
    assert evaluations(TIMES, 2.0, (-0.001, 1.001)) == evaluations(TIMES, 2.0)


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_autoguidance_in_closed_form_on_rows_of_its_own(scale: float) -> None:
    first, weak = Toy(1.0), Toy(0.5)
    x = torch.randn(2, 1, 3, 3)
    row = evaluations([0.3], scale)[0]
    out = guided(first, Y, Guide(weak, Y))(x, row).sample  # type: ignore[arg-type]
    d1, d0 = (toy(x, 0.3, **Y).sample for toy in (Toy(1.0), Toy(0.5)))
    assert torch.allclose(out, d0 + scale * (d1 - d0), atol=1e-6) and (first.rows, weak.rows) == ([2], [2])


def test_a_network_that_guides_itself_changes_nothing() -> None:
    sampler, x, toy = EulerSampler(FlowMatching(), 8), torch.randn(2, 1, 3, 3), Toy()
    plain = sample_loop(guided(toy, Y), sampler, x, evaluations(sampler.times))
    itself = guided(toy, Y, Guide(toy, Y))  # type: ignore[arg-type]
    assert torch.equal(sample_loop(itself, sampler, x, evaluations(sampler.times, 3.0)), plain)
