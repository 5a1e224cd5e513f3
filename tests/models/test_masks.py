"""Masks that multiply tensors of any precision."""

import pytest
import torch
from torch import Tensor

from models.dydit_block import gate
from models.masks import masked


def upstream(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x.dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_a_product(dtype: torch.dtype, rows: int) -> None:
    """Against a mask that is first copied to the tensor's dtype, whose gradient is rounded to it."""
    generator = torch.Generator().manual_seed(1)
    x, logits = torch.randn(3, 5, 4, 8, generator=generator).to(dtype), torch.randn(rows, 4, generator=generator)
    gradients = []
    for own in (True, False):
        leaves = x.clone().requires_grad_(), logits.clone().requires_grad_()
        mask = gate(leaves[1])
        out = masked(leaves[0], mask, 1, 3) if own else leaves[0] * mask.values[:, None, :, None].to(dtype)
        assert out.dtype == dtype and torch.equal(out.detach(), x * mask.values.detach()[:, None, :, None].to(dtype))
        out.backward(upstream(out))
        gradients.append([leaf.grad for leaf in leaves])
    (of_x, of_mask), (reference, of_reference) = gradients
    assert torch.equal(of_x, reference) and of_mask.any()
    if dtype == torch.float32:
        assert torch.equal(of_mask, of_reference)
    else:
        torch.testing.assert_close(of_mask, of_reference, rtol=2**-7, atol=0)


def test_without_a_gradient_for_the_mask_the_tensor_s_is_kept() -> None:
    x, mask = torch.randn(2, 6, 3, requires_grad=True), gate(torch.randn(2, 6))
    masked(x, mask, 2).sum().backward()
    assert torch.equal(x.grad, mask.values[..., None].expand_as(x))


def test_compiled_whole_it_is_the_same() -> None:
    x, logits = torch.randn(2, 6, 3), torch.randn(2, 6)
    results = []
    for function in (masked, torch.compile(masked, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        function(x, gate(leaf), 2).square().sum().backward()
        results.append(leaf.grad)
    assert results[0].any() and torch.equal(*results)
