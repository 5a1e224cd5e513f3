"""Token routing in training: what passes by, what is computed, and which settings fit a network."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion import FlowMatching, create_diffusion
from diffusion.loss import Batch, DiffusionLoss
from models import Network, create_model
from models.transformer import TokenRoute
from runtime.errors import UserError
from tests.networks import debug_network, inputs, randomise
from train import main
from training.losses import LOSSES
from training.losses.routed import KEPT, RoutedLoss, RoutedLossSettings

ROUTES = {"DiT-debug/2": (2, 3), "Skip-DiT-debug/2": (3, 6), "DDT-debug/2": (2, 3), "IDiT-debug/2": (2, 3)}
DIGITS = "--dataset digits --max-steps 2 --dry-run --device cpu --model".split()


def loss_of(network: Network, **settings: object) -> RoutedLoss:
    process = FlowMatching() if network.time_convention == "unit" else create_diffusion()
    return RoutedLoss(network, process, seed=3, settings=RoutedLossSettings(**settings))  # type: ignore[arg-type]


def batch_of(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randn(rows, 4, 8, 8, generator=generator), {"y": torch.arange(rows) % 10}, torch.arange(rows))


@pytest.mark.parametrize("name", ROUTES)
def test_tokens_that_pass_by_rejoin_as_they_were(name: str) -> None:
    network, (first, last) = randomise(create_model(name)), ROUTES[name]
    lengths: list[int] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    kept = torch.tensor([[0, 2, 5], [1, 2, 3], [13, 14, 15]])
    x, t, cond = inputs(network, rows=3)
    route = TokenRoute(range(first - 1, last), kept)
    features = network(x, t, **cond, route=route, features_at=(first - 1, last)).features
    assert lengths == [3 if first <= number <= last else 16 for number in range(1, len(network.blocks) + 1)]
    others = torch.ones(3, 16, dtype=torch.bool).scatter(1, kept, False)
    before, behind = features[first - 1], features[last]
    assert torch.equal(behind[others], before[others])
    assert (behind != before)[~others].any(dim=1).all()


@pytest.mark.parametrize("name", ROUTES)
def test_a_route_without_those_who_pass_by_changes_nothing(name: str) -> None:
    network, (first, last) = randomise(create_model(name)), ROUTES[name]
    x, t, cond = inputs(network)
    everything = TokenRoute(range(first - 1, last), torch.arange(16).expand(2, -1))
    plain, routed = network(x, t, **cond).sample, network(x, t, **cond, route=everything).sample
    torch.testing.assert_close(routed, plain, rtol=0, atol=1e-6 * float(plain.detach().abs().max()))
    order = torch.stack([torch.randperm(16), torch.randperm(16)])  # the blocks see sets, with their positions
    shuffled = network(x, t, **cond, route=TokenRoute(everything.blocks, order)).sample
    torch.testing.assert_close(shuffled, plain, rtol=0, atol=1e-5 * float(plain.detach().abs().max()))


@pytest.mark.parametrize("name", ROUTES)
def test_macs_are_those_that_are_counted(name: str) -> None:
    """PyTorch's counter sees what `macs` states: linear in the tokens that are kept, and square in the products."""
    first, last = ROUTES[name]
    network = randomise(create_model(name))
    batch = batch_of(2)
    counted = []
    for share in (0.0, 0.75):
        blocks = (first, last) if share else None
        loss = loss_of(network, route_tokens=share, route_blocks=blocks)
        # PyTorch 2.11 does not count fused attention on a CPU
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss(batch, loss.draw(0, 2), 0, {})
        counted.append((counter.get_total_flops() / 4, loss.macs(0)))  # two rows, 2 FLOP a MAC
    (plain, stated), (routed, stated_routed) = counted
    assert plain - routed == pytest.approx(stated - stated_routed, rel=1e-6) and routed < plain


def test_all_weights_learn_and_all_tokens_are_predicted() -> None:
    loss = loss_of(randomise(debug_network("DiT")), route_tokens=0.5)
    losses = loss(batch_of(4), loss.draw(0, 4), 0, {})
    losses["loss"].mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters() if p.requires_grad)


def test_the_draw_belongs_to_row_and_step() -> None:
    """Other tokens for every row and step, the same for any cut of the batch; half of the sixteen, none twice."""
    loss = loss_of(debug_network("DiT"), route_tokens=0.5)
    whole = loss.draw(5, 8).extra[KEPT]
    assert whole.shape == (8, 8) and torch.equal(whole, whole.sort(dim=1).values)
    assert all(len(set(row.tolist())) == 8 for row in whole) and len({tuple(row.tolist()) for row in whole}) == 8
    assert torch.equal(whole[2:5], loss.draw(5, 8, range(2, 5)).extra[KEPT])
    assert not torch.equal(whole, loss.draw(6, 8).extra[KEPT])
    counts = torch.zeros(16).index_add(0, loss.draw(0, 400).extra[KEPT].flatten(), torch.ones(3200))
    assert float((counts - 200).abs().max()) < 60  # 6 standard deviations of a fair draw
    assert not loss_of(debug_network("DiT")).draw(0, 2).extra


def test_without_a_share_it_is_the_plain_loss() -> None:
    network = randomise(debug_network("DiT"))
    routed, plain = loss_of(network), DiffusionLoss(network, create_diffusion(), seed=3)
    batch = batch_of(4)
    one, other = (loss(batch, loss.draw(1, 4), 1, {})["loss"] for loss in (routed, plain))
    assert torch.equal(one, other) and routed.macs(0) == plain.macs(0) == sum(network.cost().values())
    assert LOSSES["diffusion"].loss is RoutedLoss


def test_compiled_blocks_take_both_lengths() -> None:
    torch.compiler.reset()  # graphs that other tests compiled count towards a limit
    network = randomise(debug_network("DiT"))
    compiled = copy.deepcopy(network)
    compiled.compile_blocks("eager")
    batch = batch_of(4)
    one, other = loss_of(network, route_tokens=0.5), loss_of(compiled, route_tokens=0.5)
    draws = one.draw(0, 4)
    torch.testing.assert_close(one(batch, draws, 0, {})["loss"], other(batch, draws, 0, {})["loss"])


def test_default_routes() -> None:
    """Two blocks before it and four behind, as published for 28; of a Skip-DiT as many at both ends; DDT's encoder."""
    for name, first, last in (
        ("DiT-XL/2", 3, 24), ("DiT-S/2", 3, 8), ("DiT-debug/2", 2, 3), ("Skip-DiT-XL/2", 3, 26),
        ("DDT-XL/2", 3, 20), ("IDiT-XL/2", 3, 26),
    ):  # fmt: skip
        with torch.device("meta"):
            network = create_model(name)
        assert network.routable(None) == range(first - 1, last), name


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("DiT-digits/2 --route-tokens 0.5 --route-blocks 3 9", "route_blocks 3 9: must be the numbers of a first"),
        ("DiT-digits/2 --route-tokens 0.5 --route-blocks 3 2", "route_blocks 3 2: must be"),
        ("DiT-digits/2 --route-tokens 0.99", "of 16 tokens none is left"),
        ("DiT-digits/2 --route-tokens 1.5", "--route-tokens 1.5: route_tokens must lie in [0, 1)"),
        ("DiT-digits/2 --route-blocks 2 3", "has no effect without route_tokens"),
        ("Skip-DiT-digits/2 --route-tokens 0.5 --route-blocks 2 6", "for example 2 7"),
        ("DDT-digits/2 --process flow --route-tokens 0.5 --route-blocks 2 5", "between 1 and 4"),
        ("DyDiT-digits/2 --route-tokens 0.5", "is a setting of the loss diffusion; this run uses dydit"),
    ],
)
def test_what_does_not_fit_is_told(argv: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        main([*DIGITS, *argv.split()])
    assert words in str(caught.value)


def test_a_network_that_takes_no_route_is_told() -> None:
    with pytest.raises(ValueError, match="DyDiT computes all tokens in every block"):
        loss_of(debug_network("DyDiT"), route_tokens=0.5)


def test_state_and_features_of_a_routed_evaluation() -> None:
    network = debug_network("Skip-DiT")
    x, t, cond = inputs(network, rows=1)
    route = TokenRoute(range(2, 6), torch.arange(4)[None])
    assert network(x, t, **cond, route=route).state is None
    with pytest.raises(ValueError, match="reuses state"):
        network(x, t, **cond, route=route, state=network(x, t, **cond).state)
    with pytest.raises(ValueError, match="features_at 4"):
        network(x, t, **cond, route=route, features_at=(4,))
    features = network(x, t, **cond, route=route, features_at=(2, 6)).features
    assert all(f.shape[1] == 16 for f in features.values())
