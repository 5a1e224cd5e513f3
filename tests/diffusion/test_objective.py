"""A network and a process made into losses, with draws that depend on (seed, step) alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import Batch, Draws, GaussianDiffusion, Objective, create_diffusion
from diffusion.schedules import named_betas
from models import ModelOutput, Network, Pass, TrainingRecipe
from tests.golden_data import arrays, assert_close_elementwise, tiny_dit
from tests.networks import debug_network

SHAPE = (4, 8, 8)


def objective(**options: Any) -> Objective:
    return Objective(debug_network("DiT"), create_diffusion(), **options)


def batch(rows: int) -> Batch:
    return Batch(torch.randn(rows, *SHAPE), torch.arange(rows) % 10, torch.arange(rows))


def golden_draws(golden: dict[str, Tensor], t: Tensor, dropped: Tensor | None = None) -> Draws:
    dropped = torch.zeros(1, len(t), dtype=torch.bool) if dropped is None else dropped
    return Draws(t, golden["noise"], torch.zeros_like(golden["noise"]), dropped)


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
    losses = Objective(tiny_dit(network), create_diffusion(spec, **options))(
        Batch(golden["x0"], golden["y"], torch.arange(len(t))), 0, golden_draws(golden, t)
    )
    for name, value in losses.items():
        assert_close_elementwise(value, golden["loss" if (name, prefix) == ("loss", "loss_") else prefix + name])


@torch.no_grad()
def test_a_dropped_label_is_the_null_class() -> None:
    golden = arrays("dit/diffusion/losses_learned_range")
    network = tiny_dit("tiny_p2")
    dropped = torch.tensor([[True, False] * 4])
    y_seen = torch.where(dropped[0], network.null_class, golden["y"])
    target = Objective(network, create_diffusion())
    index = torch.arange(8)
    with_drops = target(Batch(golden["x0"], golden["y"], index), 0, golden_draws(golden, golden["t"], dropped))
    explicit = target(Batch(golden["x0"], y_seen, index), 0, golden_draws(golden, golden["t"]))
    without = target(Batch(golden["x0"], golden["y"], index), 0, golden_draws(golden, golden["t"]))
    assert torch.equal(with_drops["loss"], explicit["loss"])
    assert ((with_drops["loss"] != without["loss"]) == dropped[0]).all()


# ----------------------------------------------------------------------------------------------------------------------
# Draws


def test_draws_have_the_shapes_and_moments_that_training_needs() -> None:
    draws = objective().draw(0, 256, SHAPE)
    assert draws.t.shape == (256,) and draws.t.dtype == torch.int64
    assert 0 <= draws.t.min() < 30 and 970 < draws.t.max() <= 999
    assert draws.noise.shape == draws.encoder_noise.shape == (256, *SHAPE)
    for values in (draws.noise, draws.encoder_noise):
        assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert abs((draws.noise * draws.encoder_noise).mean()) < 0.02


def same(a: Draws, b: Draws) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_draws_depend_on_seed_and_step_alone() -> None:
    first, second = objective(seed=0), objective(seed=1)
    assert same(first.draw(3, 8, SHAPE), objective(seed=0).draw(3, 8, SHAPE))
    for other in (first.draw(4, 8, SHAPE), second.draw(3, 8, SHAPE)):
        mine = first.draw(3, 8, SHAPE)
        assert not torch.equal(mine.t, other.t)
        assert not torch.isclose(mine.noise, other.noise).any(dim=0).all()


def test_dropped_labels_come_at_the_networks_rate() -> None:
    rows = 40_000
    dropped = objective().draw(0, rows, (1, 1, 1)).label_dropped
    assert dropped.shape == (1, rows) and dropped.dtype == torch.bool
    assert abs(dropped.float().mean() - 0.1) < 4 * (0.1 * 0.9 / rows) ** 0.5


def test_a_network_without_null_class_never_sees_one() -> None:
    network = debug_network("DiT", class_dropout_prob=0.0)
    target = Objective(network, create_diffusion())
    assert not target.draw(0, 1000, SHAPE).label_dropped.any()
    assert target(batch(4), 0)["loss"].isfinite().all()


@torch.no_grad()
def test_losses_do_not_depend_on_how_rows_are_cut() -> None:
    target, whole = objective(), batch(7)
    draws = target.draw(5, 7, SHAPE)
    reference = target(whole, 5)
    parts = []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        part = Batch(whole.x_start[start:stop], whole.y[start:stop], whole.index[start:stop])
        parts.append(target(part, 5, draws.rows(start, stop)))
    for name, value in reference.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, rtol=1e-5, atol=1e-6)


def test_an_objective_has_no_randomness_of_its_own() -> None:
    target, rows = objective().train(), batch(4)
    before = torch.get_rng_state()
    first, second = target(rows, 7), target(rows, 7)
    assert torch.equal(first["loss"], second["loss"])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first["loss"], target(rows, 8)["loss"])


# ----------------------------------------------------------------------------------------------------------------------
# Passes, gradients, misfits


class EchoRecipe(TrainingRecipe):
    """Two passes, and a penalty: the distance of a weight from the mean label, squared."""

    statistic_name = "label"

    def passes(self, step: int) -> tuple[Pass, ...]:
        return Pass({"value": 1.0}), Pass({"value": 3.0}, "other_")

    def statistic(self, network: Network, output: ModelOutput) -> Tensor:
        assert isinstance(network, Echo)
        return network.weight * network.asked[-1][1].float()

    def penalty(self, mean: Tensor, step: int) -> Tensor:
        return (mean - step) ** 2


class Echo(Network):
    """Predicts `value` everywhere and records labels and times."""

    time_convention = "unit"
    in_channels, out_channels, num_classes, class_dropout_prob = 4, 4, 10, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: float | Tensor, y: Tensor, state: Any = None, *, value: float) -> ModelOutput:
        self.asked.append((torch.as_tensor(t), y))
        return ModelOutput(torch.full_like(x, value))


def test_every_training_pass_has_its_own_drops_and_their_losses_add_up() -> None:
    network, rows = Echo(), batch(64)
    target = Objective(network, create_diffusion(learn_sigma=False), recipe=EchoRecipe())
    draws = target.draw(0, 64, SHAPE)
    losses = target(rows, 0)
    for name, value in (("mse", 1.0), ("other_mse", 3.0)):
        torch.testing.assert_close(losses[name], ((draws.noise - value) ** 2).flatten(1).mean(dim=1))
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["other_mse"] + losses["label_penalty"])
    assert draws.label_dropped.shape == (2, 64) and not torch.equal(*draws.label_dropped)
    for (t, y), dropped in zip(network.asked, draws.label_dropped, strict=True):
        assert torch.equal(y, torch.where(dropped, 10, rows.y))
        torch.testing.assert_close(t, 1 - draws.t / 1000)  # told in the network's units


def test_a_penalty_is_that_of_the_mean_in_value_and_gradient() -> None:
    network, rows = Echo(), batch(8)
    losses = Objective(network, create_diffusion(learn_sigma=False), recipe=EchoRecipe())(rows, 5)
    y = network.asked[0][1].float()
    mean = 2.0 * float(y.mean())
    assert losses["label_penalty"].tolist() == pytest.approx([(mean - 5) ** 2] * 8)
    losses["label_penalty"].mean().backward()
    assert float(network.weight.grad) == pytest.approx(2 * (mean - 5) * float(y.mean()), rel=1e-6)


def test_a_penalty_does_not_depend_on_how_the_batch_is_cut() -> None:
    network, whole = Echo(), batch(12)
    target = Objective(network, create_diffusion(learn_sigma=False), recipe=EchoRecipe())
    target(whole, 5)["loss"].mean().backward()
    reference, network.weight.grad = network.weight.grad.clone(), None
    draws = target.draw(5, 12, SHAPE)
    pieces = [
        (Batch(whole.x_start[i : i + 4], whole.y[i : i + 4], whole.index[i : i + 4]), draws.rows(i, i + 4))
        for i in (0, 4, 8)
    ]
    mean = target.mean_statistic(pieces, 5)
    assert mean is not None and not mean.requires_grad
    for piece, own in pieces:
        (target(piece, 5, own, mean)["loss"].mean() / 3).backward()
    torch.testing.assert_close(network.weight.grad, reference)


def test_where_there_is_no_penalty_nothing_is_evaluated_ahead() -> None:
    network = Echo()
    target = Objective(network, create_diffusion(learn_sigma=False))
    assert target.mean_statistic([(batch(4), target.draw(0, 4, SHAPE))], 0) is None and network.asked == []


def test_a_base_recipe_has_no_penalty_to_ask_for() -> None:
    recipe = TrainingRecipe()
    for ask in (
        lambda: recipe.statistic(Echo(), ModelOutput(torch.zeros(1))),
        lambda: recipe.penalty(torch.ones(()), 0),
    ):
        with pytest.raises(TypeError, match="TrainingRecipe has no penalty"):
            ask()


# ----------------------------------------------------------------------------------------------------------------------
# Gate noise and strata


class Gated(Echo):
    """Takes gate noise of two gates in each of three layers."""

    gate_noise_shape = (3, 2)
    noise: Tensor | None = None

    def forward(  # type: ignore[override]
        self, x: Tensor, t: float | Tensor, y: Tensor, state: Any = None, *, gate_noise: Tensor | None = None
    ) -> ModelOutput:
        self.noise = gate_noise
        return ModelOutput(torch.zeros_like(x))


class GatedRecipe(TrainingRecipe):
    time_strata = 4

    def passes(self, step: int) -> tuple[Pass, ...]:
        return (Pass(noisy_gates=step < 10),)


def test_gate_noise_is_logistic_and_belongs_to_the_rows() -> None:
    network = Gated()
    target = Objective(network, create_diffusion(learn_sigma=False), recipe=GatedRecipe())
    draws = target.draw(0, 20_000, SHAPE[:1] + (1, 1))
    noise = draws.gate_noise
    assert noise is not None and noise.shape == (20_000, 3, 2) and noise.dtype == torch.float32
    assert noise.isfinite().all()
    for p in (0.02, 0.25, 0.5, 0.9):  # the logistic distribution's quantiles are log(p / (1 - p))
        share = (noise < torch.logit(torch.tensor(p, dtype=torch.float64))).float().mean()
        assert abs(share - p) < 4 * (p * (1 - p) / noise.numel()) ** 0.5
    part = draws.rows(5, 9)
    assert part.gate_noise is not None and torch.equal(part.gate_noise, noise[5:9])
    target(batch(8), 3)
    assert network.noise is not None and torch.equal(network.noise, target.draw(3, 8, SHAPE).gate_noise)


def test_no_gate_noise_is_drawn_where_nobody_takes_it() -> None:
    process, network = create_diffusion(learn_sigma=False), Gated()
    assert Objective(network, process, recipe=GatedRecipe()).draw(10, 4, SHAPE).gate_noise is None
    target = Objective(network, process)  # without a recipe gates decide by themselves
    assert target.draw(0, 4, SHAPE).gate_noise is None
    target(batch(4), 0)
    assert network.noise is None


def test_stratified_times_give_every_row_its_quarter() -> None:
    target = Objective(Gated(), create_diffusion(learn_sigma=False), recipe=GatedRecipe())
    t = target.draw(0, 4000, SHAPE[:1] + (1, 1)).t
    assert t.dtype == torch.int64
    for quarter in range(4):
        own = t[quarter::4]
        assert 250 * quarter <= own.min() < 250 * quarter + 5 and 250 * (quarter + 1) - 5 <= own.max() < 250 * (
            quarter + 1
        )
        assert abs(float(own.float().mean()) - 250 * quarter - 124.5) < 10
    assert not torch.equal(t, target.draw(1, 4000, SHAPE[:1] + (1, 1)).t)


@pytest.mark.parametrize("steps", [4, 10, 250, 999])
def test_strata_cover_every_index_of_any_schedule_once(steps: int) -> None:
    process = create_diffusion(str(steps), learn_sigma=False)
    t = process.stratified_times(40 * steps, 4, torch.Generator().manual_seed(0))
    parts = [set(t[i::4].tolist()) for i in range(4)]
    assert set.union(*parts) == set(range(steps)) and sum(map(len, parts)) == steps


def test_gradients_reach_every_trainable_parameter() -> None:
    target = objective()
    target(batch(16), 0)["loss"].mean().backward()
    idle = [n for n, p in target.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


@pytest.mark.parametrize(("network_sigma", "process_sigma"), [(True, False), (False, True)])
def test_a_network_that_does_not_fit_the_process_is_refused(network_sigma: bool, process_sigma: bool) -> None:
    network = debug_network("DiT", learn_sigma=network_sigma)
    process = GaussianDiffusion(
        named_betas("linear", 100), variance="learned_range" if process_sigma else "fixed_large"
    )
    found, wanted = (8, 4) if network_sigma else (4, 8)
    message = f"the network puts out {found} channels, but the process needs {wanted} for 4 input channels"
    with pytest.raises(ValueError, match=message):
        Objective(network, process)
