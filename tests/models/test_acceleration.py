"""Faster evaluations give the same results: to the bit where nothing else is said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_flatten

import models
from diffusion import DPMSolverSampler, ImageNoise, convert_time, create_diffusion, evaluations, guided, sample_loop
from diffusion.caching import every_nth
from models import ModelOutput, Network, NetworkLike, TimeConvention
from models.acceleration import AutocastNetwork, GraphedNetwork, cast_weights_once
from tests.dispatch_trace import DispatchTrace
from tests.golden_data import assert_close, relative_error
from tests.networks import conditioning, debug_network, inputs, unconditional

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(params=models.FAMILIES)
def network(request: pytest.FixtureRequest) -> Network:
    return debug_network(request.param).requires_grad_(False)


@torch.no_grad()
def test_compiled_blocks_compute_the_same(network: Network) -> None:
    x, t, conditioning = inputs(network)
    expected = network(x, t, **conditioning).sample
    network.compile_blocks("eager")
    assert_close(network(x, t, **conditioning).sample, expected)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("sampling", [False, True])
@torch.no_grad()
def test_blocks_are_compiled_once_for_all_steps_and_whole(network: Network, sampling: bool, half: bool) -> None:
    """No graph break is possible: they are compiled with fullgraph=True."""
    torch._dynamo.reset()
    counter, after = CompileCounter(), []
    network.compile_blocks(counter)
    x, t, conditioning = inputs(network)
    times = [t, t / 2, t / 3]
    prepared = network.for_sampling(times)
    for time in times:
        with torch.autocast("cpu", BF16, enabled=half):
            prepared(x, time if sampling else torch.rand(len(x)) * t, **conditioning)
        after.append(counter.frame_count)
    # Both halves of a DDT, whose conditioning differs; blocks and skip units; spatial and temporal blocks; what a plan
    # runs in place of a block, where one head is on and where more are
    kinds = {
        "DDT": 2,
        "SkipDiT": 2,
        "Latte": 2,
        "SkipLatte": 3,
        "LatteT2V": 2,
        "SkipLatteT2V": 3,
        "DyDiT": 3 if sampling else 1,
    }
    assert after == [kinds.get(type(network).__name__, 1)] * 3
    torch._dynamo.reset()


@torch.no_grad()
def test_one_compilation_serves_every_number_of_rows(network: Network) -> None:
    """Guidance in an interval doubles the rows of an evaluation, and the last batch is smaller."""
    torch._dynamo.reset()
    counter, after = CompileCounter(), []
    network.compile_blocks(counter)
    x, t, conditioning = inputs(network)
    prepared = network.for_sampling([t])
    for rows in (4, 2, 4, 3, 7):
        repeated = {name: value.repeat(4, *[1] * (value.ndim - 1))[:rows] for name, value in conditioning.items()}
        prepared(x.repeat(4, *[1] * (x.ndim - 1))[:rows], t, **repeated)
        after.append(counter.frame_count)
    assert len(set(after)) == 1 and after[0] > 0
    torch._dynamo.reset()


@torch.no_grad()
def test_a_planted_graph_break_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    network = debug_network("DiT")
    monkeypatch.setattr("models.dit.multiply_add", lambda x, gate, update: update if update.max() > 0 else x)
    network.compile_blocks("eager")
    x, t, conditioning = inputs(network)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="branching"):
        network(x, t, **conditioning)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_planted_recompilation_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    network, seen, counter = debug_network("DiT"), [], CompileCounter()
    torch._dynamo.reset()
    monkeypatch.setattr("models.dit.multiply_add", lambda x, gate, update: x + len(seen) * gate * update)
    network.compile_blocks(counter)
    x, t, conditioning = inputs(network)
    for _ in range(2):
        seen.append(0)  # a number that code is compiled for
        network(x, t, **conditioning)
    assert counter.frame_count == 2
    torch._dynamo.reset()


@torch.no_grad()
def test_weights_cast_once_compute_the_same_to_the_bit(network: Network) -> None:
    x, t, conditioning = inputs(network)
    prepared = network.for_sampling([t])
    evaluate = AutocastNetwork(prepared, CPU, BF16)
    plain, expected = prepared(x, t, **conditioning).sample, evaluate(x, t, **conditioning).sample
    with DispatchTrace() as before:
        evaluate(x, t, **conditioning)
    assert cast_weights_once(prepared, BF16, lambda: evaluate(x, t, **conditioning)) > 0
    with DispatchTrace() as after:
        actual = evaluate(x, t, **conditioning).sample
    assert torch.equal(actual, expected)
    assert after.names(inside=False)["_to_copy"] < before.names(inside=False)["_to_copy"]
    assert 0 < relative_error(expected.float(), plain) < 0.1


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


class Timed:
    """Has no embedding of its times, so that each is recorded."""

    def embedded_time(self, t: float) -> None:
        return None


class Stateful(Timed):
    """Adds label and time to x; keeps x as state, and with state adds that."""

    time_convention: TimeConvention = "unit"
    conditioning = ("y",)

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, t: float | Tensor, *, y: Tensor, state: Any = None) -> ModelOutput:
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
                expected, actual = plain(x, t, y=y, state=state), graphed(x, t, y=y, state=other)
                assert torch.equal(actual.sample, expected.sample)
                state, other = expected.state, actual.state
    assert graphed.recordings == 2 * 3  # fresh at 0.5, and with its state at 0.25 and 0.5, for two shapes


def test_outputs_are_not_overwritten_by_the_next_replay() -> None:
    graphed = GraphedNetwork(Stateful(), rerun)
    first = graphed(torch.ones(1, 1), 1.0, y=torch.ones(1)).sample
    second = graphed(torch.zeros(1, 1), 1.0, y=torch.ones(1)).sample
    assert (first.item(), second.item(), graphed.recordings) == (3, 2, 1)


class Text(Timed):
    """Adds the mean of a text's features over its mask to x."""

    time_convention: TimeConvention = "index"
    conditioning = ("text", "text_mask")

    def __call__(
        self, x: Tensor, t: float | Tensor, *, text: Tensor, text_mask: Tensor, state: Any = None
    ) -> ModelOutput:
        weights = text_mask / text_mask.sum(1, keepdim=True)
        return ModelOutput(x * t + (text.mean(2) * weights).sum(1)[:, None])


@pytest.mark.parametrize("half", [False, True])
def test_each_length_of_a_text_has_a_recording_of_its_own(half: bool) -> None:
    plain = AutocastNetwork(Text(), CPU, BF16) if half else Text()
    graphed = GraphedNetwork(plain, rerun)
    assert (graphed.time_convention, graphed.conditioning) == ("index", ("text", "text_mask"))
    for length in (5, 7, 5, 7):
        x, mask = torch.randn(2, 4), torch.ones(2, length)
        mask[1, 3:] = 0
        inputs = {"text_mask": mask, "text": torch.randn(2, length, 6)}
        assert torch.equal(graphed(x, 2.0, **inputs).sample, plain(x, 2.0, **inputs).sample)
    assert graphed.recordings == 2


def test_conditioning_of_the_same_shapes_under_other_names_or_dtypes_is_recorded_apart() -> None:
    class Named(Stateful):
        def __call__(self, x: Tensor, t: float | Tensor, *, state: Any = None, **leaves: Tensor) -> ModelOutput:
            ((name, value),) = leaves.items()
            return ModelOutput(x + (1 if name == "a" else 2) * value.float().view(-1, 1))

    graphed, x = GraphedNetwork(Named(), rerun), torch.zeros(2, 1)
    for leaves, expected in (
        ({"a": torch.ones(2)}, 1),
        ({"b": torch.ones(2)}, 2),
        ({"a": torch.arange(2) + 1}, [1, 2]),
    ):
        assert graphed(x, 1.0, **leaves).sample.flatten().tolist() == torch.tensor(expected).expand(2).tolist()
    assert graphed.recordings == 3


class Unconditional(Timed):
    """Multiplies x by the time."""

    time_convention: TimeConvention = "unit"
    conditioning = ()

    def __call__(self, x: Tensor, t: float | Tensor, *, state: Any = None) -> ModelOutput:
        return ModelOutput(x * t)


def test_a_network_without_conditioning_is_recorded() -> None:
    graphed = GraphedNetwork(Unconditional(), rerun)
    assert graphed(torch.ones(2), 3.0).sample.tolist() == [3, 3] and graphed.conditioning == ()


def test_wrappers_read_like_the_network_that_they_wrap(network: Network) -> None:
    for wrapper in (AutocastNetwork(network, CPU, BF16), GraphedNetwork(AutocastNetwork(network, CPU, BF16), rerun)):
        assert wrapper.time_convention == network.time_convention
        assert wrapper.conditioning == network.conditioning != ()


def test_a_tensor_for_t_passes_through() -> None:
    graphed = GraphedNetwork(Stateful(), rerun)
    x, t, y = torch.randn(2, 4), torch.tensor([[0.5], [0.1]]), torch.arange(2)
    assert torch.equal(graphed(x, t, y=y).sample, Stateful()(x, t, y=y).sample) and graphed.recordings == 0


def trajectory(network: NetworkLike, source: Network, refresh: tuple[bool, ...] | None) -> Tensor:
    """Two guided runs with other labels and noise, as in a job."""
    process = create_diffusion("6", learn_sigma=source.out_channels == 2 * source.sample_shape[0])
    sampler = DPMSolverSampler(process)
    run = evaluations(sampler.times, 2.0, refresh=refresh)
    device, results = next(source.parameters()).device, []
    for first in (0, 2):
        noise = ImageNoise(0, [first, first + 1], source.sample_shape, device)
        rows, null = conditioning(source, [first, first + 1]), unconditional(source, 2)
        cond, second = ({k: leaf.to(device) for k, leaf in each.items()} for each in (rows, null))
        denoise = guided(network, cond, second, times=sampler.time_convention)
        results.append(sample_loop(denoise, sampler, noise.initial(), run, noise_fn=noise))
    return torch.cat(results)


def prepared_for_trajectory(network: Network) -> Network:
    times = DPMSolverSampler(create_diffusion("6")).times
    return network.for_sampling([convert_time(t, "index", network.time_convention) for t in times])


@pytest.mark.parametrize("refresh", [None, every_nth(6, 3)])
def test_replayed_runs_equal_plain_ones(network: Network, refresh: tuple[bool, ...] | None) -> None:
    if any(row.data_dependent and type(network) is row.network for row in models.FAMILIES.values()):
        return  # refused by the pipeline
    graphed = GraphedNetwork(network, rerun)
    assert torch.equal(trajectory(graphed, network, refresh), trajectory(network, network, refresh))
    assert graphed.recordings == 6
    graphed = GraphedNetwork(prepared_for_trajectory(network), rerun)
    assert_close(trajectory(graphed, network, refresh), trajectory(network, network, refresh))
    reused = refresh is not None and network.keeps_state
    assert graphed.recordings == 1 + reused, "one serves every time; with state, one computes it and one reads it"


@pytest.mark.gpu
@pytest.mark.parametrize("refresh", [None, every_nth(6, 3)])
@pytest.mark.parametrize("half", [False, True])
def test_cuda_graphs_equal_plain_evaluations(network: Network, half: bool, refresh: tuple[bool, ...] | None) -> None:
    device = torch.device("cuda")
    network = network.to(device)
    prepared = prepared_for_trajectory(network)
    evaluate = AutocastNetwork(prepared, device, BF16) if half else prepared
    graphed = GraphedNetwork(evaluate)
    plain = trajectory(evaluate, network, refresh)
    for _ in range(2):
        assert_close(trajectory(graphed, network, refresh), plain)
    assert graphed.recordings <= 2 or type(network).__name__ == "DyDiT"


@pytest.mark.gpu
@torch.no_grad()
def test_weights_cast_once_compute_the_same_on_a_gpu(network: Network) -> None:
    device = torch.device("cuda")
    network = network.to(device)
    x, t, conditioning = inputs(network)
    x, conditioning = x.to(device), {name: value.to(device) for name, value in conditioning.items()}
    evaluate = AutocastNetwork(network.for_sampling([t]), device, BF16)
    expected = evaluate(x, t, **conditioning).sample
    cast_weights_once(network, BF16, lambda: evaluate(x, t, **conditioning))
    assert_close(evaluate(x, t, **conditioning).sample.float(), expected.float())
