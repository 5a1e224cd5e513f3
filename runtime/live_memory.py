"""Memory of live tensors, tracked operation by operation on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Context that counts the bytes of live tensors on a device, with values or without (fake tensors).

    Args:
        known: Tensors that exist already; they count from the start.
        device: Device of the counted tensors.

    Attributes:
        live: Bytes of live tensors.
        peak: Largest value of `live`.
    """

    def __init__(self, known: Iterable[Tensor] = (), device: torch.device | str = "cpu") -> None:
        TorchDispatchMode.__init__(self)
        self.live = self.peak = 0
        self._device, self._seen = torch.device(device).type, set[int]()
        for tensor in known:
            self._note(tensor)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()  # fake tensors have no address
        if tensor.device.type != self._device or place in self._seen:
            return
        self._seen.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.live -= size

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operation and count its results."""
        options = dict(kwargs or {})
        if args and isinstance(args[0], FakeTensor):
            options.pop("generator", None)  # some operations do not take one on fake tensors
        out = func(*args, **options)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out
