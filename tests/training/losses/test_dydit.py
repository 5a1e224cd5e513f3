"""DyDiT's loss against the recorded training steps of the official implementation, and its settings."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion import Batch, Draws, create_diffusion
from models import create_model
from tests.golden_data import arrays, assert_close, table
from tests.golden_dydit import assert_masks, golden_dydit, golden_gate_noise
from tests.networks import debug_network
from tests.processes import run_ranks
from training.losses.dydit import DyDiTLoss, DyDiTLossSettings

STEP = 10**6  # after any warm-up


def recorded_step(name: str) -> tuple[dict[str, Tensor], DyDiTLoss, Batch, Draws]:
    """A recorded training step: its arrays, the loss, batch and draws."""
    golden, network = arrays(f"dydit/v2_tiny/{name}"), golden_dydit("v2_tiny").train()
    complete = name == "train_complete"
    settings = DyDiTLossSettings(flops_target=0.7 if complete else 0.5, complete_loss_steps=None if complete else 0)
    passes = ("dynamic", "complete") if complete else ("dynamic",)
    dropped = torch.stack([golden[f"in.labels_{one}"] != golden["in.y"] for one in passes])
    draws = Draws(golden["in.t"], golden["in.noise"], dropped, {"gate_noise": golden_gate_noise(golden)})
    batch = Batch(golden["in.x_start"], {"y": golden["in.y"]}, torch.arange(len(golden["in.y"])))
    return golden, DyDiTLoss(network, create_diffusion(), settings=settings), batch, draws


def random_batch(rows: int) -> Batch:
    return Batch(torch.randn(rows, 4, 8, 8), {"y": torch.arange(rows) % 10}, torch.arange(rows))


def cut(batch: Batch, draws: Draws, start: int, stop: int) -> tuple[Batch, Draws]:
    """Rows of a step as a micro-batch."""
    rows = slice(start, stop)
    return Batch(batch.x_start[rows], {"y": batch.conditioning["y"][rows]}, batch.index[rows]), draws.rows(start, stop)


@pytest.mark.parametrize("name", ["train_complete", "train_plain"])
def test_recorded_draws_give_the_recorded_losses_ratio_and_gradients(name: str) -> None:
    golden, loss, batch, draws = recorded_step(name)
    losses = loss(batch, draws, STEP, {})
    losses["loss"].mean().backward()
    close = {"rtol": 1e-5, "atol": 1e-6}
    for recorded in ("mse", "vb", "complete_mse", "complete_vb"):
        if f"out.loss.{recorded}" in golden:
            torch.testing.assert_close(losses[recorded], golden[f"out.loss.{recorded}"], **close)
    assert ("complete_mse" in losses) == (name == "train_complete")
    torch.testing.assert_close(losses["flops_ratio"], golden["out.flops_ratio_per_sample"], **close)
    torch.testing.assert_close(losses["flops_ratio_penalty"].mean(), golden["out.dynamic_loss"], **close)
    torch.testing.assert_close(losses["loss"].mean(), golden["out.total_loss"], **close)
    parameters = dict(loss.network.named_parameters())
    for key, norm in table(f"dydit/v2_tiny/{name}_grad_norms").items():
        if norm is None:
            assert parameters[key].grad is None
        else:
            assert float(parameters[key].grad.norm()) == pytest.approx(norm, rel=2e-5), key
    for key in (k for k in golden if k.startswith("grad.")):
        assert_close(parameters[key.removeprefix("grad.")].grad, golden[key], 2e-5)


@torch.no_grad()
def test_the_routed_pass_has_the_recorded_masks() -> None:
    golden, loss, batch, draws = recorded_step("train_complete")
    x_t = loss.process.q_sample(batch.x_start, draws.t, draws.noise)
    assert_masks(loss.evaluate(x_t, batch, draws, **draws.extra), golden)


@pytest.mark.parametrize("name", ["train_complete", "train_plain"])
def test_micro_batches_add_up_to_the_gradients_of_the_whole(name: str) -> None:
    _, whole, batch, draws = recorded_step(name)
    whole(batch, draws, STEP, {})["loss"].mean().backward()
    _, loss, _, _ = recorded_step(name)
    rows = len(draws.t)
    pieces = [cut(batch, draws, start, stop) for start, stop in ((0, 1), (1, rows))]
    shared = loss.shared(pieces, STEP)
    for piece in pieces:
        (loss(*piece, STEP, shared)["loss"].sum() / rows).backward()
    for expected, actual in zip(whole.network.parameters(), loss.network.parameters(), strict=True):
        if expected.grad is not None:
            assert_close(actual.grad, expected.grad, 1e-4)


# Run on each of two ranks: the gradients of a recorded step whose rows are spread over both, in two micro-batches each.
ON_RANKS = """
import torch, torch.distributed as dist
from runtime import distributed
from tests.golden_data import assert_close
from tests.training.losses.test_dydit import STEP, cut, recorded_step

with distributed.world("cpu") as world:
    golden, loss, batch, draws = recorded_step("train_complete")
    own = len(draws.t) // world.size
    half = range(world.rank * own, (world.rank + 1) * own, own // 2)
    pieces = [cut(batch, draws, start, start + own // 2) for start in half]
    shared = loss.shared(pieces, STEP)
    means = []
    for piece in pieces:
        losses = loss(*piece, STEP, shared)
        (losses["loss"].mean() / len(pieces)).backward()
        means.append(losses["loss"].mean().detach() / len(pieces))
        assert torch.equal(losses["flops_ratio_penalty"].detach(), losses["flops_ratio_penalty"][:1].expand(own // 2))
    torch.testing.assert_close(distributed.mean_over_ranks(sum(means)), golden["out.total_loss"], rtol=1e-5, atol=1e-6)
    parameters = dict(loss.network.named_parameters())
    for key in (key for key in golden if key.startswith("grad.")):
        assert_close(distributed.mean_over_ranks(parameters[key.removeprefix("grad.")].grad), golden[key], 2e-5)
    print("the same on rank", world.rank)
"""


def test_ranks_and_micro_batches_together_give_the_recorded_gradients(tmp_path: Path) -> None:
    (tmp_path / "on_ranks.py").write_text(ON_RANKS)
    done = run_ranks(tmp_path / "on_ranks.py", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same on rank") == 2


def test_a_penalty_is_that_of_the_mean_in_value_and_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = torch.tensor(0.02, requires_grad=True), torch.arange(8.0)
    loss = loss_with(flops_target=0.5, flops_weight=3.0)
    monkeypatch.setattr(loss, "flops_ratio", lambda routing: weight * rows)
    losses = loss(random_batch(8), loss.draw(0, 8), STEP, {})
    distance = 0.02 * 3.5 - 0.5
    assert losses["flops_ratio_penalty"].tolist() == pytest.approx([3 * distance**2] * 8)
    losses["flops_ratio_penalty"].mean().backward()
    assert float(weight.grad) == pytest.approx(2 * 3 * distance * 3.5, rel=1e-6)


def test_nothing_is_evaluated_ahead_of_a_whole_batch() -> None:
    loss, calls = loss_with(), []
    loss.network.register_forward_hook(lambda *_: calls.append(1))
    assert loss.shared([(random_batch(4), loss.draw(0, 4))], 0) == {} and calls == []


@torch.no_grad()
def test_the_ratio_is_the_blocks_share_of_macs() -> None:
    """Heads are linear in attention; channel groups and tokens bilinear in the MLP."""
    network, golden = golden_dydit("v2_tiny"), arrays("dydit/v2_tiny/eval_forward")
    routing = network(golden["in.x"], golden["in.t"], y=golden["in.y"]).aux
    dense = network.cost()
    attention, mlp = dense["attention_linear"] + dense["attention_products"], dense["mlp"]
    expected = (
        attention * routing.heads.mean((1, 2)) + mlp * (routing.mlp.mean(2) * routing.tokens.mean(2)).mean(1)
    ) / (attention + mlp)
    ratio = DyDiTLoss(network, create_diffusion(), settings=DyDiTLossSettings()).flops_ratio(routing)
    torch.testing.assert_close(ratio, expected)
    assert ((ratio > 0.1) & (ratio < 0.95)).all()


@torch.no_grad()
def test_the_two_passes_drop_different_labels() -> None:
    network = debug_network("DyDiT", class_dropout_prob=0.5)
    loss = DyDiTLoss(network, create_diffusion(), settings=DyDiTLossSettings())
    seen: list[Tensor] = []
    network.y_embedder.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    for step in range(3):
        seen.clear()
        loss(random_batch(64), loss.draw(step, 64), step, {})
        routed, complete = ((y == network.config.num_classes) for y in seen)
        assert 8 < int((routed != complete).sum()) < 56  # independent: half of them differ
        assert 16 < int(routed.sum()) < 48 and 16 < int(complete.sum()) < 48


@torch.no_grad()
@pytest.mark.parametrize("layout", ["first_always_on", "all_heads"])
def test_a_fresh_network_has_a_ratio_of_one(layout: str) -> None:
    network = create_model("DyDiT-debug/2", router_layout=layout)
    loss = DyDiTLoss(network, create_diffusion(), settings=DyDiTLossSettings())
    for step in range(3):
        assert torch.equal(loss(random_batch(8), loss.draw(step, 8), step, {})["flops_ratio"], torch.ones(8))


def test_every_trainable_parameter_takes_part() -> None:
    network = debug_network("DyDiT")
    loss = DyDiTLoss(network, create_diffusion(), settings=DyDiTLossSettings(flops_target=0.3))
    loss(random_batch(16), loss.draw(STEP, 16), STEP, {})["loss"].mean().backward()
    idle = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def loss_with(**settings: object) -> DyDiTLoss:
    network = create_model("DyDiT-debug/2", depth=1)
    return DyDiTLoss(network, create_diffusion(), settings=DyDiTLossSettings(**settings))


def test_the_target_holds_then_falls_along_a_line() -> None:
    settings = DyDiTLossSettings(flops_target=0.6, flops_warmup_steps=1000)
    assert {settings.target(step) for step in range(100)} == {1.0}
    assert settings.target(100) == pytest.approx(0.96) and settings.target(500) == pytest.approx(0.8)
    assert settings.target(1000) == settings.target(10**6) == pytest.approx(0.6)
    assert DyDiTLossSettings(flops_target=0.6, flops_warmup_steps=0).target(100) == pytest.approx(0.6)


def test_the_complete_pass_lasts_as_long_as_asked() -> None:
    assert [loss_with(complete_loss_steps=3).passes(step) for step in range(5)] == [2, 2, 2, 1, 1]
    assert loss_with().passes(10**9) == 2 and loss_with(complete_loss_steps=0).passes(0) == 1


def test_a_run_that_ends_before_the_target_has_come_down_is_warned_of() -> None:
    assert loss_with(flops_warmup_steps=1000).warnings(1001) == []
    (line,) = loss_with(flops_warmup_steps=1000).warnings(600)
    assert "--flops-warmup-steps 1000: after 600 steps the target is still 0.70, not 0.5" in line
    (held,) = loss_with(flops_warmup_steps=0).warnings(20)
    assert "still 1.00" in held


def test_gates_are_noisy_as_long_as_asked() -> None:
    loss = loss_with(gate_noise_steps=3)
    assert [bool(loss.draw(step, 2).extra) for step in (0, 2, 3)] == [True, True, False]
    noise = loss_with().draw(10**9, 256).extra["gate_noise"]
    assert noise.shape == (256, *loss.network.gate_noise_shape) and noise.dtype == torch.float32
    assert noise.isfinite().all()
    for p in (0.02, 0.25, 0.5, 0.9):  # the logistic distribution's quantiles are log(p / (1 - p))
        share = (noise < torch.logit(torch.tensor(p, dtype=torch.float64))).float().mean()
        assert abs(share - p) < 4 * (p * (1 - p) / noise.numel()) ** 0.5


def test_stratified_times_give_every_row_its_quarter() -> None:
    t = loss_with(stratified_t=True).draw(0, 4000).t
    assert t.dtype == torch.int64
    for quarter in range(4):
        own, first, end = t[quarter::4], 250 * quarter, 250 * (quarter + 1)
        assert first <= own.min() < first + 5 and end - 5 <= own.max() < end
        assert abs(float(own.float().mean()) - first - 124.5) < 10
    assert not torch.equal(t, loss_with(stratified_t=True).draw(1, 4000).t)
    with pytest.raises(ValueError, match="6 images a process do not cover 4 parts of the schedule evenly; choose"):
        DyDiTLossSettings(stratified_t=True).check(rows=6, ranks=1, from_weights=False)


def test_gate_noise_belongs_to_rows() -> None:
    loss = loss_with()
    whole = loss.draw(5, 6).extra["gate_noise"]
    assert torch.equal(loss.draw(5, 6, range(2, 5)).extra["gate_noise"], whole[2:5])


@pytest.mark.parametrize("target", [0.0, -0.1, 1.01, float("nan")])
def test_a_target_outside_its_range_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match=r"flops_target must lie in \(0, 1\]"):
        DyDiTLossSettings(flops_target=target)


@pytest.mark.parametrize("setting", ["flops_weight", "flops_warmup_steps", "complete_loss_steps", "gate_noise_steps"])
def test_negative_settings_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be finite and not negative, not -1"):
        DyDiTLossSettings(**{setting: -1})
