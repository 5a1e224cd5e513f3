"""The tracer sees what it is there to see."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.dispatch_trace import DispatchTrace


@pytest.mark.parametrize(
    ("offence", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: float(x[0]), "_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: torch.equal(x, x + 1), "equal"),
        (lambda x: torch.tensor([1.0, 2.0]) * x, "lift_fresh"),
        (lambda x: torch.as_tensor(3.0) * x, "lift_fresh"),
        (lambda x: x + torch.linspace(0, 1, 2), "linspace"),
        (lambda x: torch.full((2,), 3.0) * x, "full"),
        (lambda x: torch.scalar_tensor(3.0) * x, "scalar_tensor"),
        (lambda x: x.double(), "_to_copy"),
        (lambda x: x.to("meta"), "_to_copy"),
        (lambda x: torch.empty(2, dtype=torch.float64).copy_(x), "copy_"),
    ],
)
def test_offences_are_found(offence: Callable[[Tensor], object], name: str) -> None:
    x = torch.ones(2)
    with DispatchTrace() as trace:
        offence(x)
    assert name in [call.base for call in trace.waits()]


def test_plain_arithmetic_is_no_offence() -> None:
    x = torch.ones(2, 2)
    with DispatchTrace() as trace:
        torch.cat([x * 2.0 + 1, x.float()], dim=1)[:, 1:].unsqueeze(0).clamp(0, 1)
        torch.empty(2, 2).copy_(x).normal_()
    assert trace.waits() == []


def test_views_cost_nothing_and_the_network_is_told_apart() -> None:
    x = torch.ones(2, 2)
    with DispatchTrace() as trace:
        y = trace.watch(lambda x: x.t() * 2 + 1)(x)
        y.t().unsqueeze(0).narrow(1, 0, 1).exp()
    assert trace.names(inside=True) == {"mul.Tensor": 1, "add.Tensor": 1}
    assert trace.names(inside=False) == {"exp": 1}
    assert (trace.count(inside=True), trace.count(inside=False)) == (2, 1)
    assert all(call.devices == {"cpu"} for call in trace.calls)
