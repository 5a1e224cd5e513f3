"""What is faster computes the same: to the bit where nothing else is said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusion.refresh import every_nth
from torch import Tensor
from torch.utils._pytree import tree_flatten

import models
from diffusion import ImageNoise, create_diffusion, guided, sample_loop
from models import ModelOutput, Network
from models.acceleration import GraphedNetwork, autocast, cast_weights_once
from tests.dispatch_trace import DispatchTrace
from tests.golden_data import assert_close, relative_error
from tests.networks import debug_network

CPU, BF16 = torch.device("cpu"), torch.bfloat16
T = {"index": 500.0, "unit": 0.5}


@pytest.fixture(params=models.FAMILIES)
def network(request: pytest.FixtureRequest) -> Network:
    return debug_network(request.param).requires_grad_(False)


def inputs(network: Network, rows: int = 2) -> tuple[Tensor, float, Tensor]:
    x = torch.randn(rows, network.in_channels, network.input_size, network.input_size)
    return x, T[network.time_convention], torch.arange(rows)


@torch.no_grad()
def test_compiled_blocks_compute_the_same(network: Network) -> None:
    x, t, y = inputs(network)
    wanted = network(x, t, y=y).sample
    network.compile_blocks("eager")
    assert_close(network(x, t, y=y).sample, wanted)


@torch.no_grad()
def test_weights_cast_once_compute_the_same_to_the_bit(network: Network) -> None:
    x, t, y = inputs(network)
    prepared = network.for_sampling([t])
    evaluate = autocast(prepared, CPU, BF16)
    plain, wanted = prepared(x, t, y=y).sample, evaluate(x, t, y=y).sample
    with DispatchTrace() as before:
        evaluate(x, t, y=y)
    assert cast_weights_once(prepared, BF16, lambda: evaluate(x, t, y=y)) > 0
    with DispatchTrace() as after:
        found = evaluate(x, t, y=y).sample
    assert torch.equal(found, wanted)
    assert after.names(inside=False)["_to_copy"] < before.names(inside=False)["_to_copy"]
    assert 0 < relative_error(wanted.float(), plain) < 0.1


def test_layers_outside_autocast_keep_their_weights() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.router = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                gate = self.router(x.float())
            return self.inner(x) * gate

    network = Net()
    with torch.autocast("cpu", BF16):
        assert cast_weights_once(network, BF16, lambda: network(torch.ones(1, 2))) == 1
    assert (network.inner.weight.dtype, network.router.weight.dtype) == (BF16, torch.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Recordings. On a CPU a stand-in records what a graph does: it runs on fixed inputs, into fixed outputs.


def rerun(run: Callable[[], ModelOutput]) -> tuple[Callable[[], None], ModelOutput]:
    output = run()
    output.sample.copy_(torch.full_like(output.sample, 7))  # recording computes nothing that could be relied on

    def replay() -> None:
        for old, new in zip(*(tree_flatten(out)[0] for out in (output, run())), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)

    return replay, output


class Stateful:
    """Adds label and time to x; keeps x as state, and with state adds that."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, t: float | Tensor, y: Tensor, state: Any = None) -> ModelOutput:
        self.calls += 1
        sample = x + y.view(-1, 1) + t
        return ModelOutput(sample, x + 0.0) if state is None else ModelOutput(sample + 10 * state, state)


def test_a_recording_follows_inputs_time_shape_and_state() -> None:
    plain, graphed = Stateful(), GraphedNetwork(Stateful(), rerun)
    for rows in (2, 3, 2):
        for _ in range(2):
            x, y = torch.randn(rows, 4), torch.arange(rows)
            state = other = None
            for t in (0.5, 0.25, 0.5):
                wanted, found = plain(x, t, y=y, state=state), graphed(x, t, y=y, state=other)
                assert torch.equal(found.sample, wanted.sample)
                state, other = wanted.state, found.state
    assert graphed.recordings == 2 * 3  # fresh at 0.5, and with its state at 0.25 and 0.5, for two shapes


def test_what_a_recording_gave_stays_what_it_was() -> None:
    graphed = GraphedNetwork(lambda x, t, y, state: ModelOutput(2 * x), rerun)
    first = graphed(torch.ones(1), 1.0, y=torch.ones(1)).sample
    second = graphed(torch.zeros(1), 1.0, y=torch.ones(1)).sample
    assert (first.item(), second.item(), graphed.recordings) == (2, 0, 1)


def test_a_tensor_for_t_passes_through() -> None:
    graphed = GraphedNetwork(Stateful(), rerun)
    x, t, y = torch.randn(2, 4), torch.tensor([[0.5], [0.1]]), torch.arange(2)
    assert torch.equal(graphed(x, t, y=y).sample, Stateful()(x, t, y=y).sample) and graphed.recordings == 0


def trajectory(network: Any, source: Network, refresh: tuple[bool, ...] | None) -> Tensor:
    """Two guided runs with other labels and noise, as a job draws them."""
    process = create_diffusion("6", learn_sigma=source.out_channels == 2 * source.in_channels)
    sampler = process.dpm_solver(convention=source.time_convention)
    device, results = next(source.parameters()).device, []
    for first in (0, 2):
        shape = (source.in_channels, source.input_size, source.input_size)
        noise = ImageNoise(0, [first, first + 1], shape, device)
        labels = torch.tensor([first, first + 1], device=device)
        denoise = guided(network, labels, source.null_class, 2.0, refresh=refresh)
        results.append(sample_loop(denoise, sampler, noise.initial(), refresh, noise))
    return torch.cat(results)


@pytest.mark.parametrize("refresh", [None, every_nth(6, 3)])
def test_replayed_runs_equal_plain_ones(network: Network, refresh: tuple[bool, ...] | None) -> None:
    if network.decides_by_input:
        return  # refused by the pipeline
    graphed = GraphedNetwork(network, rerun)
    assert torch.equal(trajectory(graphed, network, refresh), trajectory(network, network, refresh))
    assert graphed.recordings == 6


@pytest.mark.gpu
@pytest.mark.parametrize("refresh", [None, every_nth(6, 3)])
@pytest.mark.parametrize("half", [False, True])
def test_cuda_graphs_equal_plain_evaluations(network: Network, half: bool, refresh: tuple[bool, ...] | None) -> None:
    device = torch.device("cuda")
    network = network.to(device)
    evaluate = autocast(network, device, BF16) if half else network
    graphed = GraphedNetwork(evaluate)
    plain = trajectory(evaluate, network, refresh)
    for _ in range(2):
        assert_close(trajectory(graphed, network, refresh), plain)
    assert graphed.recordings == 6


@pytest.mark.gpu
@torch.no_grad()
def test_weights_cast_once_compute_the_same_on_a_gpu(network: Network) -> None:
    device = torch.device("cuda")
    network = network.to(device)
    x, t, y = inputs(network)
    x, y = x.to(device), y.to(device)
    evaluate = autocast(network.for_sampling([t]), device, BF16)
    wanted = evaluate(x, t, y=y).sample
    cast_weights_once(network, BF16, lambda: evaluate(x, t, y=y))
    assert_close(evaluate(x, t, y=y).sample.float(), wanted.float())
