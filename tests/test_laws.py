"""The laws that hold for every family. A family is found in the registry; nothing here is written for one."""

from pathlib import Path

import pytest
import torch
from diffusion.refresh import every_nth
from torch import Tensor

import models
from diffusion import FlowMatching, ImageNoise, create_diffusion, guided, sample_loop
from diffusion.sampling import Sampler
from models import Network
from tests.dispatch_trace import DispatchTrace
from tests.golden_data import assert_close
from tests.networks import debug_name, debug_network, randomise, variants
from tests.source_words import families_named, identifiers, strings

STEPS = 6


def variant(name: str) -> Network:
    family, overrides = variants()[name]
    return debug_network(family, **overrides)


@pytest.fixture(params=variants())
def network(request: pytest.FixtureRequest) -> Network:
    return variant(request.param)


def samplers_for(network: Network, steps: int = STEPS) -> dict[str, Sampler]:
    """Samplers of every process whose output channels are the network's; about `steps` evaluations each."""
    convention, flow = network.time_convention, FlowMatching()
    gaussian = create_diffusion(str(steps), learn_sigma=network.out_channels == 2 * network.in_channels)
    made: dict[str, Sampler] = {
        "ancestral": gaussian.ancestral(convention=convention),
        "ddim": gaussian.ddim(convention=convention),
    }
    if network.out_channels == flow.output_channels(network.in_channels):
        made |= {
            "euler": flow.euler(steps, shift=1.5, convention=convention),
            "euler_sde": flow.euler(steps, kind="sde_preserve", convention=convention),
            "heun": flow.heun(steps, convention=convention),
            "heun_exact": flow.heun(steps // 2 + 1, exact=True, convention=convention),
            "adams": flow.adams(steps, order=3, convention=convention),
        }
    return made


# Every variant with every sampler that fits it.
RUNS = [(name, sampler) for name in variants() for sampler in samplers_for(variant(name))]


def inputs(network: Network, rows: int = 3) -> tuple[Tensor, float, Tensor]:
    """x, a time in the network's units, and labels, the last of them the null class."""
    x = torch.randn(rows, network.in_channels, network.input_size, network.input_size)
    t = {"index": 500.0, "unit": 0.5}[network.time_convention]
    y = torch.arange(rows) % network.num_classes
    y[-1] = network.null_class
    return x, t, y


# ----------------------------------------------------------------------------------------------------------------------
# State


@torch.no_grad()
def test_reuse_identity(network: Network) -> None:
    """State handed back at once changes nothing at all."""
    x, t, y = inputs(network)
    fresh = network(x, t, y)
    assert torch.equal(network(x, t, y, state=fresh.state).sample, fresh.sample)
    assert fresh.sample.std() > 0.01
    assert (fresh.state is not None) == network.keeps_state


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_refreshing_at_every_evaluation_is_no_caching(name: str, sampler: str, scale: float) -> None:
    network = variant(name)
    y, run = torch.tensor([1, 2]), samplers_for(network)[sampler]
    evaluations = len(run.times)
    denoise = guided(network, y, network.null_class, scale)

    def run_with(denoise: object, refresh: tuple[bool, ...] | None) -> Tensor:
        noise = ImageNoise(0, [0, 1], (network.in_channels, network.input_size, network.input_size))
        return sample_loop(denoise, run, noise.initial(), refresh, noise)

    forgetful = run_with(lambda x, t, state: denoise(x, t)._replace(state=None), None)
    assert torch.equal(run_with(denoise, None), forgetful)
    assert torch.equal(run_with(denoise, every_nth(evaluations, 1)), forgetful)
    assert run_with(denoise, every_nth(evaluations, 2)).isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Inputs


@torch.no_grad()
def test_a_number_for_t_equals_a_tensor(network: Network) -> None:
    x, t, y = inputs(network)
    assert_close(network(x, t, y).sample, network(x, torch.full((len(x),), t), y).sample)


@torch.no_grad()
def test_time_label_and_image_all_matter(network: Network) -> None:
    x, t, y = inputs(network)
    reference = network(x, t, y).sample
    for other in (network(x, t * 0.9, y), network(x, t, y.flip(0)), network(x.flip(-1), t, y)):
        assert (other.sample - reference).abs().max() > 1e-3 * reference.abs().max()


@torch.no_grad()
def test_preparing_for_a_schedule_changes_no_output(network: Network) -> None:
    x, _, y = inputs(network)
    names = list(network.state_dict())
    for run in samplers_for(network).values():
        prepared = network.for_sampling(run.times)
        for t in run.times:
            assert_close(prepared(x, t, y).sample, network(x, t, y).sample)
    assert list(network.state_dict()) == names


@torch.no_grad()
def test_evaluating_leaves_arguments_and_weights_alone(network: Network) -> None:
    x, t, y = inputs(network)
    before = [value.clone() for value in (x, y, *network.state_dict().values())]
    network(x, t, y, state=network(x, t, y).state)
    after = (x, y, *network.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_results_do_not_depend_on_how_a_batch_is_cut(name: str, sampler: str) -> None:
    network = variant(name)
    y, run = torch.tensor([1, 2, 3, 4, 5]), samplers_for(network)[sampler]
    prepared = network.for_sampling(run.times)

    def sampled(indices: list[int]) -> Tensor:
        noise = ImageNoise(0, indices, (network.in_channels, network.input_size, network.input_size))
        return sample_loop(guided(prepared, y[indices], network.null_class, 1.5), run, noise.initial(), noise_fn=noise)

    assert_close(torch.cat([sampled([0, 1, 2]), sampled([3]), sampled([4])]), sampled([0, 1, 2, 3, 4]))


# ----------------------------------------------------------------------------------------------------------------------
# Promises of a fresh network


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_fresh_network_predicts_exactly_zero(family: str) -> None:
    network = models.create_model(debug_name(family))
    x, t, y = inputs(network)
    assert not network(x, t, y).sample.any()


@pytest.mark.parametrize("family", models.FAMILIES)
def test_reset_parameters_starts_over(family: str) -> None:
    network = randomise(models.create_model(debug_name(family)))
    network.reset_parameters()
    x, t, y = inputs(network)
    assert not network(x, t, y).sample.any()


def test_a_network_states_its_cost(network: Network) -> None:
    assert all(isinstance(part, int) and part > 0 for part in network.multiply_adds().values())
    assert network.layer_norm_elements() > 0


# ----------------------------------------------------------------------------------------------------------------------
# The host never waits for the device, and the loop knows no family


@torch.no_grad()
def test_an_evaluation_at_a_number_makes_nobody_wait(network: Network) -> None:
    """Prepared for a schedule or not."""
    x, t, y = inputs(network)
    with DispatchTrace() as trace:
        network(x, t, y, state=network(x, t, y).state)
    assert trace.waits() == []


@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_a_sampling_step_makes_nobody_wait(name: str, sampler: str) -> None:
    """No value is read back, no tensor made of Python data, none moved between devices or dtypes."""
    network, steps = variant(name), 2 * ImageNoise.STEPS_PER_DRAW
    run = samplers_for(network, steps)[sampler]
    noise = ImageNoise(0, [0, 1], (network.in_channels, network.input_size, network.input_size))
    x, trace, refresh = noise.initial(), DispatchTrace(), every_nth(len(run.times), 2)
    prepared = network.for_sampling(run.times)
    interval = {"index": (300, 700), "unit": (0.3, 0.7)}[network.time_convention]
    denoise = guided(
        trace.watch(prepared), torch.tensor([1, 2]), network.null_class, 4.0, 3, interval, run.times, refresh
    )
    with trace:
        sample_loop(denoise, run, x, refresh, noise)
    assert trace.count(inside=True) > steps
    assert trace.waits() == []


@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_a_sampling_step_touches_one_device(name: str, sampler: str) -> None:
    """On the meta device a tensor from elsewhere cannot hide: everything must be there already."""
    network = variant(name)
    run = samplers_for(network)[sampler]
    y = torch.tensor([1, 2], device="meta")
    x = torch.empty(2, network.in_channels, network.input_size, network.input_size, device="meta")
    noise, trace = torch.empty_like(x), DispatchTrace()
    denoise = guided(network.to("meta").for_sampling(run.times), y, network.null_class, 4.0)
    with trace:
        sample_loop(denoise, run, x, noise_fn=lambda x: noise)
    assert {device for call in trace.calls for device in call.devices} == {"meta"}


DIFFUSION = sorted((Path(__file__).parent.parent / "diffusion").glob("*.py"))


@pytest.mark.parametrize("path", DIFFUSION, ids=lambda path: path.name)
def test_diffusion_names_no_family(path: Path) -> None:
    source = path.read_text()
    assert families_named([*identifiers(source), *strings(source)], models.FAMILIES) == set()
