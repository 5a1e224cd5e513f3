"""Strategies of training on several processes: what each one holds of weights, average and optimizer.

`ddp`: everything. `fsdp`: its part of every tensor; a block's weights are gathered where the block is evaluated.
`hsdp`: the same inside groups of processes, those of one machine for example, each of which holds everything.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from diffusion.loss import DiffusionLoss
from models import Network
from models.blank import has_other_tensors, without_values
from models.layers import exact_parameters
from runtime import distributed
from runtime.sharding import local, receive

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class Parallel(Protocol):
    """Strategy of a run; all processes call its methods together.

    Attributes:
        divides: Processes hold parts of the state.
    """

    divides: ClassVar[bool]

    def build(self, make: Callable[[], DiffusionLoss]) -> DiffusionLoss:
        """Build the loss with its network, with values where this process needs them."""

    def read(self, work: Callable[[], T], outline: Callable[[T], T]) -> T:
        """Read something large: its outline, without values, where this process does not need them."""

    def place(self, loss: DiffusionLoss) -> Network:
        """Bring the loss to the device, divided; returns a copy of the network, divided alike, for the average."""

    def wrap(self, loss: DiffusionLoss) -> nn.Module:
        """Return the module to call in place of a loss that was placed."""

    def backward(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of forward and backward pass of a micro-batch; gradients are averaged over processes in the last."""

    def average(self, whole: Sequence[Tensor]) -> None:
        """Average gradients of parameters that are not divided over processes, in place, where nothing else does."""

    def norm(self, parts: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
        """Norm of the averaged gradient, a scalar that is equal everywhere.

        Args:
            parts: This process's parts of gradients.
            whole: Gradients of parameters that are not divided.
        """


class Replicated:
    """Everything on every process (DistributedDataParallel); also the strategy of a process alone.

    Args:
        device: Device of this process.
    """

    divides: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wrapped: DistributedDataParallel | None = None

    def build(self, make: Callable[[], DiffusionLoss]) -> DiffusionLoss:
        """Build on the CPU, so that fresh weights are the same on every device."""
        return make().to(self._device)

    def read(self, work: Callable[[], T], outline: Callable[[T], T]) -> T:
        """Read everything."""
        return work()

    def place(self, loss: DiffusionLoss) -> Network:
        """Copy the network."""
        return copy.deepcopy(loss.network)

    def wrap(self, loss: DiffusionLoss) -> nn.Module:
        """The loss itself, or one that averages gradients."""
        if not dist.is_initialized():
            return loss
        devices = [self._device.index] if self._device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(loss, device_ids=devices, gradient_as_bucket_view=True)
        return self._wrapped

    def backward(self, *, last: bool) -> AbstractContextManager[None]:
        """Context without communication in all but the last micro-batch."""
        return nullcontext() if last or self._wrapped is None else self._wrapped.no_sync()

    def average(self, whole: Sequence[Tensor]) -> None:
        """Nothing: DistributedDataParallel has averaged them."""

    def norm(self, parts: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
        """Norm of all gradients."""
        return get_total_norm([*parts, *whole])


class Sharded:
    """A part of every tensor on each process (FSDP2), block by block.

    Only rank 0 builds the network with values, in host memory; the others receive their parts of it.

    Under autocast a block's weights are gathered in its precision, which halves the traffic and changes no result: they
    would be rounded anyway. Parameters that autocast does not round, such as the scales of norms, are few, and whole on
    every process. Where a step has several forward passes, weights are gathered in float32: the gradients of the passes
    would be added in low precision.

    Args:
        device: Device of this process.
        ranks: Number of processes that hold the weights together; each group of so many holds all of them.
    """

    divides: ClassVar[bool] = True

    def __init__(self, device: torch.device, ranks: int) -> None:
        self._device, self._ranks = device, ranks
        self._roots: list[nn.Module] = []

    @cached_property
    def _mesh(self) -> DeviceMesh:
        from torch.distributed.device_mesh import init_device_mesh

        groups = dist.get_world_size() // self._ranks
        if groups == 1:
            return init_device_mesh(self._device.type, (self._ranks,), mesh_dim_names=("shard",))
        return init_device_mesh(self._device.type, (groups, self._ranks), mesh_dim_names=("replicate", "shard"))

    def build(self, make: Callable[[], DiffusionLoss]) -> DiffusionLoss:
        """Build with values on rank 0, without on the others."""
        if dist.get_rank() == 0:
            return make()
        with without_values():
            loss = make()
        return make() if has_other_tensors(loss) else loss

    def read(self, work: Callable[[], T], outline: Callable[[T], T]) -> T:
        """Read on rank 0, and give its outline to the others."""
        done: list[T] = []

        def read_here() -> T:
            done.append(work())
            return outline(done[0])

        sent = distributed.on_rank0(read_here)
        return done[0] if done else sent

    def place(self, loss: DiffusionLoss) -> Network:
        """Divide the network's blocks one by one, then the rest of the loss; on the device one of them is whole."""
        self._roots = list(loss.children())
        average, lower = _outline(loss.network), gathered_precision(loss)
        for root in self._roots:
            self._shard(root, lambda tensor: receive(tensor, _empty(tensor, self._device)), lower)
        self._shard(average, lambda tensor: _empty(tensor, self._device), lower)
        for own, source in zip(average.state_dict().values(), loss.network.state_dict().values(), strict=True):
            local(own).copy_(local(source))
        return average

    def _shard(self, root: nn.Module, fill: Callable[[Tensor], Tensor], lower: torch.dtype | None) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        done: set[nn.Module] = set()
        for part in [*getattr(root, "blocks", ()), root]:
            for module in [each for each in part.modules() if each not in done]:
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(fill(parameter.data), parameter.requires_grad))
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, fill(buffer))
            done |= set(part.modules())
            policy, kept = MixedPrecisionPolicy(), set[nn.Parameter]()
            if part is not root and lower is not None:
                policy = MixedPrecisionPolicy(lower, torch.float32, cast_forward_inputs=False)
                kept = set(exact_parameters(part))
            # Also the outermost part, which FSDP keeps whole otherwise: the average changes between two evaluations
            fully_shard(part, mesh=self._mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=kept)

    def wrap(self, loss: DiffusionLoss) -> nn.Module:
        """The loss itself: its parts average gradients."""
        return loss

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Context in which gradients stay where they are in all but the last micro-batch."""
        for root in self._roots:
            root.set_requires_gradient_sync(last)  # type: ignore[operator]  # of what `fully_shard` makes of it
        yield

    def average(self, whole: Sequence[Tensor]) -> None:
        """Average them, by one operation; parts were averaged where they were made."""
        if whole:
            mean = distributed.mean_over_ranks(torch.cat([gradient.flatten() for gradient in whole]))
            for gradient, values in zip(whole, mean.split([gradient.numel() for gradient in whole]), strict=True):
                gradient.copy_(values.view_as(gradient))

    def norm(self, parts: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
        """Norm of all parts, in float64 between processes, and of what is whole."""
        norm = get_total_norm(parts)
        squares = norm.double().square()
        dist.all_reduce(squares, group=self._mesh["shard"].get_group())
        if whole:
            squares += get_total_norm(whole).double().square()
        return squares.sqrt().to(norm.dtype)


def gathered_precision(loss: DiffusionLoss) -> torch.dtype | None:
    """Precision in which the weights of blocks are gathered; None is their own."""
    return loss.autocast if loss.passes(0) == 1 else None


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def _outline(network: Network) -> Network:
    """A copy of a network without values, and nothing of the network in it."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}.values()
    return copy.deepcopy(network, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors})


def make_parallel(name: str, ranks: int, device: torch.device) -> Parallel:
    """The strategy of a name.

    Args:
        name: "ddp", "fsdp" or "hsdp".
        ranks: Number of processes that hold the weights together.
        device: Device of this process.
    """
    return Replicated(device) if name == "ddp" else Sharded(device, ranks)
