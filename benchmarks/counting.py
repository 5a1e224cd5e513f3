"""What evaluations of a network really execute, counted while they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from models import ModelOutput, Network

# What routers are trained to leave out; a divided network says of each part whose it is: "encoder_mlp".
BLOCK_PARTS = ("attention_linear", "attention_products", "mlp")


class SamplingCost:
    """Adds up what evaluations of networks needed.

    What a router left out, what a reused state made needless, rows that guidance did not double: none of it is counted.

    Attributes:
        rows: images evaluated, over all evaluations.
        executed: multiply-adds by part, over all rows.
        dense: the same if nothing were left out.
    """

    def __init__(self) -> None:
        self.rows, self.executed, self.dense = 0, Counter[str](), Counter[str]()

    @contextmanager
    def listening(self) -> Iterator[SamplingCost]:
        """Counts every evaluation of any network inside the block."""
        handle = register_module_forward_hook(self._count)
        try:
            yield self
        finally:
            handle.remove()

    def _count(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """One evaluation, network(x, t, y, state); other modules' are passed over."""
        if not isinstance(module, Network) or not isinstance(output, ModelOutput):
            return
        rows, reused = len(output.sample), len(args) > 3 and args[3] is not None
        executed = module.multiply_adds_with_state() if reused else module.multiply_adds_of(output)
        self.rows += rows
        for total, found in ((self.executed, executed), (self.dense, module.multiply_adds())):
            total.update({part: rows * number for part, number in found.items()})

    @property
    def block_ratio(self) -> float:
        """Share of the blocks' attention and MLP that ran, as routers are trained on it."""
        parts = [part for part in self.dense if part.endswith(BLOCK_PARTS) and not part.startswith("timestep")]
        return sum(self.executed[part] for part in parts) / sum(self.dense[part] for part in parts)
