"""The backward pass without PyTorch's engine, on tensors with values."""

import pytest
import torch

import models
from benchmarks.backward import backward
from benchmarks.cases import blank_conditioning
from tests.networks import debug_name, randomise


@pytest.mark.parametrize("family", models.FAMILIES)
def test_gradients_are_those_of_the_engine(family: str) -> None:
    network = models.create_model(debug_name(family)).train()
    x, t, cond = torch.randn(2, *network.sample_shape), torch.rand(2), blank_conditioning(network, 2)
    gradients = []
    for run in (torch.Tensor.backward, backward):
        run(network.zero_grad() or randomise(network, 1)(x, t, **cond).sample.square().mean())
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    for reference, own in zip(*gradients, strict=True):
        assert (own is None) == (reference is None)
        if own is not None:
            torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-7)
    assert any(gradient is not None and gradient.any() for gradient in gradients[1])


def test_gradients_add_to_those_of_before() -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    for _ in range(2):
        backward((weight * weight).sum())
    assert torch.equal(weight.grad, torch.tensor([8.0, 12.0]))
