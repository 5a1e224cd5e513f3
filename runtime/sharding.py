"""Tensors that processes hold in parts (DTensors of FSDP), and whole ones: every function takes both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_divided(tensor: Tensor) -> TypeGuard[DTensor]:
    """True for a tensor of which this process holds a part."""
    return hasattr(tensor, "placements")  # PyTorch's class would be imported with its compiler


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; a whole tensor is its own part."""
    detached = tensor.detach()
    return detached.to_local() if is_divided(detached) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; a collective operation if processes hold parts of it."""
    detached = tensor.detach()
    return detached.full_tensor() if is_divided(detached) else tensor


def place_of(tensor: Tensor) -> tuple[int, bool]:
    """Number of the first row of this process's part, and True on the first of the processes that hold this part."""
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    mesh, start, is_first = tensor.device_mesh, 0, True
    for dimension, placement in enumerate(tensor.placements):
        number = mesh.get_local_rank(dimension)
        if placement.is_shard(0):
            start = min(number * -(-len(tensor) // mesh.size(dimension)), len(tensor))
        else:
            is_first &= number == 0
    return start, is_first


def leaf(parameter: Tensor) -> Tensor:
    """Tensor that an optimizer steps on for a parameter: itself, or of a divided one this process's part."""
    return nn.Parameter(local(parameter), parameter.requires_grad) if is_divided(parameter) else parameter


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """The tensor of which an optimizer holds a part: divided as the parameter is if it has the shape of its part."""
    if not is_divided(parameter) or part.shape != local(parameter).shape:
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    mesh, placements, size = parameter.device_mesh, parameter.placements, parameter.shape
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=size, stride=parameter.stride())


def outline_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names, shapes and dtypes of tensors, small enough to be sent to other processes."""
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def receive(value: Tensor | None, target: Tensor) -> Tensor:
    """A copy of this process's part, divided as `target` is, of a tensor that rank 0 has; a collective operation.

    Args:
        value: The whole tensor on rank 0, on any device; ignored on the others.
        target: A tensor of its shape, and of the result's dtype and device.
    """
    full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        assert value is not None
        full.copy_(value)
    if dist.is_initialized():
        dist.broadcast(full, src=0)
    if not is_divided(target):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None).to_local().clone()
