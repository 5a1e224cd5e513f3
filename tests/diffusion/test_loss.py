"""The plain loss: recorded values, randomness that belongs to rows, dropped conditioning, either kind of time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import Batch, DiffusionLoss, Draws, FlowMatching, GaussianDiffusion, create_diffusion, row_noise
from diffusion.loss import LossSettings, row_generators
from diffusion.schedules import named_betas
from models import Network, TimeConvention
from runtime.live_memory import LiveMemory
from tests.golden_data import arrays, assert_close_elementwise, tiny_dit
from tests.networks import debug_network
from tests.toys import CLIP, TextToy, Toy

SHAPE = (4, 8, 8)
PLAIN = create_diffusion(learn_sigma=False)


def batch(rows: int, shape: tuple[int, ...] = SHAPE) -> Batch:
    return Batch(torch.randn(rows, *shape), {"y": torch.arange(rows) % 10}, torch.arange(rows))


def part(whole: Batch, start: int, stop: int) -> Batch:
    rows = slice(start, stop)
    return Batch(whole.x_start[rows], {k: v[rows] for k, v in whole.conditioning.items()}, whole.index[rows])


# ----------------------------------------------------------------------------------------------------------------------
# Recorded losses


@torch.no_grad()
@pytest.mark.parametrize(
    ("fixture", "network", "spec", "options", "prefix"),
    [
        ("learned_range", "tiny_p2", "", {}, "loss_"),
        ("learned_range", "tiny_p2", "50", {}, "respaced_"),
        ("learned_range", "tiny_p2", "50", {"rescale_learned_sigmas": True}, "respaced_rescaled_"),
        ("fixed_variance", "tiny_p4_nosigma", "", {"learn_sigma": False}, "large_"),
    ],
)
def test_injected_draws_give_the_recorded_losses(
    fixture: str, network: str, spec: str, options: dict[str, bool], prefix: str
) -> None:
    golden = arrays(f"dit/diffusion/losses_{fixture}")
    t = golden["t_respaced" if spec else "t"]
    loss = DiffusionLoss(tiny_dit(network), create_diffusion(spec, **options))
    losses = loss(Batch(golden["x0"], {"y": golden["y"]}, torch.arange(len(t))), Draws(t, golden["noise"]), 0, {})
    for name, value in losses.items():
        assert_close_elementwise(value, golden["loss" if (name, prefix) == ("loss", "loss_") else prefix + name])


@torch.no_grad()
def test_a_dropped_label_is_the_null_class() -> None:
    golden, network = arrays("dit/diffusion/losses_learned_range"), tiny_dit("tiny_p2")
    dropped = torch.tensor([[True, False] * 4])
    null = network.null_conditioning(8)["y"]
    loss, draws = DiffusionLoss(network, create_diffusion()), Draws(golden["t"], golden["noise"])

    def losses(y: Tensor, draws: Draws) -> Tensor:
        return loss(Batch(golden["x0"], {"y": y}, torch.arange(8)), draws, 0, {})["loss"]

    with_drops, without = losses(golden["y"], draws._replace(dropped=dropped)), losses(golden["y"], draws)
    assert torch.equal(with_drops, losses(torch.where(dropped[0], null, golden["y"]), draws))
    assert ((with_drops != without) == dropped[0]).all()


# ----------------------------------------------------------------------------------------------------------------------
# Randomness


def same(a: Draws, b: Draws) -> bool:
    names = [name for name in Draws._fields if name != "extra"]
    values = [(getattr(a, name), getattr(b, name)) for name in names] + [(a.extra[k], b.extra[k]) for k in a.extra]
    return a.extra.keys() == b.extra.keys() and all(x is y is None or torch.equal(x, y) for x, y in values)


class Extra(DiffusionLoss):
    """Two forward passes, and noise that the plain loss has not."""

    def passes(self, step: int) -> int:
        return 2

    def draw_extra(self, step: int, rows: range, device: torch.device | str) -> dict[str, Tensor]:
        return {"gates": row_noise("gates", self.seed, step, rows, (3, 2), device)}


def test_draws_have_the_shapes_and_moments_that_training_needs() -> None:
    draws = Extra(Toy(CLIP), PLAIN).draw(0, 256)
    assert draws.t.shape == (256,) and draws.t.dtype == torch.int64
    assert 0 <= draws.t.min() < 30 and 970 < draws.t.max() <= 999
    assert draws.noise.shape == (256, *CLIP) and draws.extra["gates"].shape == (256, 3, 2)
    assert draws.dropped is not None and draws.dropped.shape == (2, 256) and not torch.equal(*draws.dropped)
    assert abs(draws.noise.mean()) < 0.02 and abs(draws.noise.std() - 1) < 0.02
    neighbours = (draws.noise[1:] * draws.noise[:-1]).mean()  # rows know nothing of each other
    assert abs(neighbours) < 0.02


def test_rows_have_the_same_randomness_whoever_makes_it() -> None:
    loss = Extra(Toy(), FlowMatching(), seed=3)
    whole = loss.draw(5, 12)
    for start, stop in ((0, 12), (0, 4), (4, 8), (11, 12)):
        assert same(loss.draw(5, 12, range(start, stop)), whole.rows(start, stop))
    assert same(whole.rows(4, 12).rows(2, 5), whole.rows(6, 9))


@pytest.mark.parametrize("ranks", [1, 64])
def test_a_ranks_randomness_costs_the_same_memory_for_any_number_of_ranks(ranks: int) -> None:
    """But for single numbers per row of the global batch."""
    local, loss = 4, Extra(Toy(), FlowMatching())
    with LiveMemory() as memory:
        loss.draw(7, ranks * local, range((ranks - 1) * local, ranks * local))
    latents = local * (torch.Size(CLIP).numel() + 6) * 4
    numbers = ranks * local * (1 + 2) * 4  # t, and whether either pass drops the row
    assert latents <= memory.peak <= latents + 4 * numbers


def test_a_row_keeps_its_randomness_when_the_number_of_ranks_changes() -> None:
    loss = DiffusionLoss(Toy(), PLAIN)
    by_ranks = [torch.cat([loss.draw(2, 64, range(i, i + n)).noise for i in range(0, 64, n)]) for n in (64, 16, 1)]
    assert torch.equal(by_ranks[0], by_ranks[1]) and torch.equal(by_ranks[0], by_ranks[2])


def test_draws_depend_on_seed_and_step_alone() -> None:
    first, second = (DiffusionLoss(Toy(), PLAIN, seed=seed) for seed in (0, 1))
    mine = first.draw(3, 8)
    assert same(mine, DiffusionLoss(Toy(), PLAIN, seed=0).draw(3, 8))
    for other in (first.draw(4, 8), second.draw(3, 8)):
        assert not torch.equal(mine.t, other.t)
        assert not torch.isclose(mine.noise, other.noise).flatten(1).all(dim=1).any()


def test_noise_of_rows_depends_on_its_purpose_and_shape_of_a_row() -> None:
    rows = range(2, 5)
    noise = row_noise("encoder", 0, 1, rows, SHAPE)
    assert noise.dtype == torch.float32 and noise.shape == (3, *SHAPE)
    assert torch.equal(noise[1:], row_noise("encoder", 0, 1, range(3, 5), SHAPE))
    assert not torch.equal(noise, row_noise("noise", 0, 1, rows, SHAPE))
    by_hand = [torch.randn(SHAPE, generator=generator) for generator in row_generators("encoder", 0, 1, rows)]
    assert torch.equal(torch.stack(by_hand), noise)


def test_only_what_is_used_is_made() -> None:
    loss = DiffusionLoss(Toy(), PLAIN, dropout_prob=0.0)
    draws = loss.draw(0, 4)
    assert draws.dropped is None and not draws.extra
    assert torch.equal(draws.noise, DiffusionLoss(Toy(), PLAIN).draw(0, 4).noise)


def test_conditioning_is_dropped_at_the_networks_rate_or_another() -> None:
    rows = 4000
    for options, rate in (({}, 0.25), ({"dropout_prob": 0.1}, 0.1)):
        dropped = DiffusionLoss(Toy((1, 1, 1)), PLAIN, **options).draw(0, rows).dropped
        assert dropped is not None and dropped.shape == (1, rows) and dropped.dtype == torch.bool
        assert abs(dropped.float().mean() - rate) < 4 * (rate * (1 - rate) / rows) ** 0.5


def test_a_network_without_label_dropping_drops_nothing() -> None:
    loss = DiffusionLoss(debug_network("DiT", class_dropout_prob=0.0), create_diffusion())
    draws = loss.draw(0, 4)
    assert draws.dropped is None and loss(batch(4), draws, 0, {})["loss"].isfinite().all()


@torch.no_grad()
def test_losses_do_not_depend_on_how_rows_are_cut() -> None:
    loss, whole = DiffusionLoss(debug_network("DiT"), create_diffusion()), batch(7)
    draws = loss.draw(5, 7)
    reference, parts = loss(whole, draws, 5, {}), []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        parts.append(loss(part(whole, start, stop), draws.rows(start, stop), 5, {}))
    for name, value in reference.items():
        torch.testing.assert_close(torch.cat([one[name] for one in parts]), value, rtol=1e-5, atol=1e-6)


def test_a_loss_has_no_randomness_of_its_own() -> None:
    loss, rows = DiffusionLoss(debug_network("DiT"), create_diffusion()).train(), batch(4)
    before, losses = torch.get_rng_state(), [loss(rows, loss.draw(step, 4), step, {})["loss"] for step in (7, 7, 8)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    assert torch.equal(torch.get_rng_state(), before)
    assert loss.shared([(rows, loss.draw(7, 4))], 7) == {}


# ----------------------------------------------------------------------------------------------------------------------
# Conditioning and times


def test_text_and_mask_are_dropped_together_for_the_datas_unconditional_rows() -> None:
    network = TextToy()
    text, mask = torch.randn(6, 5, 4), torch.randint(1, 2, (6, 5)).float()
    null = {"text": torch.full((6, 5, 4), 9.0), "text_mask": torch.full((6, 5), 7.0)}
    data = Batch(torch.randn(6, *CLIP), {"text": text, "text_mask": mask}, torch.arange(6), null=null)
    loss = DiffusionLoss(network, PLAIN, dropout_prob=0.5)
    draws = loss.draw(0, 6)
    assert draws.dropped is not None and 0 < draws.dropped.sum() < 6
    losses = loss(data, draws, 0, {})
    assert losses["loss"].shape == (6,) and losses["loss"].isfinite().all()
    (_, seen), *others = network.seen
    for row, dropped in enumerate(draws.dropped[0].tolist()):
        assert torch.equal(seen["text"][row], null["text"][row] if dropped else text[row])
        assert torch.equal(seen["text_mask"][row], null["text_mask"][row] if dropped else mask[row])
    assert not others
    assert torch.equal(data.conditioning["text"], text)  # the batch is left as it was
    with pytest.raises(ValueError, match=r"the unconditional rows have \['y'\], the conditional ones \['text', "):
        loss(Batch(data.x_start, data.conditioning, data.index, null={"y": mask}), draws, 0, {})


@pytest.mark.parametrize("convention", ["index", "unit"])
@pytest.mark.parametrize(
    "process", [create_diffusion("5", learn_sigma=False), FlowMatching()], ids=["gaussian", "flow"]
)
def test_process_times_are_converted_for_the_network(process: Any, convention: TimeConvention) -> None:
    network = Toy(convention=convention)
    loss = DiffusionLoss(network, process)
    draws = loss.draw(0, 64)
    loss(batch(64, CLIP), draws, 0, {})["loss"].mean().backward()
    flow_times = draws.t if process.name == "flow" else 1 - torch.tensor([0, 250, 500, 749, 999])[draws.t] / 1000
    torch.testing.assert_close(network.seen[0][0], flow_times if convention == "unit" else 1000 * (1 - flow_times))
    assert network.weight.grad is not None


@pytest.mark.parametrize("family", ["DiT", "DDT"])
@pytest.mark.parametrize("process", [PLAIN, FlowMatching()], ids=["gaussian", "flow"])
def test_gradients_reach_every_trainable_parameter(family: str, process: Any) -> None:
    network = debug_network(family, **({"learn_sigma": False} if family == "DiT" else {}))
    loss = DiffusionLoss(network, process)
    loss(batch(16), loss.draw(0, 16), 0, {})["loss"].mean().backward()
    idle = [n for n, p in loss.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


def test_stratified_times_may_replace_the_processs() -> None:
    class Stratified(DiffusionLoss):
        def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
            return self.process.stratified_times(count, 4, generator)

    loss = Stratified(Toy((1, 1, 1)), PLAIN)
    t = loss.draw(0, 4000).t
    for quarter in range(4):
        own = t[quarter::4]
        assert 250 * quarter <= own.min() < 250 * quarter + 5
        assert 250 * (quarter + 1) - 5 <= own.max() < 250 * (quarter + 1)
        assert abs(float(own.float().mean()) - 250 * quarter - 124.5) < 10
    assert torch.equal(loss.draw(0, 4000, range(10, 20)).t, t[10:20])
    assert not torch.equal(t, loss.draw(1, 4000).t)


@pytest.mark.parametrize("steps", [4, 10, 250, 999])
def test_strata_cover_every_index_of_any_schedule_once(steps: int) -> None:
    t = create_diffusion(str(steps)).stratified_times(40 * steps, 4, torch.Generator().manual_seed(0))
    parts = [set(t[i::4].tolist()) for i in range(4)]
    assert set.union(*parts) == set(range(steps)) and sum(map(len, parts)) == steps


# ----------------------------------------------------------------------------------------------------------------------
# Misfits


@pytest.mark.parametrize(("network_sigma", "process_sigma"), [(True, False), (False, True)])
def test_a_network_that_does_not_fit_the_process_is_refused(network_sigma: bool, process_sigma: bool) -> None:
    variance: Any = "learned_range" if process_sigma else "fixed_large"
    process = GaussianDiffusion(named_betas("linear", 100), variance=variance)
    actual, expected = (8, 4) if network_sigma else (4, 8)
    message = f"the network has {actual} output channels, but the process needs {expected} for 4 input channels"
    network: Network = Toy(CLIP, learn_sigma=network_sigma)
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(network, process)


@pytest.mark.parametrize("prob", [-0.1, 1.0, float("nan")])
def test_a_share_without_a_meaning_is_refused(prob: float) -> None:
    with pytest.raises(ValueError, match=rf"the share of rows without conditioning must be in \[0, 1\), not {prob}"):
        DiffusionLoss(Toy(), PLAIN, dropout_prob=prob)


def test_the_plain_loss_has_nothing_to_set_to_warn_of_or_to_prepare() -> None:
    loss = DiffusionLoss(Toy(), PLAIN)
    assert loss.settings == LossSettings() and loss.warnings(10) == [] and loss.start({}) == [] and loss.logged == ()
    loss.settings.check(rows=1, ranks=1, from_weights=False)
