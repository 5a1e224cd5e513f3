"""Layers from language models: RMSNorm, SwiGLU, rotary positions in two dimensions.

Shapes: N batch, T tokens, D width, H heads, d = D / H. Parameter names are those of the official DDT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import without_autocast

SPAN = 16.0  # of the positions along an axis, whatever the number of tokens: weights fit every resolution


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divide by the root mean square of the last axis, taken in float32, and multiply by a weight (..., width).

    The quotient is rounded to the dtype of x, the product is not: it has the wider dtype of both. (The released code of
    the improved DiT rounds the product instead, which is as far from float32 and needs copies of x in both dtypes.)

    Args:
        x: (..., width).
        weight: Learned scale, float32 or lower.

    Source: Zhang and Sennrich, 2019.
    """
    with without_autocast(x):  # it would write a float32 copy; the kernel computes in float32 and rounds at the end
        return functional.rms_norm(x, x.shape[-1:], eps=1e-6) * weight


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale of `width` numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def reset_parameters(self) -> None:
        """Set the scale to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., width)."""
        return rms_norm(x, self.weight)


class SwiGLU(nn.Module):
    """Gated MLP (Shazeer, 2020): w2(silu(w1 x) * w3 x), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, D) -> (N, T, D)."""
        out: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return out


def rotary_table(rows: int, columns: int, head_width: int, device: torch.device | None = None) -> Tensor:
    """Compute the angles of rotary positions on a grid, as cosines and sines.

    Both axes run from 0 to `SPAN`, end points included; an axis of one token stays at 0. Angle 2 k is the column's
    position times 10000^(-4 k / d), angle 2 k + 1 the row's. The width d of a head is a multiple of 4.

    Returns:
        (T, d / 2, 2) float32, cosine before sine; token index = row * columns + column.
    """
    frequencies = 10_000.0 ** (-4 / head_width * torch.arange(head_width // 4, dtype=torch.float32, device=device))
    down, across = (
        torch.arange(n, dtype=torch.float32, device=device) * (SPAN / max(n - 1, 1)) for n in (rows, columns)
    )
    angles = torch.stack(
        [
            (across[:, None] * frequencies).expand(rows, -1, -1),
            (down[:, None, None] * frequencies).expand(-1, columns, -1),
        ],
        dim=-1,
    ).view(rows * columns, head_width // 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels by the angles of their token: (a, b) -> (a cos - b sin, a sin + b cos).

    x and the result are (N, T, H, d) float32; the table is that of `rotary_table`, or (N, T, d / 2, 2), one a row.
    """
    pairs, turns = x.unflatten(-1, (-1, 2)), table.unsqueeze(-3)
    # Complex products are one pass over memory, but torch.compile generates no code for them; compiled, the written-out
    # form is fused with its neighbours.
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns)).flatten(-2)
    (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class RotaryAttention(nn.Module):
    """Self-attention with normalised queries and keys, rotated by their positions.

    Rows of `qkv` are [q | k | v], heads contiguous; one learned scale serves all heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width // num_heads)
        self.k_norm = RMSNorm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Attend over tokens (N, T, D) with the table of their positions."""
        n, t, d = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.num_heads, d // self.num_heads)
        scales = torch.stack([self.q_norm.weight, self.k_norm.weight]).unsqueeze(1)  # (2, 1, d)
        both = rms_norm(qkv[:, :, :2], scales)
        both = rotate(both.float().flatten(2, 3), table).to(qkv.dtype)  # (N, T, 2 H, d), queries before keys
        q, k = both.transpose(1, 2).chunk(2, dim=1)
        heads = functional.scaled_dot_product_attention(q, k, qkv[:, :, 2].transpose(1, 2))
        out: Tensor = self.proj(heads.transpose(1, 2).reshape(n, t, d))
        return out
