"""Invariants of every family with every sampler of the registries; nothing is written for a single one."""

import copy
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from diffusion import PROCESSES, SAMPLERS, ImageNoise, evaluations, guided, make_sampler, sample_loop
from diffusion.caching import every_nth
from diffusion.sampling import Reuse
from models import Network
from models.layers import timestep_features
from sampling.run import network_times
from tests.dispatch_trace import DispatchTrace
from tests.golden_data import assert_close
from tests.networks import conditioning, debug_network, inputs, unconditional, variants
from tests.source_words import families_named, identifiers, strings
from training.losses import LOSSES

EVALUATIONS = 4
# Settings of a row that ask most of the loop: noise, several velocities, several evaluations a step.
SETTINGS: dict[str, dict[str, Any]] = {
    "ddim": {"eta": 0.5},
    "euler": {"kind": "sde_preserve", "shift": 1.5},
    "heun": {"exact": True},
    "adams": {"order": 3},
    "flow-unipc": {"order": 3},
}


@functools.cache
def variant(name: str) -> Network:
    family, overrides = variants()[name]
    return debug_network(family, **overrides).requires_grad_(False)


@pytest.fixture(params=variants())
def network(request: pytest.FixtureRequest) -> Network:
    return variant(request.param)


def samplers_for(network: Network, count: int = EVALUATIONS) -> dict[str, Any]:
    """Every sampler that fits the network's output channels, with about so many evaluations."""
    made, learn_sigma = {}, network.out_channels == 2 * network.sample_shape[-3]
    for name, row in SAMPLERS.items():
        process = PROCESSES[row.process]
        if process.has_variance or not learn_sigma:
            settings = row.settings(**SETTINGS.get(name, {}))
            steps = count // 2 + 1 if SETTINGS.get(name, {}).get("exact") else count
            made[name] = make_sampler(name, process().make(learn_sigma), str(steps), settings)
    return made


# Every variant with every sampler that fits it.
RUNS = [(name, sampler) for name in variants() for sampler in samplers_for(variant(name))]


def rows(network: Network, numbers: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Conditioning of numbered rows, and the unconditional one."""
    return conditioning(network, numbers), unconditional(network, len(numbers))


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


@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_refreshing_at_every_evaluation_is_no_caching(name: str, sampler: str) -> None:
    network = variant(name)
    steps, times = samplers_for(network)[sampler], samplers_for(network)[sampler].times
    denoise = guided(network, *rows(network, [0, 1]), times=steps.time_convention)

    def run(scale: float, refresh: tuple[bool, ...] | None, cache: Reuse | None = None) -> Tensor:
        noise, table = ImageNoise(0, [0, 1], network.sample_shape), evaluations(times, scale, refresh=refresh)
        return sample_loop(denoise, steps, noise.initial(), table, cache=cache, noise_fn=noise)

    every, second = every_nth(len(times), 1), every_nth(len(times), 2)
    guided_result, plain = run(2.0, None), run(1.0, None)
    assert torch.equal(run(2.0, every), guided_result) and torch.equal(run(1.0, every), plain)
    if network.keeps_state:
        assert torch.equal(run(2.0, second, Forgetful()), guided_result)
        assert run(2.0, second).isfinite().all() and not torch.equal(run(2.0, second), guided_result)


# ----------------------------------------------------------------------------------------------------------------------
# Repeatability


@torch.no_grad()
@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_results_depend_neither_on_earlier_runs_nor_on_how_a_batch_is_cut(name: str, sampler: str) -> None:
    """Nor on which process makes which batch, then: a rank makes some of the batches, each whole."""
    network = variant(name)
    steps = samplers_for(network)[sampler]
    prepared, table = network.for_sampling(network_times(network, steps)), evaluations(steps.times, 1.5)

    def sampled(indices: list[int]) -> Tensor:
        noise = ImageNoise(0, indices, network.sample_shape)
        denoise = guided(prepared, *rows(network, indices), times=steps.time_convention)
        return sample_loop(denoise, steps, noise.initial(), table, noise_fn=noise)

    first, second = sampled([0, 1, 2]), sampled([3, 4])
    assert torch.equal(sampled([0, 1, 2]), first), "by the same objects, after another batch"
    assert_close(torch.cat([first, second]), sampled([0, 1, 2, 3, 4]))


@torch.no_grad()
def test_evaluating_leaves_arguments_and_weights_alone(network: Network) -> None:
    x, t, cond = inputs(network)
    before = [value.clone() for value in (x, *cond.values(), *network.state_dict().values())]
    network(x, t, **cond, state=network(x, t, **cond).state)
    after = (x, *cond.values(), *network.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Times


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
def test_preparing_for_times_changes_no_output(network: Network) -> None:
    x, _, cond = inputs(network)
    names, weights = list(network.state_dict()), [value.clone() for value in network.state_dict().values()]
    times = {t for sampler in samplers_for(network).values() for t in network_times(network, sampler)}
    prepared = network.for_sampling(times)
    for t in times:
        assert_close(prepared(x, t, **cond).sample, network(x, t, **cond).sample)
    assert list(network.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), weights, strict=True))


@torch.no_grad()
def test_preparing_embeds_all_times_in_one_call(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """In networks that prepare anything; afterwards there is none."""
    calls = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(args)
        return timestep_features(*args, **options)

    for module in (models.layers, models.pixart_layers):
        monkeypatch.setattr(module, "timestep_features", counted)
    x, t, cond = inputs(network)
    prepared = network.for_sampling([t, t / 2, t])
    assert len(calls) == (prepared is not network)
    for time in (t, t / 2) if prepared is not network else ():
        prepared(x, time, **cond)
    assert len(calls) == (prepared is not network)


# ----------------------------------------------------------------------------------------------------------------------
# The host never waits for the device


@torch.no_grad()
def test_the_host_does_not_wait_in_an_evaluation_at_a_number(network: Network) -> None:
    x, t, cond = inputs(network)
    network(x, t, **cond)  # the first evaluation of a shape uploads its positions
    with DispatchTrace() as trace:
        network(x, t, **cond, state=network(x, t, **cond).state)
    assert trace.waits() == []


def watched(trace: DispatchTrace, network: Network) -> Any:
    stand_in: Any = trace.watch(network)
    stand_in.time_convention = network.time_convention
    return stand_in


@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_the_host_does_not_wait_in_a_sampling_step(name: str, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is read back, no tensor made of Python data, none copied between devices or dtypes."""
    monkeypatch.setattr(ImageNoise, "STEPS_PER_DRAW", 3)  # more noise is made inside the run
    network, count = variant(name), 5
    steps = samplers_for(network, count)[sampler]
    noise, trace = ImageNoise(0, [0, 1], network.sample_shape), DispatchTrace()
    x, prepared = noise.initial(), network.for_sampling(network_times(network, steps))
    interval = {"index": (300, 700), "unit": (0.3, 0.7)}[steps.time_convention]
    run = evaluations(steps.times, 4.0, interval, every_nth(len(steps.times), 2))
    denoise = guided(watched(trace, prepared), *rows(network, [0, 1]), times=steps.time_convention, channels=3)
    with trace:
        sample_loop(denoise, steps, x, run, noise_fn=noise)
    assert trace.count(inside=True) > count
    assert trace.waits() == []


@pytest.mark.parametrize(("name", "sampler"), RUNS)
def test_a_sampling_step_touches_one_device(name: str, sampler: str) -> None:
    """On the meta device a tensor from elsewhere cannot hide: everything must be there already."""
    network = variant(name)
    steps = samplers_for(network, 3)[sampler]
    cond, null = ({key: value.to("meta") for key, value in each.items()} for each in rows(network, [0, 1]))
    x = torch.empty(2, *network.sample_shape, device="meta")
    noise, trace = torch.empty_like(x), DispatchTrace()
    prepared = copy.deepcopy(network).to("meta").for_sampling(network_times(network, steps))
    denoise = guided(prepared, cond, null, times=steps.time_convention)
    with trace:
        sample_loop(denoise, steps, x, evaluations(steps.times, 4.0), noise_fn=lambda x: noise)
    assert {device for call in trace.calls for device in call.devices} == {"meta"}


# ----------------------------------------------------------------------------------------------------------------------
# Costs, and what the common code knows


def test_a_network_states_its_cost(network: Network) -> None:
    assert all(isinstance(part, int) and part > 0 for part in network.cost().values())


ROOT = Path(__file__).parent.parent
ACCELERATORS = re.compile(r"skip_?cache|sharing|cache_depth|GraphedNetwork|AutocastNetwork|RoutingPlan|Calibration")


def known_names(words: list[str]) -> set[str]:
    """Families, processes, samplers, losses and accelerators among the words of a source file."""
    rows: list[Callable[..., object]] = [row.sampler for row in SAMPLERS.values()]
    classes = {row.__name__ for row in [*PROCESSES.values(), *rows]} | {"GaussianDiffusion", "FlowMatching"}
    registered = {*PROCESSES, *SAMPLERS, *LOSSES} - {"diffusion"} | classes
    return families_named(words, models.FAMILIES) | {w for w in words if w in registered or ACCELERATORS.search(w)}


@pytest.mark.parametrize("path", ["diffusion/sampling.py", "training/trainer.py"])
def test_loop_guidance_and_trainer_know_nothing_by_name(path: str) -> None:
    source = (ROOT / path).read_text()
    assert known_names([*identifiers(source), *strings(source)]) == set()


def test_names_would_be_found() -> None:
    source = "if isinstance(sampler, DDIMSampler) or name == 'flow' or network.cache_depth or name == 'DiT-XL/2': pass"
    assert known_names([*identifiers(source), *strings(source)]) == {"DDIMSampler", "flow", "cache_depth", "DiT"}


@pytest.mark.parametrize("path", sorted((ROOT / "diffusion").glob("*.py")), ids=lambda path: path.name)
def test_diffusion_names_no_family(path: Path) -> None:
    source = path.read_text()
    assert families_named([*identifiers(source), *strings(source)], models.FAMILIES) == set()
