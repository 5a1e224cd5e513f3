"""Flow samplers against recorded trajectories, against a flow known in closed form, and against a cost in steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import (
    AdamsSampler,
    EulerSampler,
    FlowMatching,
    FlowUniPCSampler,
    HeunSampler,
    ImageNoise,
    evaluations,
    guided,
    sample_loop,
)
from diffusion.caching import every_nth
from diffusion.flow_multistep import adams_weights, log_snr
from diffusion.flow_samplers import flow_steps
from diffusion.sampling import Sampler
from models import ModelOutput
from tests.dispatch_trace import DispatchTrace
from tests.golden_data import arrays, table
from tests.golden_ddt import FORWARD, TRAJECTORY, assert_within, golden_ddt
from tests.toys import DEVIATION, MEAN, Toy, exact_prediction

META = {
    name.split("/")[1].removesuffix(".safetensors"): row["meta"]
    for name, row in table("ddt/manifest")["files"].items()
    if name.startswith("samplers/")
}
FlowSampler = EulerSampler | HeunSampler | AdamsSampler
Make = Callable[..., Any]
euler, heun, adams = (partial(kind, FlowMatching()) for kind in (EulerSampler, HeunSampler, AdamsSampler))


def run(denoise: Any, sampler: Sampler, x: Tensor, **options: Any) -> Tensor:
    """A run without guidance of a function of x and t."""
    return sample_loop(
        lambda x, e, state: ModelOutput(denoise(x, e.t)), sampler, x, evaluations(sampler.times), **options
    )


# ----------------------------------------------------------------------------------------------------------------------
# Recorded trajectories: fixture -> sampler

RECORDED: dict[str, FlowSampler] = {
    "ddt_a_euler": euler(10, last_step=0.04),
    "ddt_a_euler_shift": euler(10, shift=1.5),
    "ddt_a_euler_refresh": euler(10, shift=1.5, last_step=0.04),
    "ddt_b_euler": euler(10, last_step=0.04),
    "ddt_a_sde_mean": euler(6, last_step=0.04, kind="sde_mean"),
    "ddt_a_sde": euler(6, last_step=0.04, kind="sde"),
    "ddt_a_sde_preserve": euler(6, last_step=0.04, kind="sde_preserve"),
    "ddt_a_adams2": adams(10, order=2, shift=1.5),
    "ddt_a_adams3": adams(10, order=3, shift=1.5),
    "ddt_a_adams4": adams(10, order=4, shift=1.5),
    "ddt_a_adams2_refresh": adams(10, order=2, shift=1.5),
    "idit_adams2": adams(10, order=2, shift=1.5),
    "idit_euler": euler(10, shift=1.5, last_step=0.04),
    "idit_heun_cached": heun(8, shift=1.5, last_step=0.08),
    "idit_heun_exact": heun(8, shift=1.5, last_step=0.08, exact=True),
}
# The release computes weights of order 4 in float32 with cancellation.
TOLERANCE = {"ddt_a_adams4": 2e-3}


def test_every_recorded_trajectory_is_repeated() -> None:
    assert {*RECORDED, "ddt_a_dp_sharing"} == set(META)  # that one is in test_calibration.py


@pytest.mark.parametrize("name", RECORDED)
def test_sampling_repeats_the_recorded_trajectory(name: str) -> None:
    golden, meta, sampler = arrays(f"ddt/samplers/{name}"), META[name], RECORDED[name]
    assert_within(torch.tensor(sampler.points, dtype=torch.float64), golden["timesteps"], 1e-6)
    assert_within(torch.tensor(sampler.times, dtype=torch.float64), golden["t_evals"], 1e-6)
    interval = None
    if "guidance_interval_min" in meta:
        interval = (meta["guidance_interval_min"], meta["guidance_interval_max"])
    refresh = every_nth(len(sampler.times), meta.get("state_refresh_rate", 1))
    if "state_fresh" in golden:
        assert list(refresh) == golden["state_fresh"].bool().tolist()
    network = golden_ddt(meta["model"]).for_sampling(sampler.times)
    cond, null = {"y": golden["y"]}, {"y": golden["uncond"]}
    visited = [golden["noise"]]
    noises = iter(golden.get("sde_noise", ()))
    final = sample_loop(
        guided(network, cond, null),
        sampler,
        golden["noise"],
        evaluations(sampler.times, meta["guidance"], interval, refresh),
        noise_fn=lambda x: next(noises),
        on_step=lambda i, x, out: visited.append(x),
    )
    tolerance = TOLERANCE.get(name, TRAJECTORY)
    for x, reference in zip(visited, golden["traj"], strict=False):
        assert_within(x, reference, tolerance)
    assert len(visited) == len(golden["traj"]) + 1 and next(noises, None) is None
    assert_within(final, golden["final"], tolerance)
    both = network(
        torch.cat([golden["noise"]] * 2), sampler.times[0], y=torch.cat([golden["uncond"], golden["y"]])
    ).sample.detach()  # fmt: skip
    assert_within(both, golden["first_out"], FORWARD)


# ----------------------------------------------------------------------------------------------------------------------
# Weights of Adams-Bashforth

GRIDS = {"u10": (10, 1.0, 0.1), "s10": (10, 1.5, 0.04), "u5": (5, 3.0, 0.2)}


@pytest.mark.parametrize("name", [name for name in arrays("ddt/adams_coeffs") if not name.endswith(".t")])
def test_weights_equal_the_recorded_ones(name: str) -> None:
    golden = arrays("ddt/adams_coeffs")
    grid, transform, order = name.split(".")[0], name.split(".")[1], int(name[-1])
    steps, shift, last_step = GRIDS[grid]
    sampler = adams(steps, order=order, shift=shift, last_step=last_step, in_log_snr=transform == "t2logsnr")
    assert_within(torch.tensor(sampler.points, dtype=torch.float64), golden[f"{grid}.t"], 1e-6)
    rows = [[0.0] * (order - len(weights)) + list(weights) for weights in sampler.weights]
    # The release's float32 antiderivatives cancel, the more the higher the order.
    tolerance = {1: FORWARD, 2: FORWARD, 3: 5e-4, 4: 2e-3}[order]
    assert_within(torch.tensor(rows), golden[name], tolerance)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_trajectorys_weights_and_steps_equal_the_recorded_ones(order: int) -> None:
    golden, sampler = arrays(f"ddt/samplers/ddt_a_adams{order}"), adams(10, order=order, shift=1.5)
    rows = [[0.0] * (order - len(weights)) + list(weights) for weights in sampler.weights]
    assert_within(torch.tensor(rows), golden["coeffs"], {2: FORWARD, 3: 5e-4, 4: 2e-3}[order])
    assert_within(torch.tensor(np.diff(sampler.points)), golden["timedeltas"], 1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_integrate_polynomials_exactly(count: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        *nodes, end = np.sort(rng.uniform(0, 1, count + 1)).tolist()
        weights = adams_weights(nodes, end)
        for power in range(count):
            mean = (end ** (power + 1) - nodes[-1] ** (power + 1)) / (power + 1) / (end - nodes[-1])
            scale = max(1, np.abs(weights).max())
            assert np.dot(weights, np.power(nodes, power)) == pytest.approx(mean, abs=1e-12 * scale)


def test_second_order_at_equal_distances_is_the_textbook_one() -> None:
    for weights in adams(10).weights[1:]:
        assert weights == pytest.approx((-0.5, 1.5))


# ----------------------------------------------------------------------------------------------------------------------
# A flow known in closed form: data N(MEAN, DEVIATION^2)


def exact_velocity(x: Tensor, t: float) -> Tensor:
    """E[x_1 - noise | x_t = x]."""
    return exact_prediction("velocity", x, t, 1 - t)


def exact_flow(x: Tensor, t: float) -> Tensor:
    """Where the exact flow carries x at time t from: always as many standard deviations from the mean."""
    return t * MEAN + ((t * DEVIATION) ** 2 + (1 - t) ** 2) ** 0.5 * x


def sampled_moments(sampler: Sampler) -> tuple[float, float]:
    """Mean and deviation that a one-evaluation sampler reaches from N(0, 1), by probing its affine steps."""
    mean, variance = 0.0, 1.0
    probe_x, probe_noise = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64).view(2, 3, 1, 1, 1)
    for i, t in enumerate(sampler.times):
        velocity = exact_velocity(probe_x, t)
        shift, by_x, by_noise = sampler.step(i, probe_x, velocity, lambda x: probe_noise).flatten().tolist()
        mean = shift + (by_x - shift) * mean
        variance = (by_x - shift) ** 2 * variance + (by_noise - shift) ** 2
    return mean, variance**0.5


@pytest.mark.parametrize("kind", ["ode", "sde", "sde_preserve"])
def test_euler_reaches_the_distribution_that_the_velocity_belongs_to(kind: Any) -> None:
    errors = []
    for steps in (100, 1000):
        mean, deviation = sampled_moments(euler(steps, kind=kind))
        errors.append(max(abs(mean / MEAN - 1), abs(deviation / DEVIATION - 1)))
    assert errors[1] < 0.02 and errors[1] < errors[0] / 5


def test_the_drift_by_the_score_without_noise_narrows_the_distribution() -> None:
    mean, deviation = sampled_moments(euler(1000, kind="sde_mean"))
    assert mean == pytest.approx(MEAN, rel=0.02) and deviation < 0.5 * DEVIATION


X = torch.linspace(-2, 2, 5, dtype=torch.float64).view(5, 1, 1, 1)


def end_of_flow(sampler: Sampler) -> float:
    """Largest error of the end points of the exact flow, x -> MEAN + DEVIATION x."""
    return float((run(exact_velocity, sampler, X) - exact_flow(X, 1)).abs().max())


def test_higher_orders_need_fewer_evaluations() -> None:
    samplers = {
        "euler": euler(64),
        "adams 2": adams(64),
        "adams 4": adams(64, order=4),
        "heun": heun(64),
        "heun, exact": heun(64, exact=True),
        "log-SNR": adams(64, in_log_snr=True),
    }
    errors = {name: end_of_flow(sampler) for name, sampler in samplers.items()}
    assert all(error < 0.2 * errors["euler"] for name, error in errors.items() if name not in ("euler", "log-SNR"))
    assert errors["log-SNR"] < errors["euler"]


@pytest.mark.parametrize(
    ("make", "order"),
    [(euler, 1), (adams, 2), (heun, 2), (partial(heun, exact=True), 2)],
    ids=["euler", "adams 2", "heun", "heun, exact"],
)
def test_runs_have_their_order(make: Make, order: int) -> None:
    coarse, fine = end_of_flow(make(128)), end_of_flow(make(256))
    assert coarse / fine == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_step_of_adams_has_its_order_after_an_exact_history(order: int) -> None:
    """One of order k errs by h^(k + 1). A whole run does not show it: its first steps are of lower order."""
    errors = []
    for steps in (32, 64):
        sampler = adams(steps, order=order)
        for i in range(steps // 2 + 1):  # the last step is that from t = 1/2
            x = exact_flow(X, sampler.times[i])
            end = sampler.step(i, x, exact_velocity(x, sampler.times[i]), torch.zeros_like)
        assert len(sampler.weights[i]) == order
        errors.append(float((end - exact_flow(X, sampler.points[i + 1])).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(2 ** (order + 1), rel=0.3)


# ----------------------------------------------------------------------------------------------------------------------
# Details


def test_evaluations_and_their_times() -> None:
    assert euler(4).times == euler("4").times == (0, 0.25, 0.5, 0.75) and euler(4).points[-1] == 1
    assert heun(3).times == pytest.approx((0, 1 / 3, 2 / 3))
    assert heun(3, exact=True).times == pytest.approx((0, 1 / 3, 1 / 3, 2 / 3, 2 / 3))
    assert [len(heun(9, exact=exact).times) for exact in (False, True)] == [9, 17]
    for sampler in (euler(1, last_step=0.04), heun(1), heun(1, exact=True), adams(1, order=4)):
        assert sampler.points == (0, 1) and sampler.times == (0,) and sampler.time_convention == "unit"


@pytest.mark.parametrize(
    "make",
    [euler, heun, partial(heun, exact=True), partial(adams, order=3), partial(adams, in_log_snr=True)],
    ids=["euler", "heun", "heun, exact", "adams 3", "log-SNR"],
)
def test_a_run_can_start_at_a_later_step(make: Make) -> None:
    """As from a noised image: with the times of the whole run from there, and nothing before them."""
    whole, part = make(60, shift=2.0), make(60, shift=2.0, start=20)
    assert part.points == whole.points[20:] and part.times == whole.times[-len(part.times) :]
    x = exact_flow(X, part.times[0])
    assert (run(exact_velocity, part, x) - exact_flow(X, 1)).abs().max() < 0.1


def test_a_run_forgets_the_one_before() -> None:
    x = torch.randn(2, 4, 8, 8)
    for sampler in (adams(5, order=3), heun(5), heun(5, exact=True)):
        runs = [run(lambda x, t: x.sin() + t, sampler, x) for _ in range(2)]
        assert torch.equal(*runs)
        sampler.step(0, x, x, torch.zeros_like)  # a run that was broken off
        assert torch.equal(run(lambda x, t: x.sin() + t, sampler, x), runs[0])


SAMPLERS: dict[str, Make] = {
    "ode": euler,
    "sde": partial(euler, kind="sde"),
    "heun": heun,
    "adams4": partial(adams, order=4),
    "unipc": partial(FlowUniPCSampler, FlowMatching()),
}


@pytest.mark.parametrize(("sampler", "draws"), [("ode", 0), ("sde", 4), ("heun", 0), ("adams4", 0), ("unipc", 0)])
def test_only_stochastic_kinds_draw_and_not_in_the_last_step(sampler: str, draws: int) -> None:
    drawn: list[Tensor] = []

    def noise_fn(x: Tensor) -> Tensor:
        drawn.append(x)
        return torch.zeros_like(x)

    run(lambda x, t: x, SAMPLERS[sampler](5), torch.randn(1, 4, 8, 8), noise_fn=noise_fn)
    assert len(drawn) == draws


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_leaves_its_arguments_alone_and_upcasts_the_output(sampler: str) -> None:
    x, sample = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8).bfloat16()
    copies = x.clone(), sample.clone()
    end = SAMPLERS[sampler](5).step(0, x, sample, torch.randn_like)
    assert end.dtype == torch.float32 and end.data_ptr() != x.data_ptr()
    assert torch.equal(x, copies[0]) and torch.equal(sample, copies[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_output_with_a_variance_is_refused(sampler: str) -> None:
    with pytest.raises(
        ValueError, match=r"the network's output has shape \(2, 8, 8, 8\); a flow's x has \(2, 4, 8, 8\)"
    ):
        SAMPLERS[sampler](5).step(0, torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8), torch.randn_like)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: euler(0), "step spec 0: a flow is sampled in a number of steps, such as 50"),
        (lambda: euler("ddim50"), "step spec 'ddim50': a flow is sampled in a number of steps"),
        (lambda: euler(10, shift=0.0), "the time shift must be positive and finite, not 0.0"),
        (lambda: heun(10, shift=float("nan")), "the time shift must be positive and finite, not nan"),
        (lambda: adams(10, last_step=1.0), r"the last step must be in \(0, 1\), not 1.0"),
        (lambda: adams(10, order=0), r"the order must be in 1\.\.4, not 0"),
        (lambda: adams(10, order=5), r"the order must be in 1\.\.4, not 5"),
        (lambda: euler(10, kind="odd"), "'odd' is not one of ode, sde, sde_mean, sde_preserve"),
        (lambda: euler(10, start=10), r"the start must be in 0\.\.9, not 10"),
    ],
)
def test_settings_that_make_no_sampler_are_named(make: Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_spec_is_a_number_or_its_string() -> None:
    assert flow_steps(7) == flow_steps("7") == 7


def test_the_log_snr_is_finite_and_rises() -> None:
    values = [log_snr(t) for t in np.linspace(0, 1, 101)]
    assert np.isfinite(values).all() and values == sorted(values)


@pytest.mark.parametrize(("name", "budget"), [("ode", 5), ("sde", 8), ("heun", 8), ("adams4", 8), ("unipc", 7)])
def test_operations_per_step(name: str, budget: int) -> None:
    steps, network = 32, Toy((4, 8, 8), "unit")
    sampler = SAMPLERS[name](steps)
    noise, trace = ImageNoise(0, [0, 1], (4, 8, 8)), DispatchTrace()
    x = noise.initial()
    denoise = guided(trace.watch(network), {"y": torch.tensor([1, 2])}, network.null_conditioning(2))
    table = evaluations(sampler.times, 4.0)
    with trace:
        sample_loop(denoise, sampler, x, table, noise_fn=noise)
    assert trace.count(inside=True) > 0
    assert trace.count(inside=False) / steps <= budget, trace.names(inside=False)
    assert not [call for call in trace.waits() if not call.inside]
