"""Gates, routers and the block of DyDiT, by masks: everything is computed and multiplied by 0 or 1.

Shapes as in `layers.py`; R outputs of a width router, G = 2 R + T gates of a block for one row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.dit import DiTBlock
from models.layers import modulate, multiply_add, without_autocast
from models.masks import Mask, masked

TEMPERATURE = 5.0  # of the gates' gradient in training
TOKEN_ROUTER_RATIO = 16  # width of the network over the inner width of a token router


class Routing(NamedTuple):
    """Active parts of a network, or of one block without the axis L, as float32 masks of exactly 0 and 1."""

    heads: Tensor  # (N, L, H)
    mlp: Tensor  # (N, L, H) groups of channels
    tokens: Tensor  # (N, L, T) tokens that go through the MLP


def gate(logits: Tensor, noise: Tensor | None = None, *, always_on: int = 0) -> Mask:
    """Make hard decisions with a soft gradient (straight-through Gumbel-sigmoid).

    Args:
        logits: Float32.
        noise: Logistic noise of that shape (the difference of two Gumbel variables), for training; or None.
        always_on: Number of gates that are on without a decision, before the others.

    Returns:
        Exactly 1 where sigmoid(logits + noise) > 0.5, else 0. The gradient is that of sigmoid((logits + noise) / 5), or
        without noise of sigmoid(logits).

    Source: arXiv 2410.03456, section 3; the temperature is the released code's.
    """
    soft = torch.sigmoid(logits if noise is None else (logits + noise) / TEMPERATURE)
    if always_on:
        soft = functional.pad(soft, (always_on, 0), value=1.0)
    on = soft > 0.5
    return Mask(on + (soft - soft.detach()), on)


def float32_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear map in float32 under any autocast: rounded logits would switch gates at random."""
    return functional.linear(x.float(), layer.weight.float(), layer.bias.float())


class WidthRouter(nn.Module):
    """Gates of groups of heads or channels by timestep; one linear map, one level down as in the official names."""

    needs_float32 = True

    def __init__(self, width: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.always_on = groups - outputs
        self.router = nn.Linear(width, outputs)

    def forward(self, e: Tensor, noise: Tensor | None = None) -> Mask:
        """Map the timestep embedding (N or 1, D) and noise (N, R) to a mask (N or 1, H)."""
        with without_autocast(e):
            return gate(float32_linear(self.router, e), noise, always_on=self.always_on)


class TokenRouter(nn.Module):
    """Gates of tokens by their content: linear, ReLU, linear."""

    needs_float32 = True

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // TOKEN_ROUTER_RATIO
        self.mlp_head = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, 1))

    @property
    def layers(self) -> tuple[nn.Linear, nn.Linear]:
        """First and last linear map."""
        first, _, last = self.mlp_head
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        return first, last

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Mask:
        """Map the residual stream (N, T, D), not normalised, and noise (N, T) to a mask (N, T)."""
        first, last = self.layers
        with without_autocast(x):
            return gate(float32_linear(last, float32_linear(first, x).relu()).squeeze(-1), noise)


class DyDiTBlock(DiTBlock):
    """DiT's block with three routers."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, router_outputs: int) -> None:
        super().__init__(width, num_heads, mlp_ratio)
        self.attn_rate = WidthRouter(width, router_outputs, num_heads)
        self.mlp_rate = WidthRouter(width, router_outputs, num_heads)
        self.token_selection = TokenRouter(width)

    def forward(  # type: ignore[override]  # returns masks, too
        self, x: Tensor, c: Tensor, e: Tensor | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Evaluate the block in full or with masks.

        Args:
            x: (N, T, D) tokens.
            c: (N, D) or (1, D) conditioning: timestep and label.
            e: (N, D) or (1, D) timestep embedding for the width routers; None evaluates the block without routers.
            noise: (N, G) logistic noise of the gates of heads, tokens and groups; None decides without noise.

        Returns:
            Tokens (N, T, D), and masks (N or 1, H), (N or 1, H), (N, T), or None without routers.
        """
        if e is None:
            return super().forward(x, c), None
        outputs = self.attn_rate.router.out_features
        sizes = (outputs, x.shape[1], outputs)
        head_noise, token_noise, group_noise = (None, None, None) if noise is None else noise.split(sizes, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c, x.dtype)
        heads = self.attn_rate(e, head_noise)
        x = multiply_add(x, gate_msa, self.attn(modulate(self.norm1(x), shift_msa, scale_msa), heads))
        tokens = self.token_selection(x, token_noise)
        groups = self.mlp_rate(e, group_noise)
        update = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp), groups)
        x = multiply_add(x, gate_mlp, masked(update, tokens, 2))
        return x, Routing(heads.values, groups.values, tokens.values)
