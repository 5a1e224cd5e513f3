"""Stacks of blocks on patches: which blocks an evaluation runs, and on which tokens.

An evaluation can return the tokens that enter one of the last blocks, or start from them. In training tokens can take
routes past blocks, as in TREAD (Krause et al., 2025, arXiv 2501.04765): some of every row pass by a part of the network
and rejoin behind it as they were, so that a step computes less. No parameter is added; sampling computes everything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from models.config import BackboneConfig
from models.contract import Network
from models.layers import FREQUENCY_DIM


class Transformer(Network):
    """Base class of the DiT family's backbones.

    With `cache_depth` B, the tokens that enter block L - B are returned as state, and an evaluation that is given them
    runs the last B blocks on them and ignores x. This is the baseline that Skip-DiT is compared with.

    Attributes:
        grid: Rows and columns of patches.
        cache_at: L - B, the index of the block that takes the state as input; None without `cache_depth`.
    """

    config: BackboneConfig

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.sample_shape, self.grid = config.sample_shape, config.grid
        self.out_channels = config.sample_shape[-3] * (2 if config.learn_sigma else 1)
        self.cache_at = config.cache_at
        self.keeps_state = self.cache_at is not None

    def blocks_to_run(self, *, reused: bool) -> Sequence[int]:
        """Return the indices of the blocks that an evaluation runs, with or without state, in order."""
        return range(self.cache_at if reused and self.cache_at is not None else 0, self.config.depth)

    def check_inputs(
        self, x: Tensor, state: Tensor | None, features_at: Collection[int], blocks: Sequence[int]
    ) -> None:
        """Validate the arguments of an evaluation that runs these blocks; raises the ValueErrors of `forward`."""
        self.check_shape(x)
        if state is not None and len(state) != len(x):
            raise ValueError(f"state of {len(state)} rows cannot be reused for {len(x)} rows")
        for number in features_at:
            if not 1 <= number <= len(self.blocks):
                raise ValueError(f"features_at must lie in 1..{len(self.blocks)}, not {number}")
            if number - 1 not in blocks:
                raise ValueError(f"features_at {number}: that block does not run when state is reused")

    def check_shape(self, x: Tensor) -> None:
        """Raise a ValueError unless x has the network's shape."""
        if x.shape[1:] != self.sample_shape:
            takes = ", ".join(map(str, self.sample_shape))
            raise ValueError(f"x is {tuple(x.shape)}; this network takes (N, {takes})")

    def cost(self) -> dict[str, int]:
        """Count the MACs of one forward of one sample by part; they sum to the "Gflops" of the paper's table 1.

        Layer norms, activations and softmax are not counted.
        """
        return self.cost_of(range(self.config.depth))

    def attended_tokens(self, block: int) -> int:
        """Number of tokens that each token attends to in a block."""
        return self.config.tokens

    def routable(self, chosen: tuple[int, int] | None) -> range:
        """Return the indices of blocks that tokens pass by in training, given their numbers; see `choose_blocks`."""
        return choose_blocks(chosen, range(self.config.depth), margins=(2, 4))

    def routed_cost(self, blocks: range, share: float) -> float:
        """Count the MACs of these blocks for one sample of which a share of the tokens passes through them."""
        return routed_cost(self.cost_of(blocks), share)

    def cost_of(self, blocks: Sequence[int]) -> dict[str, int]:
        """Count the MACs by part of these blocks with the embedders and the final layer."""
        config, d, tokens, count = self.config, self.config.hidden_size, self.config.tokens, len(blocks)
        patch_values = config.patch_size**2
        return {
            "patch_embedding": tokens * d * patch_values * config.sample_shape[-3],
            "timestep_mlp": FREQUENCY_DIM * d + d * d,
            "attention_linear": count * 4 * tokens * d * d,
            "attention_products": sum(2 * tokens * self.attended_tokens(i) * d for i in blocks),
            "mlp": count * 2 * tokens * d * config.mlp_width,
            "modulation": self.modulation_cost(count),
            "final_linear": tokens * d * patch_values * self.out_channels,
        }

    def modulation_cost(self, blocks: int) -> int:
        """Count the MACs that make the modulation of so many blocks and of the final layer."""
        return (blocks * 6 + 2) * self.config.hidden_size**2


# ----------------------------------------------------------------------------------------------------------------------
# Routes of tokens past blocks


class TokenRoute(NamedTuple):
    """Blocks that some tokens pass by.

    Attributes:
        blocks: Indices of these blocks, in order.
        kept: (N, K) int64 places of the tokens that the blocks see, the same for all of them.
    """

    blocks: range
    kept: Tensor

    def take(self, x: Tensor) -> Tensor:
        """Tokens that the blocks see: (N, T, ...) -> (N, K, ...); one row in front serves all."""
        places = self.kept.reshape(*self.kept.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.expand(len(places), *x.shape[1:]).gather(1, places)

    def put_back(self, x: Tensor, kept: Tensor) -> Tensor:
        """Tokens (N, T, D) with those that the blocks saw (N, K, D) in their places."""
        return x.scatter(1, self.kept.unsqueeze(-1).expand_as(kept), kept.to(x.dtype))


class Detour:
    """Applies a route while blocks run one after the other; without one, tokens stay as they are.

    Args:
        route: The route; None takes none.
        state: State of the evaluation, which has no route then.
        features_at: Numbers of blocks that must return all tokens.

    Raises:
        ValueError: If the evaluation cannot take the route.
    """

    def __init__(self, route: TokenRoute | None, state: object, features_at: Collection[int]) -> None:
        if route is not None:
            if state is not None:
                raise ValueError("an evaluation that reuses state takes no route past blocks")
            if inside := sorted(number for number in features_at if number - 1 in route.blocks[:-1]):
                raise ValueError(f"features_at {inside[0]}: some tokens pass by that block")
        self._route = route
        self._before: Tensor | None = None  # the tokens as they entered the route

    def enter(self, block: int, x: Tensor) -> Tensor:
        """Tokens for a block: (N, T, D), or (N, K, D) from the first block of the route on."""
        if self._route is None or block != self._route.blocks.start:
            return x
        self._before = x
        return self._route.take(x)

    def leave(self, block: int, x: Tensor) -> Tensor:
        """Tokens behind a block: all of them again behind the last block of the route."""
        if self._route is None or self._before is None or block != self._route.blocks[-1]:
            return x
        return self._route.put_back(self._before, x)


def routed_cost(cost: Mapping[str, int], share: float) -> float:
    """Count the MACs of blocks for one sample of which a share of the tokens passes through them.

    Args:
        cost: MACs by part of these blocks where all tokens do.
        share: Share of the tokens.
    """
    return share * (cost["attention_linear"] + cost["mlp"]) + share**2 * cost["attention_products"]


def choose_blocks(chosen: tuple[int, int] | None, possible: range, margins: tuple[int, int]) -> range:
    """Indices of the blocks of a route.

    Args:
        chosen: Numbers of the first and the last of them, from 1; None leaves out blocks at both ends.
        possible: Indices of the blocks that may be part of it.
        margins: Blocks of `possible` that are left out at its start and end by default, one each if it is short.

    Raises:
        ValueError: If there are no such blocks.
    """
    front, behind = margins if len(possible) >= 2 * sum(margins) else (1, 1)
    first, last = (possible.start + front + 1, possible.stop - behind) if chosen is None else chosen
    if not possible.start < first <= last <= possible.stop:
        raise ValueError(
            f"{first} {last}: must be the numbers of a first and a last block between {possible.start + 1} and "
            f"{possible.stop}"
        )
    return range(first - 1, last)
