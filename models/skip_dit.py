"""Skip-DiT: a DiT with a second half that also sees the first half's tokens (Chen et al., 2024, arXiv 2411.17616).

Every block of the second half follows a skip unit: the tokens are concatenated with the output of the mirror-image
block in the first half, normalised, and mapped back to the width. Deep features then change little from one sampling
step to the next, so that most steps can run the first B and the last B blocks only and reuse the input of the last B.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import dit
from models.config import BackboneConfig
from models.contract import ModelOutput, for_any_rows
from models.dit import DiT, DiTConfig
from models.transformer import Detour, TokenRoute, Transformer, choose_blocks


def default_cache_depth(depth: int) -> int:
    """Return a quarter of the depth, four at most, as in the released 28-block network."""
    return max(1, min(4, depth // 4))


@dataclass(frozen=True, kw_only=True)
class SkipDiTConfig(DiTConfig):
    """Everything that fixes a Skip-DiT's parameters, and its reusable state.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    def __post_init__(self) -> None:
        """Fill in `cache_depth` and validate the fields."""
        if self.cache_depth is None:
            object.__setattr__(self, "cache_depth", default_cache_depth(self.depth))
        if self.depth % 2:
            raise ValueError(f"depth {self.depth} must be even: every block of the second half has one in the first")
        super().__post_init__()

    @property
    def skip_units(self) -> int:
        """Number of skip units: one before every block of the second half."""
        return self.depth // 2


class SkipNorm(nn.LayerNorm):
    """Layer norm with weight and bias that computes in float32, whatever the dtype of tokens and parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, T, 2 D) in the dtype of x."""
        weight, bias = self.weight.float(), self.bias.float()
        return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class SkipLinear(nn.Module):
    """Linear map of a skip unit, one level down as in the official parameter names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def reset_parameters(self) -> None:
        """Initialise as PyTorch does, not as DiT: the unit has no residual, and zeros would erase its input."""
        self.linear.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, 2 D) -> (N, T, D)."""
        out: Tensor = self.linear(x)
        return out


def skip_unit(x: Tensor, skip: Tensor, norm: nn.Module, linear: nn.Module) -> Tensor:
    """Map tokens and skipped tokens, (N, T, D) each, to (N, T, D) in the tokens' dtype."""
    # Under autocast the linear map runs in low precision, but the residual stream does not.
    out: Tensor = linear(norm(torch.cat([x, skip], dim=-1))).to(x.dtype)
    return out


class SkipUnits(Transformer):
    """A network with skip units, by which its second half also sees the first half's tokens; it always keeps state.

    Attributes:
        num_units: U, the number of units, by which `skip_norms` and `skip_linears` are numbered.
    """

    num_units: int
    _compiled_unit: Callable[..., Tensor] | None = None

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        width, self.num_units = config.hidden_size, config.skip_units
        self.skip_norms = nn.ModuleList(SkipNorm(2 * width, eps=1e-6) for _ in range(self.num_units))
        self.skip_linears = nn.ModuleList(SkipLinear(width) for _ in range(self.num_units))

    def reset_parameters(self) -> None:
        """Re-initialise: the other parts as without skip units, these as PyTorch does."""
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, SkipNorm | SkipLinear):
                module.reset_parameters()

    def fuse(self, unit: int, x: Tensor, skip: Tensor) -> Tensor:
        """Apply a skip unit to tokens and skipped tokens (N, ..., D) each, -> (N, ..., D) in the tokens' dtype."""
        apply = skip_unit if self._compiled_unit is None else self._compiled_unit
        # The first unit joins the middle's output with itself; one tensor given twice would be compiled for on its own,
        # and without gradients so would a view.
        if skip is x:
            skip = x.view_as(x) if torch.is_grad_enabled() else x.detach()
        return apply(x, skip, self.skip_norms[unit], self.skip_linears[unit])

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile every block, and the skip units."""
        super().compile_blocks(backend)
        unit = torch.compile(skip_unit, dynamic=False, fullgraph=True, backend=backend)
        self._compiled_unit = for_any_rows(unit)

    def blocks_to_run(self, *, reused: bool) -> Sequence[int]:
        """Return the indices of the blocks that an evaluation runs, with or without state, in order."""
        depth, start = self.config.depth, self.cache_at
        assert start is not None  # the config fills it in
        return [*range(depth - start), *range(start, depth)] if reused else range(depth)

    def cost_of(self, blocks: Sequence[int]) -> dict[str, int]:
        """Count the MACs by part of these blocks and their skip units with the embedders and the final layer."""
        half = self.config.depth // 2
        units = sum(i >= half for i in blocks) * self.num_units // half
        skip_units = units * 2 * self.config.tokens * self.config.hidden_size**2
        return {**super().cost_of(blocks), "skip_units": skip_units}


class SkipDiT(SkipUnits, DiT):
    """DiT with a skip unit before every block of the second half.

    Source: arXiv 2411.17616, section 3; sizes from DiT, of which the paper trains XL/2.
    """

    config: SkipDiTConfig

    def routable(self, chosen: tuple[int, int] | None) -> range:
        """Return the indices of the blocks that tokens pass by in training, as many in the second half as in the first.

        A skip unit joins the tokens of two blocks, so that both see them or neither does.
        """
        blocks = choose_blocks(chosen, range(self.config.depth), margins=(2, 2))
        if blocks.start != self.config.depth - blocks.stop:
            raise ValueError(
                f"{blocks[0] + 1} {blocks[-1] + 1}: a network with skip units leaves out as many blocks at its end as "
                f"at its start, for example {blocks[0] + 1} {self.config.depth - blocks.start}"
            )
        return blocks

    def routed_cost(self, blocks: range, share: float) -> float:
        """Count the MACs of these blocks and their skip units, as `Transformer.routed_cost` does."""
        return super().routed_cost(blocks, share) + share * self.cost_of(blocks)["skip_units"]

    def forward(
        self,
        x: Tensor,
        t: float | Tensor,
        *,
        y: Tensor,
        state: Tensor | None = None,
        features_at: Collection[int] = (),
        route: TokenRoute | None = None,
    ) -> ModelOutput:
        """Predict noise (and variance values) for noisy images, as `DiT.forward` does.

        The state (N, T, D) is the tokens that enter block L - `cache_depth`, before its skip unit. An evaluation that
        is given it runs the first and last `cache_depth` blocks only.
        """
        blocks = self.blocks_to_run(reused=state is not None)
        self.check_inputs(x, state, features_at, blocks)
        detour = Detour(route, state, features_at)
        features: dict[int, Tensor] = {}
        skips: list[Tensor] = []  # outputs of the first half; the second half takes the latest first
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        for i in blocks:
            if i == self.cache_at:
                x = state = x if state is None else state
            x = detour.enter(i, x)
            if i >= self.num_units:
                x = self.fuse(i - self.num_units, x, skips.pop())
            x = self.blocks[i](x, c)
            if i < self.num_units:
                skips.append(x)
            x = detour.leave(i, x)
            if i + 1 in features_at:
                features[i + 1] = x
        x = self.final_layer(x, c)  # (N, T, p * p * C_out)
        return ModelOutput(self.unpatchify(x), state if route is None else None, features)


DEPTH = {"depth": 8}  # enough blocks for some to be left out

CONFIGS: dict[str, dict[str, object]] = {
    **dit.published("Skip-DiT"),
    "Skip-DiT-debug/2": {**dit.DEBUG, **DEPTH},
    "Skip-DiT-digits/2": {**dit.DIGITS, **DEPTH},
}
