import pytest
import torch
from runtime.finite import FiniteGuard


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
