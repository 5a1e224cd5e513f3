"""Counter of the MACs that evaluations of a network execute, while they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from benchmarks.costs import reused_cost, routed_cost
from models import ModelOutput, Network
from models.dydit_block import Routing

# Parts that routers are trained to leave out; those of a divided network have a prefix, as in "encoder_mlp".
BLOCK_PARTS = ("attention_linear", "attention_products", "mlp")


class SamplingCost:
    """Sum of the MACs of evaluations, without what a router left out, a reused state saved, or guidance did not double.

    Attributes:
        rows: Images evaluated, over all evaluations.
        executed: MACs by part, over all rows.
        dense: The same if nothing were left out.
    """

    def __init__(self) -> None:
        self.rows, self.executed, self.dense = 0, Counter[str](), Counter[str]()

    @contextmanager
    def listening(self) -> Iterator[SamplingCost]:
        """Count every evaluation of any network inside the block."""
        handle = register_module_forward_hook(self._count, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()

    def _count(self, module: torch.nn.Module, args: object, kwargs: dict[str, Any], output: Any) -> None:
        """Add one evaluation of a network; other modules' outputs are ignored."""
        if not isinstance(module, Network) or not isinstance(output, ModelOutput):
            return
        rows, dense = len(output.sample), module.cost()
        executed: Mapping[str, float] = dense
        if kwargs.get("state") is not None:
            executed = reused_cost(module)
        elif isinstance(output.aux, Routing):
            executed = routed_cost(module, output.aux)
        self.rows += rows
        for total, cost in ((self.executed, executed), (self.dense, dense)):
            total.update({part: rows * number for part, number in cost.items()})

    @property
    def block_ratio(self) -> float:
        """Share of the blocks' attention and MLP that was computed, the ratio that routers are trained on."""
        parts = [part for part in self.dense if part.endswith(BLOCK_PARTS) and not part.startswith("timestep")]
        return sum(self.executed[part] for part in parts) / sum(self.dense[part] for part in parts)
