"""Invariants of every family with every sampler of the registries; nothing is written for a single one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from diffusion import PROCESSES, SAMPLERS, ImageNoise, evaluations, guided, make_sampler, sample_loop
from diffusion.caching import every_nth
from diffusion.sampling import Reuse
from diffusion.schedules import convert_time
from models import Network
from tests.dispatch_trace import DispatchTrace
from tests.golden_data import assert_close
from tests.networks import debug_name, debug_network, inputs, randomise, variants
from tests.source_words import families_named, identifiers, strings

STEPS = 6
# Settings of a row that ask most of the loop: noise, several velocities, several evaluations a step.
SETTINGS: dict[str, dict[str, Any]] = {
    "ddim": {"eta": 0.5},
    "euler": {"kind": "sde_preserve", "shift": 1.5},
    "heun": {"exact": True},
    "adams": {"order": 3},
}


def variant(name: str) -> Network:
    family, overrides = variants()[name]
    return debug_network(family, **overrides)


@pytest.fixture(params=variants())
def network(request: pytest.FixtureRequest) -> Network:
    return variant(request.param)


def samplers_for(network: Network, evaluations: int = STEPS) -> dict[str, Any]:
    """Every sampler that fits the network's output channels, with about so many evaluations."""
    made, learn_sigma = {}, network.out_channels == 2 * network.sample_shape[-3]
    for name, row in SAMPLERS.items():
        process = PROCESSES[row.process]
        if process.has_variance or not learn_sigma:
            settings = row.settings(**SETTINGS.get(name, {}))
            steps = evaluations // 2 + 1 if SETTINGS.get(name, {}).get("exact") else evaluations
            made[name] = make_sampler(name, process().make(learn_sigma), str(steps), settings)
    return made


# Every variant with every sampler that fits it.
RUNS = [(name, sampler) for name in variants() for sampler in samplers_for(variant(name))]


def conditioning(network: Network, rows: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Conditioning of numbered rows, and the unconditional one."""
    _, _, cond = inputs(network, 5)
    return {name: value[rows] for name, value in cond.items()}, network.null_conditioning(len(rows))


def network_times(network: Network, sampler: Any) -> list[float]:
    return [convert_time(t, sampler.time_convention, network.time_convention) for t in sampler.times]


# ----------------------------------------------------------------------------------------------------------------------
# State


@torch.no_grad()
def test_reuse_identity(network: Network) -> None:
    """State handed back at once changes nothing at all."""
    x, t, cond = inputs(network, 3)
    fresh = network(x, t, **cond)
    assert torch.equal(network(x, t, **cond, state=fresh.state).sample, fresh.sample)
    assert fresh.sample.std() > 0.01
    assert (fresh.state is not None) == network.keeps_state


class Forgetful(Reuse):
    def get(self, evaluation: object, /) -> None:
        return None


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_refreshing_at_every_evaluation_is_no_caching(name: str, sampler: str, scale: float) -> None:
    network = variant(name)
    steps = samplers_for(network)[sampler]
    cond, null = conditioning(network, [0, 1])
    denoise, count = guided(network, cond, null, times=steps.time_convention), len(steps.times)

    def run(refresh: tuple[bool, ...] | None, cache: Reuse | None = None) -> Tensor:
        noise, table = ImageNoise(0, [0, 1], network.sample_shape), evaluations(steps.times, scale, refresh=refresh)
        return sample_loop(denoise, steps, noise.initial(), table, cache=cache, noise_fn=noise)

    reference = run(None)  # the second of these runs, of the same objects, has the same bits
    assert torch.equal(run(every_nth(count, 1)), reference)
    assert torch.equal(run(every_nth(count, 2), Forgetful()), reference)
    assert run(every_nth(count, 2)).isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Inputs


@torch.no_grad()
def test_a_number_for_t_equals_a_tensor(network: Network) -> None:
    x, t, cond = inputs(network)
    assert_close(network(x, t, **cond).sample, network(x, torch.full((len(x),), t), **cond).sample)


@torch.no_grad()
def test_time_conditioning_and_image_all_matter(network: Network) -> None:
    x, t, cond = inputs(network, 3)
    reference = network(x, t, **cond).sample
    others = [network(x, t * 0.9, **cond), network(x.flip(-1), t, **cond)]
    others += [network(x, t, **{**cond, name: value.flip(0)}) for name, value in cond.items()]
    for other in others:
        assert (other.sample - reference).abs().max() > 1e-3 * reference.abs().max()


@torch.no_grad()
def test_preparing_for_a_schedule_changes_no_output(network: Network) -> None:
    x, _, cond = inputs(network)
    names = list(network.state_dict())
    for sampler in samplers_for(network).values():
        times = network_times(network, sampler)
        prepared = network.for_sampling(times)
        for t in times:
            assert_close(prepared(x, t, **cond).sample, network(x, t, **cond).sample)
    assert list(network.state_dict()) == names


@torch.no_grad()
def test_evaluating_leaves_arguments_and_weights_alone(network: Network) -> None:
    x, t, cond = inputs(network)
    before = [value.clone() for value in (x, *cond.values(), *network.state_dict().values())]
    network(x, t, **cond, state=network(x, t, **cond).state)
    after = (x, *cond.values(), *network.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_results_do_not_depend_on_how_a_batch_is_cut(name: str, sampler: str) -> None:
    network = variant(name)
    steps = samplers_for(network)[sampler]
    prepared, table = network.for_sampling(network_times(network, steps)), evaluations(steps.times, 1.5)

    def sampled(indices: list[int]) -> Tensor:
        noise = ImageNoise(0, indices, network.sample_shape)
        denoise = guided(prepared, *conditioning(network, indices), times=steps.time_convention)
        return sample_loop(denoise, steps, noise.initial(), table, noise_fn=noise)

    assert_close(torch.cat([sampled([0, 1, 2]), sampled([3]), sampled([4])]), sampled([0, 1, 2, 3, 4]))


# ----------------------------------------------------------------------------------------------------------------------
# Promises of a fresh network


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_fresh_network_predicts_exactly_zero(family: str) -> None:
    network = models.create_model(debug_name(family))
    x, t, cond = inputs(network)
    assert not network(x, t, **cond).sample.any()


@pytest.mark.parametrize("family", models.FAMILIES)
def test_reset_parameters_starts_over(family: str) -> None:
    network = randomise(models.create_model(debug_name(family)))
    network.reset_parameters()
    x, t, cond = inputs(network)
    assert not network(x, t, **cond).sample.any()


def test_a_network_states_its_cost(network: Network) -> None:
    assert all(isinstance(part, int) and part > 0 for part in network.cost().values())


# ----------------------------------------------------------------------------------------------------------------------
# The host never waits for the device, and the loop knows no family


@torch.no_grad()
def test_the_host_does_not_wait_in_an_evaluation_at_a_number(network: Network) -> None:
    x, t, cond = inputs(network)
    with DispatchTrace() as trace:
        network(x, t, **cond, state=network(x, t, **cond).state)
    assert trace.waits() == []


def watched(trace: DispatchTrace, network: Network) -> Any:
    stand_in: Any = trace.watch(network)
    stand_in.time_convention = network.time_convention
    return stand_in


@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_the_host_does_not_wait_in_a_sampling_step(name: str, sampler: str) -> None:
    """No value is read back, no tensor made of Python data, none copied between devices or dtypes."""
    network, count = variant(name), ImageNoise.STEPS_PER_DRAW + 2  # more noise is made inside the run
    steps = samplers_for(network, count)[sampler]
    noise, trace = ImageNoise(0, [0, 1], network.sample_shape), DispatchTrace()
    x, prepared = noise.initial(), network.for_sampling(network_times(network, steps))
    interval = {"index": (300, 700), "unit": (0.3, 0.7)}[steps.time_convention]
    run = evaluations(steps.times, 4.0, interval, every_nth(len(steps.times), 2))
    cond, null = conditioning(network, [0, 1])
    denoise = guided(watched(trace, prepared), cond, null, times=steps.time_convention, channels=3)
    with trace:
        sample_loop(denoise, steps, x, run, noise_fn=noise)
    assert trace.count(inside=True) > count
    assert trace.waits() == []


@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_a_sampling_step_touches_one_device(name: str, sampler: str) -> None:
    """On the meta device a tensor from elsewhere cannot hide: everything must be there already."""
    network = variant(name)
    steps = samplers_for(network)[sampler]
    cond, null = ({name: value.to("meta") for name, value in rows.items()} for rows in conditioning(network, [0, 1]))
    x = torch.empty(2, *network.sample_shape, device="meta")
    noise, trace = torch.empty_like(x), DispatchTrace()
    prepared = network.to("meta").for_sampling(network_times(network, steps))
    denoise = guided(prepared, cond, null, times=steps.time_convention)
    with trace:
        sample_loop(denoise, steps, x, evaluations(steps.times, 4.0), noise_fn=lambda x: noise)
    assert {device for call in trace.calls for device in call.devices} == {"meta"}


DIFFUSION = sorted((Path(__file__).parent.parent / "diffusion").glob("*.py"))


@pytest.mark.parametrize("path", DIFFUSION, ids=lambda path: path.name)
def test_diffusion_names_no_family(path: Path) -> None:
    source = path.read_text()
    assert families_named([*identifiers(source), *strings(source)], models.FAMILIES) == set()
