"""Averages of weights, the guard against non-finite steps, optimizers and learning rates."""

import math

import pytest
import torch

from models import create_model
from training.optimization import EMA, OPTIMIZERS, AdamW, FiniteGuard
from training.settings import OptimizationSettings

# ----------------------------------------------------------------------------------------------------------------------
# Average


def walk(model, steps):
    """Moves the weights about and yields after each move."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        yield


@pytest.mark.parametrize(("decay", "ramp"), [(0.9, False), (0.99, True)])
def test_average_follows_the_recurrence(decay, ramp):
    model = create_model("DiT-debug/2", depth=1)
    ema = EMA(model, decay, ramp=ramp)
    expected = model.blocks[0].attn.qkv.weight.detach().double()
    for n, _ in enumerate(walk(model, 30)):
        ema.update()
        d = min(decay, (1 + n) / (10 + n)) if ramp else decay
        expected = d * expected + (1 - d) * model.blocks[0].attn.qkv.weight.detach().double()
    assert torch.allclose(ema.network.blocks[0].attn.qkv.weight.double(), expected, atol=1e-6)


@pytest.mark.parametrize("ramp", [False, True])
def test_several_updates_as_one_have_the_product_of_their_decays(ramp):
    model = create_model("DiT-debug/2", depth=1)
    ema, weight = EMA(model, 0.8, ramp=ramp, every=4), model.blocks[0].attn.qkv.weight
    decays = [min(0.8, (1 + n) / (10 + n)) if ramp else 0.8 for n in range(8)]
    expected, seen = weight.detach().double(), []
    for n, _ in enumerate(walk(model, 11), start=1):
        ema.update()
        if n in (4, 8):
            share = math.prod(decays[n - 4 : n])
            expected = share * expected + (1 - share) * weight.detach().double()
        seen.append(ema.network.blocks[0].attn.qkv.weight.clone())
    assert [n for n in range(1, 11) if not torch.equal(seen[n], seen[n - 1])] == [3, 7]
    assert torch.allclose(seen[-1].double(), expected, atol=1e-6, rtol=0)
    assert (ema.updates, ema.averaged) == (11, 8)


@pytest.mark.parametrize("ramp", [False, True])
def test_weights_that_rest_between_updates_have_the_average_of_every_step(ramp):
    model = create_model("DiT-debug/2", depth=1)
    each, fourth = EMA(model, 0.95, ramp=ramp), EMA(model, 0.95, ramp=ramp, every=4)
    for _ in walk(model, 5):
        for _ in range(4):
            each.update()
            fourth.update()
    for a, b in zip(each.network.parameters(), fourth.network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=0)


def test_frozen_positions_do_not_drift_and_the_average_has_no_gradients():
    model = create_model("DiT-debug/2", depth=1)
    ema = EMA(model, 0.999)
    for _ in walk(model, 20):
        ema.update()
    assert torch.equal(ema.network.pos_embed, model.pos_embed)
    assert not ema.network.training and not any(p.requires_grad for p in ema.network.parameters())
    assert ema.network.state_dict().keys() == model.state_dict().keys()


def test_starts_as_a_copy_and_shares_nothing():
    model = create_model("DiT-debug/2", depth=1)
    ema = EMA(model, 0.5)
    before = ema.network.blocks[0].mlp.fc1.weight.clone()
    assert torch.equal(before, model.blocks[0].mlp.fc1.weight)
    next(walk(model, 1))
    assert torch.equal(ema.network.blocks[0].mlp.fc1.weight, before)
    assert ema.name == "ema-0.5" and EMA(model, 0.9999).name == "ema-0.9999"


# ----------------------------------------------------------------------------------------------------------------------
# Guard


@pytest.fixture
def parts():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    return weight, optimizer, FiniteGuard(optimizer, torch.device("cpu"))


def step(parts, number, loss, gradient):
    weight, optimizer, guard = parts
    weight.grad = torch.full((3,), gradient)
    guard.watch(number, torch.tensor(loss), weight.grad.norm())
    optimizer.step()
    return weight.detach().clone()


def test_finite_steps_are_applied_and_not_reported(parts):
    assert not torch.equal(step(parts, 0, 1.0, 1.0), torch.ones(3))
    assert parts[2].report() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_changes_neither_weights_nor_moments_nor_the_step_count(parts, bad):
    before = step(parts, 0, 1.0, 1.0)
    moments = {k: v.clone() for k, v in parts[1].state[parts[0]].items()}
    assert torch.equal(step(parts, 1, bad, bad), before)
    assert all(torch.equal(v, moments[k]) for k, v in parts[1].state[parts[0]].items())
    assert parts[2].report() == "non-finite loss at step 2 on rank 0; 1 optimizer step skipped"
    assert parts[2].report() is None
    assert not torch.equal(step(parts, 2, 1.0, 1.0), before)


def test_a_gradient_that_overflows_under_a_finite_loss_is_told_apart(parts):
    step(parts, 0, 1.0, float("inf"))
    step(parts, 1, 1.0, float("inf"))
    assert parts[2].report() == "non-finite gradient of a finite loss; 2 optimizer steps skipped"


def test_gradients_of_the_limit_or_more_are_skipped_and_counted_by_themselves():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = FiniteGuard(optimizer, torch.device("cpu"))
    moved = []
    for step, norm in enumerate((1.0, 2.0, 1.999, 3.0, float("nan"))):
        before, weight.grad = weight.detach().clone(), torch.tensor([norm])
        guard.watch(step, torch.tensor(0.0), torch.tensor(norm), limit=2.0)
        optimizer.step()
        moved.append(not torch.equal(weight.detach(), before))
    assert moved == [True, False, True, False, False]
    assert guard.count_too_large() == 2 and guard.count_too_large() == 0
    assert guard.report() == "non-finite gradient of a finite loss; 1 optimizer step skipped"


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers and learning rates


def test_optimizers_are_made_from_their_settings():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS["adamw"](adam_betas=(0.8, 0.99), weight_decay=0.1).make([weight], lr=1e-3)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["fused"]) == (1e-3, (0.8, 0.99), 0.1, True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adam_betas": (0.9, 1.0)}, "--adam-betas 0.9 1.0: "),
        ({"adam_betas": (-0.1, 0.9)}, "--adam-betas -0.1 0.9: "),
        ({"weight_decay": -1.0}, "--weight-decay -1.0: "),
        ({"weight_decay": math.inf}, "--weight-decay inf: "),
    ],
)
def test_settings_that_no_optimizer_takes(settings, words):
    with pytest.raises(ValueError, match=words):
        AdamW(**settings)


def rates(total, **settings):
    schedule = OptimizationSettings(lr=2.0, **settings)
    return [schedule.learning_rate(step, total) for step in range(total)]


def test_learning_rates():
    assert rates(3) == [2, 2, 2]
    assert rates(5, lr_warmup_steps=4) == [0.5, 1, 1.5, 2, 2]
    assert rates(4, lr_schedule="cosine") == pytest.approx([2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)])
    warm = rates(6, lr_schedule="cosine", lr_warmup_steps=2, lr_final_ratio=0.5)
    assert warm[:3] == [1, 2, 2] and warm[4] == pytest.approx(1.5)
