"""Networks without values, to be filled from a file: nothing is drawn that would be overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models import create_model
from models.contract import Network

DRAWS = {"normal_", "uniform_", "trunc_normal_", "bernoulli_", "exponential_"}


class _NoDraws(TorchFunctionMode):
    """Leaves tensors as they are where random numbers would be drawn into them."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if getattr(func, "__name__", "") in DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Make tensors without values inside the block; drawing into them would import PyTorch's compiler."""
    with torch.device("meta"), _NoDraws():
        yield


def blank_model(name: str, **overrides: object) -> Network:
    """Build a network of parameters without values, to be filled by `load_weights`.

    A network that makes other tensors than those of its state, tables for example, is built with values.

    Raises:
        ValueError: As `create_model`.
    """
    with without_values():
        network = create_model(name, **overrides)
    return create_model(name, **overrides) if has_other_tensors(network) else network


def has_other_tensors(module: nn.Module) -> bool:
    """True if a module made without values has tensors without values that are no part of its state."""
    kept = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    buffers = (tensor for part in module.modules() for tensor in part.buffers(recurse=False))
    attributes = (value for part in module.modules() for value in vars(part).values())
    return any(isinstance(t, Tensor) and t.is_meta and id(t) not in kept for t in chain(buffers, attributes))
