"""Interface between a network and the code that trains it and samples from it.

A network turns noisy samples, a time and its conditioning into a `ModelOutput`. Anything it could reuse at a later
evaluation is returned as `state` and accepted again as an argument: the network defines the content of the state, the
sampling run when it is computed. A new family subclasses `Network` and adds one row to the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, ParamSpec, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# On a GPU, also try reductions that keep a row in registers: a norm of XL's 1,152 channels takes half the time, a step
# of training on an H200 1.6 % less.
INDUCTOR_OPTIONS: Mapping[str, str | int | bool] = {"triton.multi_kernel": 1}

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")
TimeConvention = Literal["index", "unit"]  # 0..999 with 0 = clean | 0 = noise, 1 = data
State = Any  # kept between evaluations: opaque to all but the network that made it
Conditioning = Mapping[str, Tensor]  # rows in front: {"y": (N,) int64}, {"text": (N, L, K), "text_mask": (N, L)}, {}


class ModelOutput(NamedTuple):
    """Result of one network evaluation.

    Attributes:
        sample: (N, ..., C_out, H, W) raw prediction; variance values, if any, follow the prediction's channels.
        state: Opaque value that a later evaluation of the same rows can reuse; None if there is nothing to reuse.
        features: Tokens (N, T, D) by 1-based block number, of the blocks in `features_at`.
        aux: Input of the family's own training loss, such as DyDiT's routing.
    """

    sample: Tensor
    state: State = None
    features: Mapping[int, Tensor] = MappingProxyType({})
    aux: Any = None


class NetworkLike(Protocol):
    """A network, or a wrapper that evaluates one."""

    @property
    def time_convention(self) -> TimeConvention:
        """Units of t."""

    @property
    def conditioning(self) -> tuple[str, ...]:
        """Names of the conditioning arguments."""

    def __call__(self, x: Tensor, t: float | Tensor, *, state: State = None, **conditioning: Tensor) -> ModelOutput:
        """Evaluate the network."""

    def embedded_time(self, t: float) -> Tensor | None:
        """Return the tensor that may stand for a time; see `Network.embedded_time`."""


class Network(nn.Module):
    """Base class of every family.

    A family sets the attributes below and writes `forward(self, x, t, *, <conditioning>, state=None, features_at=())`,
    which returns a `ModelOutput`. Its arguments are

    - x: (N, ..., C, H, W) noisy samples, float;
    - t: time in the network's units, a number for all rows or an (N,) tensor; may be fractional;
    - y: (N,) int64 labels in [0, num_classes], the last being the null class, where labels are the conditioning;
    - state: state of an earlier evaluation of the same rows, to be reused; ignored by a network that keeps none;
    - features_at: 1-based numbers of blocks; their output tokens are returned as `features`.

    It raises a ValueError if x does not fit the network or the state, or one of `features_at` does not run.

    Attributes:
        time_convention: Units of t, "index" or "unit".
        conditioning: Names of the conditioning arguments of `forward`.
        config: Frozen dataclass that fixes all parameters.
        sample_shape: (C, H, W) or (F, C, H, W) of x without its rows.
        out_channels: Channels of `ModelOutput.sample`.
        keeps_state: Whether evaluations return state that a later one can reuse.
        blocks: Transformer blocks in order, the units of compilation, recomputation and sharding.
        compile_backend: The backend that blocks were compiled by; None if they were not.
    """

    time_convention: ClassVar[TimeConvention] = "index"
    conditioning: tuple[str, ...] = ("y",)

    config: Any
    sample_shape: tuple[int, ...]
    out_channels: int
    keeps_state: bool = False
    blocks: nn.ModuleList
    compile_backend: str | None = None
    __call__: Callable[..., ModelOutput]

    def null_conditioning(self, rows: int) -> dict[str, Tensor]:
        """Return the conditioning of `rows` unconditional rows, on the network's device.

        Raises:
            ValueError: If the network cannot be evaluated unconditionally.
        """
        raise ValueError(f"{type(self).__name__} has no unconditional rows and cannot be guided")

    def embedded_time(self, t: float) -> Tensor | None:
        """Return what `forward` takes in the place of t and alone depends on it; None if there is no such tensor.

        Evaluations recorded with it serve every time: see `GraphedNetwork`.
        """
        return None

    def for_sampling(self, times: Iterable[float]) -> Self:
        """Prepare for evaluations at `times`, host numbers in the network's units, with the weights as they are now.

        Returns:
            A network with the same outputs, or this one if there is nothing to prepare.
        """
        return self

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile every block on its own, whole; blocks share their code, so one compilation serves all of them.

        In sampling it serves every number of rows, too.

        A copy of the network (copy.deepcopy) is not compiled, and remembers the backend.
        """
        self.compile_backend = backend
        options = INDUCTOR_OPTIONS if backend == "inductor" else None
        settings: dict[str, Any] = {"dynamic": False, "fullgraph": True, "backend": backend, "options": options}
        for block in self.blocks:
            if block._forward_pre_hooks or block._forward_hooks:
                # Not the hooks, which cannot be part of one graph: those of recomputation, for example
                block.forward = for_any_rows(torch.compile(block.forward, **settings))
            else:
                # As block.compile does, which has no place for a wrapper
                block._compiled_call_impl = for_any_rows(torch.compile(block._call_impl, **settings))

    def reset_parameters(self) -> None:
        """Re-initialise all parameters in place, here by the `reset_parameters` of every module inside."""
        for module in reversed(list(self.modules())[1:]):  # children first: a parent may overwrite theirs
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def cost(self) -> dict[str, int]:
        """Count the MACs of one forward of one sample by part, nothing reused; linear maps and attention only."""
        raise TypeError(f"{type(self).__name__} does not state its cost")


def for_any_rows(compiled: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """Wrap a compiled function of tensors, so that without gradients one compilation serves every number of rows.

    In sampling that number changes: guidance in an interval doubles it, and the last batch is a smaller one. One row is
    compiled apart. With gradients shapes stay as they are, and so does what is kept for the backward pass.
    """

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        if not torch.is_grad_enabled():
            mark_rows(args, kwargs)
        return compiled(*args, **kwargs)

    return call


def mark_rows(*trees: object) -> None:
    """Mark the first axis of all tensors in trees as one of any length, for the compiler."""
    for leaf in pytree.tree_leaves(trees):
        if isinstance(leaf, Tensor) and leaf.ndim:
            torch._dynamo.maybe_mark_dynamic(leaf, 0)
