"""Routes of tokens past blocks in training: TREAD (Krause et al., 2025, arXiv 2501.04765).

Some tokens of every row pass by a part of the network and rejoin behind it as they were, so that a step of training
computes less. No parameter is added, and sampling computes everything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor


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
