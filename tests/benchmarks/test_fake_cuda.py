"""The CUDA path without a card: every family, process and sampler on tensors of a CUDA device that have no values."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import models
from benchmarks.backward import backward
from benchmarks.cases import blank_conditioning
from benchmarks.fake_cuda import CudaTrace, extra_casts, fake_cuda, trace, trace_block
from data import Example, Key
from diffusion import PROCESSES, SAMPLERS, Batch, evaluations, guided, make_sampler, sample_loop
from diffusion.caching import every_nth
from models import DyDiT, Network, model_config
from models.acceleration import AutocastNetwork, cast_weights_once
from models.dydit_plan import Modulation, PairWeights, attend, masked_mlp, packed_update
from models.layers import exact_parameters
from runtime.command_line import parse
from runtime.distributed import World
from sampling.run import network_times
from tests.networks import debug_name, labelled
from training.config import KINDS, TrainSettings
from training.setup import set_up
from training.trainer import Trainer

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    with fake_cuda() as device:
        yield device


def network_of(family: str, device: torch.device) -> Network:
    with device:
        return models.create_model(debug_name(family)).requires_grad_(False).eval()


def inputs(network: Network, device: torch.device, rows: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x, t = torch.empty(rows, *network.sample_shape, device=device), torch.empty(rows, device=device)
    return x, t, blank_conditioning(network, rows)


def casts_of(work: Any) -> int:
    return trace(work).counts()["cast"]


# ----------------------------------------------------------------------------------------------------------------------
# The stand-in is what it stands for: else every other count is void


def test_autocast_lowers_linear_maps_and_promotes_as_cuda_s_lists_say(device: torch.device) -> None:
    layer = torch.nn.Linear(4, 4, device=device).requires_grad_(False)  # casts of what is trained are kept
    x = torch.empty(2, 4, device=device)
    with torch.autocast("cuda", BF16):
        low = layer(x)
        assert (low.dtype, low.device) == (BF16, device)
        assert casts_of(lambda: layer(x)) == 3, "input, weight and bias"
        assert functional.layer_norm(low, (4,)).dtype == torch.float32
        assert torch.addcmul(x, low, low).dtype == torch.float32
        assert casts_of(lambda: torch.addcmul(x, low, low)) == 2, "promotes: a copy of each that is narrower"
        assert casts_of(lambda: x * low) == 0, "on no list: the kernel reads both"
    assert layer(x).dtype == torch.float32


def test_attention_is_one_kernel(device: torch.device) -> None:
    q = torch.empty(2, 3, 16, 8, device=device)
    for dtype in (torch.float32, BF16):
        recorded = trace(lambda dtype=dtype: functional.scaled_dot_product_attention(*[q.to(dtype)] * 3))
        assert recorded.counts()["attention"] == 1 and recorded.kernels[-1].macs == 2 * 2 * 3 * 16 * 16 * 8


@pytest.mark.parametrize("family", models.FAMILIES)
def test_macs_are_those_that_the_network_states(device: torch.device, family: str) -> None:
    network = network_of(family, device)
    x, t, cond = inputs(network, device, rows=1)
    assert sum(kernel.macs for kernel in trace(lambda: network(x, t, **cond)).kernels) == sum(network.cost().values())


def upload(x: Tensor) -> Tensor:
    return x + torch.tensor([1.0, 2.0]).to(x.device)


def left_on_the_cpu(x: Tensor) -> Tensor:
    return x * float(torch.arange(3).shape[0]) * torch.ones(2).to(x.device)


def read(x: Tensor) -> Tensor:
    return x / x.max().item()


@pytest.mark.parametrize(
    ("fault", "said"), [(upload, "between"), (left_on_the_cpu, "on the CPU"), (read, "to the host")]
)
def test_planted_faults_are_found(device: torch.device, fault: Any, said: str) -> None:
    recorded = CudaTrace()
    with recorded:
        try:
            fault(torch.empty(3, 2, device=device))
        except RuntimeError as error:  # what needs a value cannot go on
            assert fault is read, error
    assert any(said in line for line in recorded.faults), recorded.faults


def test_a_planted_cast_is_found(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of a gated update that CUDA's autocast widens."""
    network = network_of("DiT", device)
    x, t, cond = inputs(network, device)

    def evaluate() -> None:
        with torch.autocast("cuda", BF16):
            network(x, t, **cond)

    before = extra_casts(trace_block(network, 0, evaluate))
    monkeypatch.setattr("models.dit.multiply_add", torch.addcmul)
    assert extra_casts(trace_block(network, 0, evaluate)) == before + 2


# ----------------------------------------------------------------------------------------------------------------------
# Training


class OneBlackItem:
    """Data of any shape."""

    vae, worth_workers = "none", False

    def __init__(self, shape: tuple[int, ...], classes: list[str]) -> None:
        self.image_shape, self.classes = shape, classes
        self.null_conditioning: dict[str, Tensor]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: Key) -> Example:
        return torch.zeros(self.image_shape, dtype=torch.uint8), 0, 0


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_step_or_its_objective_waits_for_nothing(device: torch.device, family: str, process: str) -> None:
    config = model_config(debug_name(family))
    argv = ["--model", debug_name(family), "--process", process, "--precision", "bf16", "--global-batch-size", "4"]
    given = parse(
        TrainSettings, [*argv, "--max-steps", "1", "--device", "cpu"], program="train.py", doc=None, kinds=KINDS
    )
    data = OneBlackItem(config.sample_shape, [str(k) for k in range(getattr(config, "num_classes", 0))])
    if not labelled(family):
        data.null_conditioning = {}  # as data with captions have; the batch below brings its own
    setup = set_up(given, device, dataset=data, fake=nullcontext())  # type: ignore[arg-type]  # one is active
    loss = setup.loss
    cond = blank_conditioning(loss.network, 4)
    batch = Batch(torch.empty(4, *config.sample_shape, device=device), cond, torch.arange(4, device=device), null=cond)
    draws = loss.draw(0, 4, device=device)

    trainer = Trainer(setup, World(0, 1, device), None, None)

    def objective() -> None:
        assert loss(batch, draws, 0, loss.shared([(batch, draws)], 0))["loss"].device == device

    def whole_step() -> None:
        assert trainer.train_step(trainer.state.step, [(batch, draws)]).device == device
        trainer.state.step += 1

    step = whole_step if process == models.FAMILIES[family].process else objective
    trace(step)  # the first one uploads the tables of the schedule and makes the optimizer's state
    recorded = trace(step)
    assert recorded.faults == []
    assert recorded.counts()["matrix product"] > 0 and BF16 in {kernel.dtype for kernel in recorded.kernels}
    if step is whole_step:
        passes = 2 if family == "DyDiT" else 1  # with masks, and complete
        work = sum(kernel.macs for kernel in recorded.kernels) / (4 * passes * sum(loss.network.cost().values()))
        assert 2.95 < work < 3.05, "a backward pass is twice the work of a forward pass"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*map(debug_name, models.FAMILIES), "IDiT-debug/2"])
def test_blocks_cast_for_matrix_products_and_attention_and_hardly_more(
    device: torch.device, name: str, training: bool
) -> None:
    with device:
        network = models.create_model(name).requires_grad_(training).train(training)
    x, t, cond = inputs(network, device)

    def evaluate() -> None:
        with torch.autocast("cuda", BF16):
            network(x, t, **cond)

    allowed = {"DDT": 0, "LatteT2V": 0, "SkipLatteT2V": 0}.get(type(network).__name__, 1)  # of the modulation
    for index in (0, len(network.blocks) - 1):
        assert extra_casts(trace_block(network, index, evaluate)) == allowed
    units, outside = getattr(network, "num_units", 0), 1  # of skips; in the final layer or for the state
    assert extra_casts(trace(evaluate).kernels) <= allowed * len(network.blocks) + units + outside


def backward_casts(name: str, depth: int, device: torch.device) -> int:
    """Casts that neither serve nor follow a matrix product or attention, and are no gradients of biases."""
    with device:
        network = models.create_model(name, depth=depth).train()
    x, t, cond = inputs(network, device)
    with torch.autocast("cuda", BF16):
        loss = network(x, t, **cond).sample.square().mean()
    kernels = trace(lambda: backward(loss)).kernels
    extra = sum(kernel.kind == "cast" and not kernel.serves and not kernel.follows for kernel in kernels)
    exact = set(map(id, exact_parameters(network)))
    return extra - sum(id(part) not in exact for key, part in network.named_parameters() if key.endswith("bias"))


@pytest.mark.parametrize(("family", "a_block"), [("DiT", 0), ("DyDiT", 1), ("DDT", 8), ("LatteT2V", 1)])
def test_casts_of_a_block_s_backward_pass(device: torch.device, family: str, a_block: int) -> None:
    """Those of a DDT are of gradients in float32 that its additions in mixed precision give to bf16 tensors."""
    depth = models.model_config(debug_name(family)).depth
    fewer, more = (backward_casts(debug_name(family), blocks, device) for blocks in (depth, depth + 2))
    assert (more - fewer) / 2 == a_block


def test_a_plan_of_a_dydit_casts_one_tensor_a_block(device: torch.device) -> None:
    network = network_of("DyDiT", device)
    assert isinstance(network, DyDiT)
    block, d, tokens = network.blocks[0], network.config.hidden_size, network.config.tokens
    x, c = torch.empty(3, tokens, d, device=device), torch.empty(3, d, device=device)
    low = {"device": device, "dtype": BF16}
    attention = PairWeights(*(torch.empty(shape, **low) for shape in ((3 * d, d), (3 * d,), (d, d), (d,))))
    mlp = PairWeights(*(torch.empty(shape, **low) for shape in ((2 * d, d), (2 * d,), (d, 2 * d), (d,))))
    modulation = Modulation(*(torch.empty(3, 1, d, device=device) for _ in range(3)))
    head_dim, rows = d // network.config.num_heads, torch.zeros(7, dtype=torch.int64, device=device)
    with torch.autocast("cuda", BF16):
        parts = [
            trace(lambda: attend(x, c, block.adaLN_modulation, attention, block.token_selection, head_dim)),
            trace(lambda: masked_mlp(x, torch.empty(3, tokens, dtype=torch.bool, device=device), modulation, mlp)),
            trace(lambda: packed_update(x, rows, modulation, mlp)),
        ]
    assert [part.faults for part in parts] == [[], [], []]
    assert [extra_casts(part.kernels) for part in parts] == [1, 0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def traced_run(family: str, name: str, steps: int, device: torch.device, precision: torch.dtype | None) -> CudaTrace:
    """A guided run whose second evaluations reuse a state where there is one."""
    network = network_of(family, device)
    learn_sigma = network.out_channels == 2 * network.sample_shape[-3]
    sampler = make_sampler(name, PROCESSES[SAMPLERS[name].process]().make(learn_sigma), str(steps))
    times = network_times(network, sampler)
    # Routing a schedule reads its masks once, which needs values
    prepared = network if isinstance(network, DyDiT) else network.for_sampling(times)
    x, _, cond = inputs(network, device)
    evaluate: Any = prepared
    if precision is not None:
        evaluate = AutocastNetwork(prepared, device, precision)
        cast_weights_once(prepared, precision, lambda: evaluate(x, times[0], **cond))
    denoise = guided(evaluate, cond, cond, times=sampler.time_convention)
    table = evaluations(sampler.times, 2.0, refresh=every_nth(len(times), 2))
    return trace(lambda: sample_loop(denoise, sampler, x, table, noise_fn=torch.randn_like))


RUNS = [(family, "ddim") for family in models.FAMILIES] + [
    ("DDT", name) for name, row in SAMPLERS.items() if name != "ddim"
]


@pytest.mark.parametrize("precision", [None, BF16])
@pytest.mark.parametrize(("family", "sampler"), RUNS)
def test_a_sampling_run_waits_for_nothing(
    device: torch.device, family: str, sampler: str, precision: torch.dtype | None
) -> None:
    assert traced_run(family, sampler, 3, device, precision).faults == []
