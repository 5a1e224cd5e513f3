"""Launches that a CUDA device would be given, without one: tensors with shapes, dtypes and a device, and no values.

PyTorch's fake tensors run through the code as CUDA tensors do: autocast casts by CUDA's lists, a tensor that was left
on the CPU meets one that was not, and whatever needs a value on the host fails. Stand-ins are needed for what asks
the driver: autocast, which disables itself without one, generators, the choice of an attention kernel, and the engine
of the backward pass, which has a thread for every device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.backward import backward
from models import Network

Kind = Literal["matrix product", "attention", "norm", "cast", "pointwise", "copy", "reduction", "creation"]

MATRIX_PRODUCTS = {"addmm", "mm", "bmm", "baddbmm", "convolution"}
ATTENTION = {"_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"}
NORMS = {"native_layer_norm", "_fused_rms_norm", "rms_norm"}
COPIES = {"clone", "copy_", "cat", "stack", "index_select", "embedding", "gather", "index", "constant_pad_nd"}
REDUCTIONS = {"sum", "mean", "amax", "norm", "any", "all", "var"}
CREATIONS = {
    "arange",
    "full",
    "scalar_tensor",
    "zeros",
    "ones",
    "randn",
    "rand",
    "normal_",
    "fill_",
    "zero_",
    "zeros_like",
    "ones_like",
}
NO_KERNEL = {"_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty", "detach"}
# Operations that hand a value, or a shape that depends on values, to the host
READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_consecutive", "_unique2",
    "bincount", "repeat_interleave", "allclose",
}  # fmt: skip
UPLOADS = {"lift", "lift_fresh", "lift_fresh_copy"}  # of Python data


class Kernel(NamedTuple):
    """One launch.

    Attributes:
        name: Of the operation, such as "addmm".
        kind: What it does.
        macs: Multiply-accumulate operations of matrix products and attention.
        bytes: Read and written, each tensor once.
        dtype: Of its result.
        serves: For a cast, whether a matrix product or attention takes its result.
        follows: For a cast, whether it takes the result of a matrix product or attention.
    """

    name: str
    kind: Kind
    macs: int
    bytes: int
    dtype: torch.dtype
    serves: bool = False
    follows: bool = False


class CudaTrace(TorchDispatchMode):
    """Records the launches inside the block, and what would make a device wait.

    Attributes:
        kernels: Launches in order.
        faults: Host reads, copies between devices, and operations on a CPU tensor, in order, a line each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.faults: list[str] = []
        self._casts: dict[int, int] = {}  # storage of a cast's result -> its place in `kernels`
        self._products: set[int] = set()  # storages of what matrix products and attention give
        self._alive: list[Tensor] = []  # results, so that no storage is given out twice

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run an operation and note it."""
        name, before = func._schema.name.split("::")[1], _tensors((args, kwargs))
        if name in READS:
            self.faults.append(f"{name} gives a value to the host")
        result = func(*args, **(kwargs or {}))
        after = _tensors(result)
        if not after:
            return result
        devices = {tensor.device.type for tensor in (*before, *after)}
        if name in UPLOADS or len(devices) > 1:
            self.faults.append(f"{name} between {' and '.join(sorted(devices))}")
        elif "cpu" in devices:
            self.faults.append(f"{name} on the CPU")
        works = any(tensor.numel() for tensor in (*before, *after))
        if works and not func.is_view and name not in NO_KERNEL:
            count = flop_registry.get(func._overloadpacket)
            macs = 0 if count is None else count(*args, **(kwargs or {}), out_val=result) // 2
            self._note(name, before, after, macs)
        return result

    def _note(self, name: str, before: Sequence[Tensor], after: Sequence[Tensor], macs: int) -> None:
        kind, follows = _kind(name, before, after), False
        if kind in ("matrix product", "attention"):
            for tensor in before:
                place = self._casts.get(_storage(tensor))
                if place is not None:
                    self.kernels[place] = self.kernels[place]._replace(serves=True)
            self._products |= {_storage(tensor) for tensor in after}
        elif kind == "cast":
            self._casts[_storage(after[0])] = len(self.kernels)
            follows = _storage(before[0]) in self._products
        self._alive += after
        size = sum(tensor.numel() * tensor.element_size() for tensor in (*before, *after))
        self.kernels.append(Kernel(name, kind, macs, size, after[0].dtype, follows=follows))

    def counts(self) -> Counter[str]:
        """Count launches by kind."""
        return Counter[str](kernel.kind for kernel in self.kernels)


def extra_casts(kernels: Sequence[Kernel]) -> int:
    """Count the casts that neither a matrix product nor attention needs."""
    return sum(kernel.kind == "cast" and not kernel.serves for kernel in kernels)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _kind(name: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> Kind:
    if name in MATRIX_PRODUCTS:
        return "matrix product"
    if name in ATTENTION:
        return "attention"
    if name in NORMS:
        return "norm"
    if name == "_to_copy":
        return "cast" if before and before[0].dtype != after[0].dtype else "copy"
    if name == "copy_" and before[0].dtype != before[1].dtype:
        return "cast"
    if name in COPIES:
        return "copy"
    if name in REDUCTIONS:
        return "reduction"
    return "creation" if name in CREATIONS or not before else "pointwise"


# ----------------------------------------------------------------------------------------------------------------------
# A device without a driver


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """Softmax attention by the kernel that a GPU takes: flash attention in half precision, else the efficient one."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (part.to(torch.get_autocast_dtype("cuda")) for part in (q, k, v))
    if q.dtype == torch.float32:
        out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, False)[0]
        return out
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    return out


class _Generator(torch.Generator):
    """A generator on the CPU for every device: nothing is drawn."""

    def __new__(cls, device: object = "cpu") -> _Generator:
        return super().__new__(cls)


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Give a CUDA device; tensors made or used inside the block have no values."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)  # imports much that must see the real names
    with ExitStack() as stack:
        for target, replacement in (
            ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            ("torch.cuda.is_bf16_supported", lambda *args, **options: True),
            ("torch.nn.functional.scaled_dot_product_attention", _attention),
            ("torch.Generator", _Generator),
            ("torch.Tensor.backward", backward),
            ("torch.Tensor.exponential_", lambda tensor, *args, **options: tensor),  # takes no generator here
        ):
            stack.enter_context(patch(target, replacement))
        stack.enter_context(fake)
        yield torch.device("cuda", 0)


def trace(work: Callable[[], object]) -> CudaTrace:
    """Trace a call."""
    with CudaTrace() as recorded:
        work()
    return recorded


def trace_block(network: Network, index: int, work: Callable[[], object]) -> list[Kernel]:
    """Launches of one block of a network while `work` evaluates it once."""
    span: list[int] = []
    with CudaTrace() as recorded:
        block = network.blocks[index]
        hooks = [
            block.register_forward_pre_hook(lambda *_: span.append(len(recorded.kernels))),
            block.register_forward_hook(lambda *_: span.append(len(recorded.kernels))),
        ]
        work()
    for hook in hooks:
        hook.remove()
    start, stop = span
    return recorded.kernels[start:stop]
