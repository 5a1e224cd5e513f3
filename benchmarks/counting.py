"""Work that evaluations of a network really execute, counted while they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from benchmarks.costs import reused_cost, routed_cost
from models import ModelOutput, Network

# The parts that routers are trained to leave out; the names of a divided network's say which half: "encoder_mlp".
BLOCK_PARTS = ("attention_linear", "attention_products", "mlp")


def executed_cost(network: Network, output: ModelOutput, state: object = None) -> Mapping[str, float]:
    """MACs that an evaluation with this output executed, for one row, by part."""
    if state is not None:
        return reused_cost(network)
    return network.cost() if output.aux is None else routed_cost(network, output.aux)


class SamplingCost:
    """Sum of the work of evaluations.

    What a router left out, what a reused state made needless, rows that guidance did not double: none of it is counted.

    Attributes:
        rows: Rows evaluated, over all evaluations.
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

    def _count(self, module: nn.Module, args: tuple[object, ...], options: dict[str, object], output: object) -> None:
        if not isinstance(module, Network) or not isinstance(output, ModelOutput):
            return
        rows = len(output.sample)
        self.rows += rows
        executed = executed_cost(module, output, options.get("state"))
        for total, parts in ((self.executed, executed), (self.dense, module.cost())):
            total.update({part: rows * number for part, number in parts.items()})

    @property
    def block_ratio(self) -> float:
        """Executed share of the blocks' attention and MLP, on which routers are trained."""
        parts = [part for part in self.dense if part.endswith(BLOCK_PARTS) and not part.startswith("timestep")]
        return sum(self.executed[part] for part in parts) / sum(self.dense[part] for part in parts)
