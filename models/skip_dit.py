"""Skip-DiT: a DiT whose second half also sees the first half's tokens (Chen et al., 2024, arXiv 2411.17616).

In front of every block of the second half stands a skip unit: the tokens are joined with those that left the mirror
image of the block in the first half, normalised, and mapped back to the width. Deep features then change little from
one sampling step to the next, so that most blocks can be left out at most steps: the first B and the last B blocks
run anew, and what enters the last B is remembered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import dit
from models.contract import ModelOutput
from models.dit import DiT, DiTConfig
from models.layers import unpatchify


def default_cache_depth(depth: int) -> int:
    """Blocks kept at each end: a quarter of the depth, and four at most, as the released 28-block network has."""
    return max(1, min(4, depth // 4))


@dataclass(frozen=True, kw_only=True)
class SkipDiTConfig(DiTConfig):
    """Everything that fixes a Skip-DiT's parameters, and what it keeps: `default_cache_depth` if left open.

    Raises:
        ValueError: naming the field, its value and what would be right.
    """

    def __post_init__(self) -> None:
        """Chooses `cache_depth` where it is left open, and refuses what cannot be built."""
        if self.cache_depth is None:
            object.__setattr__(self, "cache_depth", default_cache_depth(self.depth))  # frozen for everybody else
        if self.depth % 2:
            raise ValueError(f"depth {self.depth} must be even: every block of the second half has one in the first")
        super().__post_init__()


class SkipNorm(nn.LayerNorm):
    """Layer norm with weight and bias that computes in float32, whatever the dtype of tokens and parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 2 D) -> (N, T, 2 D) in the dtype of x."""
        weight, bias = self.weight.float(), self.bias.float()
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class SkipLinear(nn.Module):
    """The linear map of a skip unit, one level down as in the official parameter names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def reset_parameters(self) -> None:
        """PyTorch's own initialisation, not DiT's: the unit has no residual, and zeros would erase its input."""
        self.linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 2 D) -> (N, T, D)."""
        return self.linear(x)


class SkipDiT(DiT):
    """DiT with skip units; always keeps state.

    Source: arXiv 2411.17616, section 3; sizes from DiT, of which the paper trains XL/2.
    """

    config_class = SkipDiTConfig
    config: SkipDiTConfig
    added_parts = ("skip_norms", "skip_linears")

    def __init__(self, config: SkipDiTConfig) -> None:
        super().__init__(config)
        width, self.num_units = config.hidden_size, config.depth // 2
        self.skip_norms = nn.ModuleList(SkipNorm(2 * width, eps=1e-6) for _ in range(self.num_units))
        self.skip_linears = nn.ModuleList(SkipLinear(width) for _ in range(self.num_units))

    def reset_parameters(self) -> None:
        """Draws all weights anew: DiT's as there, skip units as PyTorch does."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, SkipNorm | SkipLinear):
                module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        t: float | Tensor,
        y: Tensor,
        state: Any = None,
        *,
        features_at: int | None = None,
    ) -> ModelOutput:
        """Predicts noise (and variance values) for noisy images.

        Args:
            x: (N, C, S, S) noisy latents, float.
            t: timestep on the index scale, 0..999; a number that all rows share, or an (N,) tensor; may be fractional.
            y: (N,) int64 labels in [0, num_classes], the last being the null class.
            state: of an earlier evaluation of the same rows: the first and last `cache_depth` blocks run alone.
            features_at: 1-based number of the block whose output tokens are returned as `features`.

        Returns:
            `ModelOutput` with sample (N, C_out, S, S) and state (N, T, D), the tokens that enter block
            L - `cache_depth`, in front of its skip unit.

        Raises:
            ValueError: if x has another size than the positions were made for, the state belongs to another number of
                rows, or there is no such block among those that run.
        """
        blocks = self.blocks_to_run(reused=state is not None)
        self.check_inputs(x, state, features_at, blocks)
        features, half = None, self.num_units
        skips: list[Tensor] = []  # outputs of the first half; the last one in is the first one out
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        for i in blocks:
            if i == self.cache_at:
                x = state = x if state is None else state
            if i >= half:
                x = self.run_block(partial(self.fuse, i - half), x, skips.pop())
            x = self.run_block(self.blocks[i], x, c)
            if i < half:
                skips.append(x)
            if i + 1 == features_at:
                features = x
        x = self.final_layer(x, c)  # (N, T, p * p * C_out)
        return ModelOutput(unpatchify(x, self.out_channels, self.config.patch_size), state, features=features)

    def fuse(self, unit: int, x: Tensor, skip: Tensor) -> Tensor:
        """Skip unit: tokens and skipped tokens (N, T, D) each -> (N, T, D), in place of the tokens.

        Under autocast the linear map runs in low precision; what comes out has the tokens' own dtype again.
        """
        joined = torch.cat([x, skip], dim=-1)  # (N, T, 2 D)
        return self.skip_linears[unit](self.skip_norms[unit](joined)).to(x.dtype)

    def blocks_to_run(self, *, reused: bool) -> Sequence[int]:
        """Indices of the blocks that an evaluation runs, with or without state, in order."""
        depth, kept = self.config.depth, self.config.cache_depth
        assert kept is not None  # the config chose it
        return [*range(kept), *range(depth - kept, depth)] if reused else range(depth)

    def multiply_adds(self) -> dict[str, int]:
        """Multiply-adds of one forward of one image, by part."""
        return {**super().multiply_adds(), "skip_units": self._cost_of_units(self.num_units)}

    def multiply_adds_with_state(self) -> dict[str, int]:
        """The same for an evaluation that is handed state."""
        blocks = self.blocks_to_run(reused=True)
        units = sum(i >= self.num_units for i in blocks)
        return {**self.cost_of_blocks(len(blocks)), "skip_units": self._cost_of_units(units)}

    def _cost_of_units(self, count: int) -> int:
        return count * 2 * self.pos_embed.shape[1] * self.config.hidden_size**2

    def layer_norm_elements(self) -> int:
        """DiT's, and 2 T D in every skip unit."""
        return super().layer_norm_elements() + self.num_units * 2 * self.pos_embed.shape[1] * self.config.hidden_size


DEPTH = {"depth": 8}  # enough blocks for some to be left out

CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"Skip-DiT-{size}/{patch}": {**numbers, "patch_size": patch}
        for size, numbers in dit.SIZES.items()
        for patch in dit.PATCH_SIZES
    },
    "Skip-DiT-debug/2": {**dit.DEBUG, **DEPTH, "patch_size": 2},
    "Skip-DiT-digits/2": {**dit.DIGITS, **DEPTH, "patch_size": 2},
}
