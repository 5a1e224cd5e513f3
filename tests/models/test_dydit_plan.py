"""Sampling without what is off gives what masks give, and does the work of what is on."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.costs import routed_cost
from models import DyDiT, ModelOutput
from models.dydit_plan import PACK_FROM, BoundedCache, RoutingPlan
from tests.dispatch_trace import DispatchTrace
from tests.golden_data import assert_close
from tests.networks import debug_network

TIMES = tuple(float(t) for t in range(0, 1000, 37))
LAYOUTS = ("first_always_on", "all_heads")
ALWAYS, NEVER = 1e3, -1e3


@torch.no_grad()
def routed_network(**overrides: Any) -> DyDiT:
    """Random weights with varied routing: patterns change with time, tokens with the image."""
    network = debug_network("DyDiT", **overrides)
    assert isinstance(network, DyDiT)
    for block in network.blocks:
        for router in (block.attn_rate.router, block.mlp_rate.router):
            router.weight.mul_(20)
            router.bias.uniform_(-1, 1)
        block.token_selection.mlp_head[0].weight.mul_(3)
        block.token_selection.mlp_head[2].bias.uniform_(-0.2, 0.2)
    return network


@torch.no_grad()
def force(network: DyDiT, blocks: dict[int, tuple[float, float, float]]) -> DyDiT:
    """Holds the gates of some blocks: bias of heads, groups and tokens."""
    for i, (heads, groups, tokens) in blocks.items():
        block = network.blocks[i]
        for layer, bias in ((block.attn_rate.router, heads), (block.mlp_rate.router, groups)):
            layer.weight.zero_()
            layer.bias.fill_(bias)
        block.token_selection.mlp_head[2].weight.zero_()
        block.token_selection.mlp_head[2].bias.fill_(tokens)
    return network


def prepared(network: DyDiT, times: tuple[float, ...] = TIMES, pack_from: int = 0) -> tuple[DyDiT, RoutingPlan]:
    """The network for these times, packing tokens from the first one on, and its plan."""
    ready = network.for_sampling(times)
    assert ready.plan is not None
    ready.plan.pack_from = pack_from
    return ready, ready.plan


def inputs(rows: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4, 8, 8), torch.arange(rows) % 11


def assert_same(actual: ModelOutput, masked: ModelOutput) -> None:
    """To float32 rounding; masks exactly."""
    assert_close(actual.sample, masked.sample, 5e-6)
    assert all(torch.equal(one, other) for one, other in zip(actual.aux, masked.aux, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Equal results


@torch.no_grad()
@pytest.mark.parametrize("pack_from", [0, 10**9], ids=["packed", "unpacked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_gives_what_masks_give(layout: str, pack_from: int) -> None:
    network = routed_network(router_layout=layout)
    ready, plan = prepared(network, pack_from=pack_from)
    x, y = inputs()
    kept = []
    for t in TIMES:
        masked = network(x, t, y=y)
        assert_same(ready(x, t, y=y), masked)
        kept.append([float(mask.mean()) for mask in masked.aux])
    heads, groups, tokens = zip(*kept, strict=True)
    assert len(set(heads)) > 3 and len(set(groups)) > 3 and 0.2 < sum(tokens) / len(tokens) < 0.8  # a varied plan


@torch.no_grad()
@pytest.mark.parametrize("pack_from", [0, 10**9], ids=["packed", "unpacked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_and_everything_in_any_combination(layout: str, pack_from: int) -> None:
    """No heads, no groups, no tokens, or all of them, block by block; with the first always on, one remains."""
    states = list(itertools.product((NEVER, ALWAYS), repeat=3))
    network = routed_network(router_layout=layout, depth=len(states))
    force(network, dict(enumerate(states)))
    ready, plan = prepared(network, pack_from=pack_from)
    x, y = inputs()
    out = ready(x, TIMES[5], y=y)
    assert_same(out, network(x, TIMES[5], y=y))
    floor = 0.0 if layout == "all_heads" else 1 / network.config.num_heads
    for i, state in enumerate(states):
        kept = [float(mask[:, i].mean()) for mask in out.aux]
        assert kept == [1.0 if state[0] > 0 else floor, 1.0 if state[1] > 0 else floor, float(state[2] > 0)]


@torch.no_grad()
def test_with_everything_off_only_biases_remain() -> None:
    network = force(routed_network(router_layout="all_heads"), {i: (NEVER, NEVER, ALWAYS) for i in range(4)})
    ready, _ = prepared(network)
    x, y = inputs()
    reference = network(x, 999.0, y=y, features_at=(4,)).features[4]
    for block in network.blocks:
        for weight in (block.attn.qkv.weight, block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight):
            weight.fill_(torch.nan)  # not used
    assert_close(
        ready(x, TIMES[0], y=y, features_at=(4,)).features[4], network_of_biases(network, x, TIMES[0], y), 1e-6
    )
    assert reference.isfinite().all()


def network_of_biases(network: DyDiT, x: Tensor, t: float, y: Tensor) -> Tensor:
    """Tokens after the last block where every block adds its gated output biases."""
    c = network.t_embedder(t) + network.y_embedder(y)
    x = network.x_embedder(x) + network.pos_embed
    for block in network.blocks:
        _, _, gate_msa, _, _, gate_mlp = block.adaLN_modulation(c)
        x = x + gate_msa * block.attn.proj.bias + gate_mlp * block.mlp.fc2.bias
    return x


@torch.no_grad()
def test_what_the_plan_does_not_cover_goes_by_masks() -> None:
    """Other times, rows that do not share t, training: none of them touches the plan."""
    network = routed_network()
    ready, plan = prepared(network)
    plan.run_block = None  # type: ignore[assignment]  # calling it fails
    x, y = inputs()
    for t in (TIMES[3] + 0.5, torch.tensor([5.0, 500.0, 999.0]), torch.full((3,), TIMES[3])):
        assert torch.equal(ready(x, t, y=y).sample, network(x, t, y=y).sample)
    assert ready(x, TIMES[3], y=y, complete_model=True).aux is None
    noise = torch.zeros(3, *network.gate_noise_shape)
    assert_close(ready(x, TIMES[3], y=y, gate_noise=noise).sample, network(x, TIMES[3], y=y).sample, 1e-6)
    with torch.enable_grad():
        assert ready(x, TIMES[3], y=y).sample.requires_grad
    with pytest.raises(TypeError):
        ready(x, TIMES[3], y=y)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("pack_from", [0, 10**9], ids=["packed", "unpacked"])
def test_a_gpu_gives_what_its_masks_give(pack_from: int) -> None:
    network = routed_network().cuda()
    ready, _ = prepared(network, pack_from=pack_from)
    x, y = (part.cuda() for part in inputs())
    for t in TIMES[::5]:
        actual, masked = ready(x, t, y=y), network(x, t, y=y)
        assert_close(actual.sample, masked.sample, 1e-4)
        assert all(torch.equal(one, other) for one, other in zip(actual.aux, masked.aux, strict=True))


@torch.no_grad()
def test_a_plan_is_a_snapshot_and_is_taken_again() -> None:
    network = routed_network()
    ready, plan = prepared(network)
    x, y = inputs()
    before = ready(x, TIMES[3], y=y).sample
    for parameter in network.parameters():
        parameter.mul_(1.1)
    again, _ = prepared(ready)
    assert again.plan is not plan and network.plan is None
    assert_same(again(x, TIMES[3], y=y), network(x, TIMES[3], y=y))
    assert not torch.allclose(again(x, TIMES[3], y=y).sample, before, rtol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("pack_from", [0, 10**9])
def test_half_precision_weights_and_autocast_are_routed_in_float32(pack_from: int) -> None:
    network = routed_network()
    x, y = inputs(5)
    reference = prepared(network, pack_from=pack_from)[0](x, TIMES[4], y=y)
    with torch.autocast("cpu", torch.bfloat16):
        ready, plan = prepared(network, pack_from=pack_from)
        out = ready(x, TIMES[4], y=y)
        dtypes = {tensor.dtype for i in range(4) for tensor in cached(plan, i)}
    assert dtypes <= {torch.bfloat16}
    assert torch.equal(out.aux.heads, reference.aux.heads) and torch.equal(out.aux.mlp, reference.aux.mlp)
    assert out.sample.isfinite().all()
    flips = (out.aux.tokens != reference.aux.tokens).float().mean()
    assert flips < 0.05
    half = network.to(torch.bfloat16)
    ready, _ = prepared(half, pack_from=pack_from)
    out = ready(x.bfloat16(), TIMES[4], y=y)
    assert out.sample.dtype == torch.bfloat16 and out.aux.tokens.dtype == torch.float32


def cached(plan: RoutingPlan, i: int) -> list[Tensor]:
    """Copies of block i's weights that are not the block's own."""
    own = {tensor.data_ptr() for tensor in plan.blocks[i].parameters()}
    kept = [tensors for key, (tensors, _) in plan.cache._kept.items() if key[0] == i]
    return [tensor for tensors in kept for tensor in tensors if tensor.data_ptr() not in own]


# ----------------------------------------------------------------------------------------------------------------------
# Work that is really left out


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pytorchs_counter_sees_the_work_of_what_is_on_and_no_more(layout: str) -> None:
    """Timestep and width routers are evaluated when the plan is made; everything else follows the masks."""
    network, rows = routed_network(router_layout=layout), 5
    ready, _ = prepared(network)
    x, y = inputs(rows)
    config = network.config
    before = network.cost()["timestep_mlp"] + config.depth * 2 * config.router_outputs * config.hidden_size
    for t in TIMES[::5]:
        # PyTorch 2.11 does not count the fused kernel of a CPU
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            out = ready(x, t, y=y)
        stated = sum(routed_cost(network, out.aux).values()) - before
        assert counter.get_total_flops() == pytest.approx(2 * rows * stated, rel=1e-6)
        assert stated < 0.9 * sum(network.cost().values())


@torch.no_grad()
def test_width_routers_are_evaluated_once_for_the_whole_schedule() -> None:
    network, x, y = routed_network(), *inputs()
    asked: list[int] = []
    for block in network.blocks:
        for router in (block.attn_rate, block.mlp_rate):
            router.register_forward_hook(lambda _, arguments, __: asked.append(len(arguments[0])))
    ready, _ = prepared(network, (*TIMES, *TIMES))
    for t in TIMES:
        ready(x, t, y=y)
    assert asked == [len(TIMES)] * 2 * network.config.depth


@torch.no_grad()
def test_patterns_that_repeat_share_one_copy_of_weights() -> None:
    network, x, y = routed_network(), *inputs()
    ready, plan = prepared(network)
    made: list[tuple[Any, ...]] = []
    get = plan.cache.get

    def recording(key: Any, make: Any) -> Any:
        return get(key, lambda: made.append(key[:3]) or make())

    plan.cache.get = recording  # type: ignore[method-assign]
    for _ in range(2):
        for t in TIMES:
            ready(x, t, y=y)
    parts = {
        (i, part, both[k])
        for width in plan.widths.values()
        for i, both in enumerate(width.active)
        for k, part in enumerate(("attn", "mlp"))
        if len(both[k]) < network.config.num_heads
    }
    assert len(made) == len(set(made)) and set(made) == parts
    assert 8 < len(parts) < 8 * len(TIMES)


@torch.no_grad()
def test_where_everything_is_on_no_weight_is_copied_and_no_token_moved() -> None:
    network = force(routed_network(), {i: (ALWAYS, ALWAYS, ALWAYS) for i in range(4)})
    ready, plan = prepared(network)
    x, y = inputs()
    with DispatchTrace() as trace:
        ready(x, TIMES[3], y=y)
    assert all(cached(plan, i) == [] for i in range(4))
    assert {"index_select", "index_add_", "mul.Tensor"} & trace.names(inside=False).keys() == set()


def test_a_cache_stays_within_its_bytes_and_drops_the_least_recently_used() -> None:
    cache, made = BoundedCache(100), []

    def get(key: str, size: int) -> Tensor:
        return cache.get(key, lambda: made.append(key) or (torch.zeros(size, dtype=torch.uint8),))[0]

    a = get("a", 40)
    get("b", 40)
    assert get("a", 40) is a and cache.used == 80
    get("c", 50)  # b goes: a was used later
    assert cache.used == 90 and len(cache) == 2 and get("a", 40) is a
    get("b", 60)
    assert cache.used == 100 and made == ["a", "b", "c", "b"]
    get("large", 101)
    get("large", 101)  # never kept, and nothing gone for it
    assert cache.used == 100 and len(cache) == 2 and made[-2:] == ["large", "large"]


@torch.no_grad()
def test_a_cache_of_no_bytes_changes_no_result() -> None:
    network, x, y = routed_network(), *inputs()
    network.slice_cache_bytes = 0
    ready, plan = prepared(network)
    for t in TIMES[:3]:
        assert_same(ready(x, t, y=y), network(x, t, y=y))
    assert plan.cache.used == 0


# ----------------------------------------------------------------------------------------------------------------------
# Reads, and compiled code


@torch.no_grad()
def test_packing_reads_one_number_a_block_and_less_than_a_few_tokens_nothing() -> None:
    network, x, y = routed_network(), *inputs()
    for pack_from, reads in ((0, network.config.depth), (PACK_FROM["cpu"], 0)):
        ready, _ = prepared(network, pack_from=pack_from)
        with DispatchTrace() as trace:
            ready(x, TIMES[2], y=y)
        assert [call.base for call in trace.waits()] == ["nonzero"] * reads


@torch.no_grad()
def test_compiled_code_serves_every_pattern_and_number_of_tokens() -> None:
    """After the first few evaluations nothing is compiled any more."""
    torch._dynamo.reset()
    network = routed_network(depth=2, num_heads=8)
    counter = CompileCounter()
    network.compile_blocks(backend=counter)
    ready, plan = prepared(network)
    x, y = inputs(5)
    assert len({both for width in plan.widths.values() for both in width.active}) > 20
    counts = []
    for t in TIMES:
        assert_same(ready(x, t, y=y), routed_by_masks(network, x, t, y))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[len(TIMES) // 2] <= 8
    torch._dynamo.reset()


def routed_by_masks(network: DyDiT, x: Tensor, t: float, y: Tensor) -> ModelOutput:
    """The same evaluation by blocks that are not compiled."""
    with torch.compiler.set_stance("force_eager"):
        return network(x, t, y=y)


def test_a_compiled_block_trains_without_being_compiled_again() -> None:
    torch._dynamo.reset()
    network = routed_network(depth=2).train()
    counter = CompileCounter()
    network.compile_blocks(backend=counter)
    x, y = inputs(4)
    counts = []
    for _ in range(4):
        t, noise = torch.rand(4) * 999, torch.randn(4, *network.gate_noise_shape)
        out = network(x, t, y=y, gate_noise=noise)
        (out.sample.square().mean() + network(x, t, y=y, complete_model=True).sample.square().mean()).backward()
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1
    torch._dynamo.reset()
