"""The diffusion loss with fewer tokens in the middle of the network: token routing in training (TREAD)."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion.loss import Batch, DiffusionLoss, Draws, LossSettings, row_generators
from models import ModelOutput, Network
from models.transformer import TokenRoute
from runtime.settings import setting

KEPT = "kept_tokens"


@dataclass(frozen=True, kw_only=True)
class RoutedLossSettings(LossSettings):
    """Training under the plain diffusion loss.

    Raises:
        ValueError: Naming the field, its value and what would be right.
    """

    route_tokens: float = setting(0.0, "share of every image's tokens that pass by some blocks in training (TREAD)")
    route_blocks: tuple[int, int] | None = setting(
        None, "numbers of the first and last of these blocks", shown="all but a few at both ends"
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        if not 0 <= self.route_tokens < 1:
            raise ValueError(f"route_tokens must lie in [0, 1), not {self.route_tokens}")
        if self.route_blocks is not None and not self.route_tokens:
            raise ValueError("route_blocks has no effect without route_tokens")


class RoutedLoss(DiffusionLoss):
    """The diffusion loss; with `route_tokens`, some tokens of every row pass by some blocks.

    Which ones is drawn for every row and step. Validation and sampling compute everything.

    Source: Krause et al., 2025, arXiv 2501.04765, section 3; half of the tokens is the published share.

    Raises:
        ValueError: If the network cannot do without these tokens, or the alignment's block lacks them.
    """

    settings: RoutedLossSettings
    Settings = RoutedLossSettings

    def __init__(self, network: Network, *args: Any, **options: Any) -> None:
        super().__init__(network, *args, **options)
        self.route: range | None = None  # indices of blocks
        if self.settings.route_tokens:
            self.route = self._choose_route(network)

    def _choose_route(self, network: Any) -> range:
        if "route" not in inspect.signature(network.forward).parameters:
            raise ValueError(f"route_tokens: {type(network).__name__} computes all tokens in every block")
        try:
            route: range = network.routable(self.settings.route_blocks)
        except ValueError as error:
            raise ValueError(f"route_blocks {error}") from error
        if self.kept == 0:
            raise ValueError(
                f"route_tokens {self.settings.route_tokens}: of {network.config.tokens} tokens none is left"
            )
        if self.alignment is not None and self.alignment.block - 1 in route[:-1]:
            raise ValueError(
                f"route_blocks {route[0] + 1} {route[-1] + 1}: the aligned block {self.alignment.block} lacks tokens "
                f"there; align block {route[0]} or earlier, or {route[-1] + 1} or later"
            )
        return route

    @property
    def kept(self) -> int:
        """Number of tokens of a row that see all blocks."""
        tokens: int = self.network.config.tokens
        return tokens - round(tokens * self.settings.route_tokens)

    def draw_extra(self, step: int, rows: range, device: torch.device | str) -> dict[str, Tensor]:
        """Places of the tokens of each row that see all blocks, (N, K) int64, in order."""
        if self.route is None:
            return {}
        tokens = self.network.config.tokens
        orders = [
            torch.randperm(tokens, generator=generator, device=device)
            for generator in row_generators("route", self.seed, step, rows, device)
        ]
        return {KEPT: torch.stack(orders)[:, : self.kept].sort(dim=1).values}

    def evaluate(self, x_t: Tensor, batch: Batch, draws: Draws, number: int = 0, **options: object) -> ModelOutput:
        """Evaluate the network at noisy samples of a batch; the tokens that were drawn see all blocks."""
        if self.route is not None:
            options["route"] = TokenRoute(self.route, draws.extra[KEPT])
        return super().evaluate(x_t, batch, draws, number, **options)

    def macs(self, step: int) -> float:
        """MACs of one row's forward pass in a step."""
        if self.route is None:
            return super().macs(step)
        network: Any = self.network
        share = self.kept / network.config.tokens
        return super().macs(step) - network.routed_cost(self.route, 1.0) + network.routed_cost(self.route, share)
