"""The backward pass without PyTorch's engine, which has a thread for every device and asks the driver for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node


def backward(loss: Tensor) -> None:
    """Add a loss's gradients to those of the leaves, as `loss.backward()` does, on the calling thread.

    Args:
        loss: A scalar. Its graph is used up.
    """
    root = loss.grad_fn
    assert root is not None
    edges, seen, stack = Counter[Node](), {root}, [root]  # edges into a node that have not given their gradient yet
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                edges[node] += 1
                stack += [] if node in seen else [node]
                seen.add(node)
    gradients: dict[Node, list[Tensor | None]] = {root: [torch.ones_like(loss)]}
    ready = [root]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            for (after, slot), gradient in zip(node.next_functions, _apply(node, gradients.pop(node)), strict=True):
                if after is None:
                    continue
                metadata: Any = after._input_metadata
                held = gradients.setdefault(after, [None] * len(metadata))
                if gradient is not None:  # the engine, too, gives a gradient the shape and dtype of its tensor
                    gradient = gradient.sum_to_size(metadata[slot].shape).to(metadata[slot].dtype)
                    own = held[slot]
                    held[slot] = gradient if own is None else own + gradient
                edges[after] -= 1
                if not edges[after]:
                    ready.append(after)


def _apply(node: Any, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Compute the gradients of a node's inputs; a leaf has none, and its own is added to."""
    if not node.next_functions and hasattr(node, "variable"):
        (gradient,), leaf = gradients, node.variable
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        return ()
    of_inputs = (node.apply if isinstance(node, BackwardCFunction) else node)(*gradients)
    return of_inputs if isinstance(of_inputs, tuple) else (of_inputs,)
