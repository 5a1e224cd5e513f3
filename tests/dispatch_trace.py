"""Records what PyTorch is asked to do, to find out what makes a device wait and what a step costs.

Used as a context around the code in question. Everything that reaches a kernel passes through `__torch_dispatch__`,
whatever device it runs on, so a CPU shows what a GPU would have to wait for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.fake_cuda import READS

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # reads if the index is a mask
# Operations that make tensors of Python data: on another device, each is a copy to it or a kernel of its own. (`arange`
# is not among them: its kernel computes where the tensor lives, and nothing is copied.)
CONSTRUCTIONS = {"lift", "lift_fresh", "lift_fresh_copy", "linspace", "scalar_tensor", "full", "eye"}


class Call(NamedTuple):
    """One dispatched operation.

    Attributes:
        name: such as "add.Tensor".
        inside: whether the watched network issued it.
        view: whether it only looks at memory in another way.
        reads: whether a value, or a shape that depends on values, goes to the host.
        converts: whether it carries values to another device or dtype.
        devices: of all tensors that went in or came out.
    """

    name: str
    inside: bool
    view: bool
    reads: bool
    converts: bool
    devices: frozenset[str]

    @property
    def base(self) -> str:
        return self.name.split(".")[0]


class DispatchTrace(TorchDispatchMode):
    """Records operations while active; `watch` tells those of a network apart."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._inside = False

    def watch(self, network: Callable[..., Any]) -> Callable[..., Any]:
        """A stand-in for a network, whose operations are recorded as inside."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._inside = True
            try:
                return network(*args, **kwargs)
            finally:
                self._inside = False

        return watched

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        after = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func.name().removeprefix("aten::")
        base = name.split(".")[0]
        masks = base in INDEXING and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in before[1:])
        kinds = {(tensor.device, tensor.dtype) for tensor in (*before, *after)}
        converts = base in {"_to_copy", "copy_", "_copy_from"} and len(kinds) > 1
        devices = frozenset(tensor.device.type for tensor in (*before, *after))
        self.calls.append(Call(name, self._inside, func.is_view, base in READS or masks, converts, devices))
        return result

    def count(self, *, inside: bool) -> int:
        """Operations that write memory, inside the network or outside."""
        return sum(not call.view for call in self.calls if call.inside == inside)

    def names(self, *, inside: bool) -> Counter[str]:
        """The same, by name."""
        return Counter(call.name for call in self.calls if call.inside == inside and not call.view)

    def waits(self) -> list[Call]:
        """Operations that make the host wait for a device, or a device for the host."""
        return [call for call in self.calls if call.reads or call.converts or call.base in CONSTRUCTIONS]
