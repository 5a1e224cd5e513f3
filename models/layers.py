"""Layers that every family shares. Parameter names are the official DiT ones, so that checkpoints load as they are.

Shapes: N batch, C channels, S image side, p patch, g = S / p grid side, T = g * g tokens, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

FREQUENCY_DIM = 256


# ----------------------------------------------------------------------------------------------------------------------
# Functions


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Applies adaLN's affine map, the same for every token: x * (1 + scale) + shift.

    Args:
        x: (N, T, D) normalised tokens.
        shift: (N, D) or (1, D).
        scale: like `shift`.
    """
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """Residual connection behind adaLN's gate: x + gate * update; x and update (N, T, D), gate (N, D) or (1, D)."""
    return torch.addcmul(x, gate.unsqueeze(1), update)


def timestep_features(
    t: float | Tensor, dim: int, max_period: float = 10_000.0, device: torch.device | None = None
) -> Tensor:
    """Sinusoidal features of a timestep: cosines, then sines, of t * max_period^(-k / h), k = 0..h-1, h = dim // 2.

    The frequencies are computed where they are used: kept as a buffer they would be cast with a half-precision network
    and lost by one that is built on the meta device.

    Args:
        t: a number that all rows share (no copy to the device), or an (N,) tensor; may be fractional.
        dim: number of features; an odd dim ends in a zero column.
        max_period: of the slowest feature, nearly.
        device: where a number's features are wanted; a tensor's stay with it.

    Returns:
        (1, dim) for a number, (N, dim) for a tensor; float32.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device if isinstance(t, Tensor) else device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = t.float()[:, None] * frequencies if isinstance(t, Tensor) else (frequencies * t)[None]
    return functional.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which operations on the device of x keep the dtypes that they are given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def attention_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """Softmax attention by PyTorch's fused kernels: [q | k | v] (N, T, 3 D) -> every head's output (N, T, H, D / H)."""
    n, t, width = qkv.shape
    q, k, v = qkv.view(n, t, 3, num_heads, width // 3 // num_heads).permute(2, 0, 3, 1, 4).unbind()
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def sincos_position_table(width: int, grid: int) -> Tensor:
    """Fixed 2-D positions: the first half of the columns encodes x (the column index), the second half y.

    Computed in float64; cast to the parameter's dtype where it is stored.

    Args:
        width: D, a multiple of 4.
        grid: tokens per side; token index = row * grid + column.

    Returns:
        (grid * grid, D) float64.

    Raises:
        ValueError: if D is not a multiple of 4.

    Note:
        The official comments call the first half "h"; the values are x first, and values are what checkpoints hold.
    """
    if width % 4:
        raise ValueError(f"hidden_size must be a multiple of 4 for 2-D positions, not {width}")
    frequencies = 10_000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = np.divmod(np.arange(grid * grid, dtype=np.float64), grid)
    halves = [f(axis[:, None] * frequencies) for axis in (columns, rows) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(halves, axis=1))


def unpatchify(tokens: Tensor, channels: int, patch: int) -> Tensor:
    """Lays tokens out as an image; inside a token the order is row, column, channel (channel fastest).

    Args:
        tokens: (N, T, p * p * C) with T a square number.
        channels: C.
        patch: p.

    Returns:
        (N, C, S, S).
    """
    n, t, _ = tokens.shape
    grid = math.isqrt(t)
    x = tokens.view(n, grid, grid, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, grid * patch, grid * patch)


def xavier_linear_(module: nn.Module) -> None:
    """Initialises a linear layer as DiT does: Xavier-uniform weight, zero bias. For `module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ----------------------------------------------------------------------------------------------------------------------
# Embedders


class PatchEmbed(nn.Module):
    """Cuts an image into p x p patches and projects each: (N, C, S, S) -> (N, T, D), row-major."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def reset_parameters(self) -> None:
        """Xavier-uniform over the flattened patch, as if the convolution were the linear map that it is."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.out_channels, -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, S, S) -> (N, T, D), contiguous.

        Left strided, the tokens would make every operation of the blocks slower (1.09x of a float32 forward on a CPU),
        and blocks that PyTorch 2.15 compiles for bf16 on a CPU would return NaN.
        """
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t through a two-layer MLP (DiT, section 3.2, following ADM)."""

    def __init__(self, width: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_DIM, width), nn.SiLU(), nn.Linear(width, width))

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) weights; biases stay as they are."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t: float | Tensor) -> Tensor:
        """A number -> (1, D), an (N,) tensor -> (N, D)."""
        weight = next(self.parameters())
        return self.mlp(timestep_features(t, FREQUENCY_DIM, self.max_period, weight.device).to(weight.dtype))


class TimestepTable(nn.Module):
    """A timestep embedder evaluated once for a whole schedule: looking a time up costs no computation."""

    def __init__(self, embedder: TimestepEmbedder | TimestepTable, times: Iterable[float]) -> None:
        super().__init__()
        self.embedder: TimestepEmbedder = embedder.embedder if isinstance(embedder, TimestepTable) else embedder
        distinct = sorted(set(times))
        device = next(embedder.parameters()).device
        with torch.no_grad():
            rows: Tensor = self.embedder(torch.tensor(distinct, dtype=torch.float32, device=device))
        self.rows = dict(zip(distinct, rows.split(1), strict=True))

    def reset_parameters(self) -> None:
        """Refused: a table is a snapshot of weights, not a place to draw new ones."""
        raise TypeError("a network prepared for sampling cannot be re-initialised; initialise the original")

    def forward(self, t: float | Tensor) -> Tensor:
        """The prepared (1, D) row of a known number; anything else goes through the embedder."""
        row = None if isinstance(t, Tensor) else self.rows.get(t)
        return self.embedder(t) if row is None else row


class LabelEmbedder(nn.Module):
    """A row per class, and one more for "no class" if labels are ever dropped: (N,) int64 -> (N, D)."""

    def __init__(self, num_classes: int, width: int, *, null_class: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_class, width)

    def reset_parameters(self) -> None:
        """Normal(0, 0.02)."""
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        """(N,) -> (N, D)."""
        return self.embedding_table(y)


# ----------------------------------------------------------------------------------------------------------------------
# Block parts


class Attention(nn.Module):
    """Multi-head self-attention; rows of `qkv` are [q | k | v], heads contiguous."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, T, D) -> (N, T, D); a mask (N, H) or (1, H) silences heads, in front of the output's map."""
        heads = attention_heads(self.qkv(x), self.num_heads)  # (N, T, H, D / H)
        if mask is not None:
            heads = heads * mask[:, None, :, None].to(heads.dtype)
        return self.proj(heads.flatten(2))


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, T, D) -> (N, T, D); a mask (N, H) or (1, H) silences channels, in H groups of neighbours."""
        inner = self.fc1(x)
        if mask is not None:  # in front of GELU, which keeps zeros: the place decides the gradient of the mask
            inner = (inner.unflatten(2, (mask.shape[1], -1)) * mask[:, None, :, None].to(inner.dtype)).flatten(2)
        return self.fc2(functional.gelu(inner, approximate="tanh"))


class AdaLNModulation(nn.Sequential):
    """SiLU and one linear map from the conditioning to `chunks` vectors per sample; starts at zero (adaLN-Zero)."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, chunks * width))  # so checkpoint keys end in ".1."
        self.chunks = chunks

    def reset_parameters(self) -> None:
        """Zero weight and bias: every gate closed, every block the identity."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """(N, D) -> `chunks` tensors (N, D)."""
        return super().forward(c).chunk(self.chunks, dim=-1)


class FinalLayer(nn.Module):
    """Modulated layer norm and a linear map to the values of a patch: (N, T, D) -> (N, T, p * p * C_out)."""

    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = AdaLNModulation(width, 2)

    def reset_parameters(self) -> None:
        """Zero everything: the untrained network predicts exactly 0."""
        self.adaLN_modulation.reset_parameters()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (N, T, D) and conditioning (N, D) -> (N, T, p * p * C_out)."""
        shift, scale = self.adaLN_modulation(c)
        return self.linear(modulate(self.norm_final(x), shift, scale))
