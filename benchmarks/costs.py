"""Costs of evaluations that compute less than the whole network, and of layer norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import blank_conditioning
from models import DDT, Network
from models.contract import State
from models.dydit_block import Routing
from models.skip_dit import SkipUnits
from models.transformer import Transformer

NORMS = (functional.layer_norm, functional.rms_norm)


def reused_cost(network: Network) -> dict[str, int]:
    """Count the MACs of an evaluation of one sample that is given state, by part; `cost()` if there is no state.

    Families that are not known here are counted by PyTorch, as one part.
    """
    if not network.keeps_state:
        return network.cost()
    if isinstance(network, DDT):
        return {part: count for part, count in network.cost().items() if part.startswith("decoder_")}
    if isinstance(network, Transformer):
        parts = network.cost_of(network.blocks_to_run(reused=True))
        if not isinstance(network, SkipUnits):
            del parts["patch_embedding"]  # the state replaces x
        return parts
    return {"all": counted_cost(network, reused=True)}


@torch.no_grad()
def counted_cost(network: Network, *, reused: bool = False) -> int:
    """Let PyTorch count the MACs of an evaluation of one sample, without or with state."""
    empty, evaluate = _on_meta(network)
    state = evaluate(empty, None) if reused else None
    with FlopCounterMode(display=False) as counter:
        evaluate(empty, state)
    return int(counter.get_total_flops()) // 2  # a MAC is two operations there


def run_cost(network: Network, refresh: Sequence[bool]) -> int:
    """Count the MACs of a sampling run of one sample that reuses state where `refresh` is false."""
    full, reused = sum(network.cost().values()), sum(reused_cost(network).values())
    return sum(full if fresh else reused for fresh in refresh)


def routed_cost(network: Network, routing: Routing) -> dict[str, float]:
    """Count the MACs of an evaluation with these masks by part, mean over rows; reads the masks."""
    heads = float(routing.heads.mean())
    mlp = float((routing.mlp.mean(-1) * routing.tokens.mean(-1)).mean())
    kept = {"attention_linear": heads, "attention_products": heads, "mlp": mlp}
    return {part: kept.get(part, 1.0) * count for part, count in network.cost().items()}


@torch.no_grad()
def layer_norm_elements(network: Network) -> int:
    """Count the elements that pass through norms in one forward of one sample; some publications include them."""
    empty, evaluate = _on_meta(network)
    with _CountNorms() as counter:
        evaluate(empty, None)
    return counter.elements


class _CountNorms(TorchFunctionMode):
    """Sum of the elements of all norms' results inside the block."""

    elements = 0

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Tensor:
        out = func(*args, **kwargs or {})
        if func in NORMS:
            self.elements += out.numel()
        return out


def _on_meta(network: Network) -> tuple[Network, Callable[[Network, State], State]]:
    """Build a network of the same config without values, and a function that evaluates it and returns its state."""
    with torch.device("meta"):
        empty = network if next(network.parameters()).is_meta else type(network)(network.config)
        x = torch.empty(1, *network.sample_shape)
    conditioning = blank_conditioning(empty, 1)
    return empty, lambda empty, state: empty(x, 0.0, state=state, **conditioning).state
