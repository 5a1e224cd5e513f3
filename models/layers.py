"""Layers that all families share. Parameter names are the official DiT ones, so that checkpoints load unchanged.

Shapes: N batch, C channels, p patch, T tokens, D width, H heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models.contract import Network
from models.masks import Mask, masked
from runtime.sharding import is_divided

FREQUENCY_DIM = 256


def multiply_add(start: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute start + a * b, such as a gated update, in one pass and the widest dtype of the three, which broadcast."""
    if not start.is_cuda:
        return torch.addcmul(start, a, b)
    # The kernel reads any mix of dtypes; CUDA's autocast would first write copies of all three in the widest one.
    with without_autocast(start):
        return torch.addcmul(start, a, b)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply adaLN's affine map, x * (1 + scale) + shift, to tokens (N, T, D); the others are (N or 1, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


def gelu(x: Tensor) -> Tensor:
    """Apply GELU in its tanh approximation, elementwise."""
    if not (x.is_cuda and torch.compiler.is_compiling()):
        return functional.gelu(x, approximate="tanh")
    # Compiled for a GPU, tanh is a call into a library and takes twice the time that memory needs. The same function,
    # since (1 + tanh(u)) / 2 = sigmoid(2 u):
    wide = x.float()
    inner = wide * (1 + 0.044715 * wide * wide)
    return (wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * inner)).to(x.dtype)


def timestep_features(
    t: float | Tensor, dim: int, max_period: float = 10_000.0, device: torch.device | None = None
) -> Tensor:
    """Sinusoidal features of a timestep: cosines, then sines, of t * max_period^(-k / h), k = 0..h-1, h = dim // 2.

    Args:
        t: Number for all rows (not copied to the device), or an (N,) tensor; may be fractional.
        dim: Number of features; an odd dim ends in a zero column.
        max_period: Period of the slowest feature, approximately.
        device: Device of a number's features; a tensor's are on its own.

    Returns:
        (1, dim) for a number, (N, dim) for a tensor; float32.
    """
    # A buffer of frequencies would be cast with a half-precision network and be empty after building on meta.
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device if isinstance(t, Tensor) else device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = t.float()[:, None] * frequencies if isinstance(t, Tensor) else (frequencies * t)[None]
    features = torch.cat([angles.cos(), angles.sin()], dim=1)
    return functional.pad(features, (0, 1)) if dim % 2 else features


def exact_parameters(block: nn.Module) -> list[nn.Parameter]:
    """Parameters that autocast does not round: all but those of linear maps and convolutions that it reaches.

    Modules that compute in float32 under any autocast have an attribute `needs_float32`.
    """
    exact = {part for module in block.modules() if hasattr(module, "needs_float32") for part in module.modules()}
    modules = [module for module in block.modules() if module in exact or not isinstance(module, nn.Linear | nn.Conv2d)]
    return [parameter for module in modules for parameter in module.parameters(recurse=False)]


def rounded_state(network: Network, dtype: torch.dtype) -> dict[str, Tensor]:
    """State dict of a network, with the weights that autocast rounds in its blocks stored in this lower precision.

    Under autocast in that precision the network computes the same bits with it; without, it differs by the rounding.
    """
    exact = {parameter for block in network.blocks for parameter in exact_parameters(block)}
    rounded = {id(parameter) for parameter in network.blocks.parameters() if parameter not in exact}
    named = network.named_parameters(remove_duplicate=False)
    lower = {name: parameter.detach().to(dtype) for name, parameter in named if id(parameter) in rounded}
    return {**network.state_dict(), **lower}


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the device of x."""
    device = x.device.type
    # First the question that PyTorch 2.11 can trace: compiled blocks would break at the others.
    if torch.compiler.is_compiling() or (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def attention_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """Compute softmax attention by PyTorch's fused kernels: [q | k | v] (N, T, 3 D) -> (N, T, H, D / H)."""
    n, t, width = qkv.shape
    q, k, v = qkv.view(n, t, 3, num_heads, width // 3 // num_heads).permute(2, 0, 3, 1, 4).unbind()
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def sincos_positions(width: int, rows: int, columns: int, span: float | None = None) -> NDArray[np.float64]:
    """Compute fixed 2-D positions (rows * columns, D); token index = row * columns + column.

    The first half of the width D encodes the column index, the second half the row index. The official comments call
    the first half "h"; the values are the column's, and checkpoints hold values. With a span, the indices of either
    side are scaled so that it is as long as that many tokens.

    Raises:
        ValueError: If D is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"hidden_size must be a multiple of 4 for 2-D positions, not {width}")
    frequencies = 10_000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
    down, across = np.divmod(np.arange(rows * columns, dtype=np.float64), columns)
    if span is not None:
        down, across = down * (span / rows), across * (span / columns)
    return np.concatenate([f(axis[:, None] * frequencies) for axis in (across, down) for f in (np.sin, np.cos)], axis=1)


def sincos_position_table(width: int, rows: int, columns: int) -> Tensor:
    """Return the same, without a span, as a tensor (rows * columns, D) float64."""
    return torch.from_numpy(sincos_positions(width, rows, columns))


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int, channels: int) -> Tensor:
    """Arrange tokens as images: (N, rows * columns, p * p * C) -> (N, C, rows * p, columns * p).

    The order inside a token is row, column, channel (channel fastest).
    """
    rows, columns = grid
    x = tokens.view(len(tokens), rows, columns, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), channels, rows * patch, columns * patch)


def xavier_linear_(module: nn.Module) -> None:
    """Initialise a linear layer as DiT does: Xavier-uniform weight, zero bias. For `module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ----------------------------------------------------------------------------------------------------------------------
# Embedders


class PatchEmbed(nn.Module):
    """Linear map of every p x p patch of an image: (N, C, H, W) -> (N, T, D), row-major."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def reset_parameters(self) -> None:
        """Initialise Xavier-uniform over the flattened patch, as for a linear map."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.out_channels, -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Embed (N, C, H, W) -> (N, T, D), contiguous."""
        # Strided tokens slow every operation of the blocks (1.09x of a float32 forward on a CPU), and blocks that
        # PyTorch 2.15 compiles for bf16 on a CPU return NaN with them.
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2).contiguous()
        return out


class TimestepEmbedder(nn.Module):
    """Two-layer MLP on sinusoidal features of t (DiT, section 3.2, following ADM)."""

    def __init__(self, width: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_DIM, width), nn.SiLU(), nn.Linear(width, width))

    def reset_parameters(self) -> None:
        """Initialise weights from Normal(0, 0.02); biases stay as they are."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t: float | Tensor) -> Tensor:
        """Embed a number -> (1, D), or an (N,) tensor -> (N, D)."""
        weight = next(self.parameters())
        out: Tensor = self.mlp(timestep_features(t, FREQUENCY_DIM, self.max_period, weight.device).to(weight.dtype))
        return out


class TimestepTable(nn.Module):
    """Embeddings of all times of a schedule, computed in one call when it is built."""

    def __init__(self, embedder: nn.Module, times: Iterable[float]) -> None:
        super().__init__()
        self.embedder: nn.Module = embedder.embedder if isinstance(embedder, TimestepTable) else embedder
        distinct = sorted(set(times))
        device = next(embedder.parameters()).device
        with torch.no_grad():
            rows: Tensor = self.embedder(torch.tensor(distinct, dtype=torch.float32, device=device))
        self.rows = dict(zip(distinct, rows.split(1), strict=True))

    def reset_parameters(self) -> None:
        """Raise: a table is a snapshot of weights."""
        raise TypeError("a network prepared for sampling cannot be re-initialised; initialise the original")

    def forward(self, t: float | Tensor) -> Tensor:
        """Look up the (1, D) row of a known number, return a row (1, D) as it is, and embed anything else."""
        row = (t if t.ndim == 2 else None) if isinstance(t, Tensor) else self.rows.get(t)
        out: Tensor = self.embedder(t) if row is None else row
        return out


class LabelEmbedder(nn.Module):
    """Table with a row per class, and one more for the null class: (N,) int64 -> (N, D)."""

    def __init__(self, num_classes: int, width: int, *, null_class: bool) -> None:
        super().__init__()
        self.num_classes, self.null_class = num_classes, null_class
        self.embedding_table = nn.Embedding(num_classes + null_class, width)

    def reset_parameters(self) -> None:
        """Initialise from Normal(0, 0.02)."""
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels (N,) -> (N, D)."""
        out: Tensor = self.embedding_table(y)
        return out

    def null_labels(self, rows: int) -> Tensor:
        """Return (rows,) labels of the null class.

        Raises:
            ValueError: If the table has no row for it.
        """
        if not self.null_class:
            raise ValueError("class_dropout_prob is 0: this network has no null class and cannot be guided")
        return torch.full((rows,), self.num_classes, dtype=torch.int64, device=self.embedding_table.weight.device)


class TimeConditional(Network):
    """Base class of networks that embed a time by one module.

    Attributes:
        time_embedder: Name of that module, which a table of times may replace.
    """

    time_embedder: ClassVar[str] = "t_embedder"

    def embedded_time(self, t: float) -> Tensor | None:
        """Return the row (1, D) of a time that this network was prepared for."""
        table = self._modules[self.time_embedder]
        return table.rows.get(t) if isinstance(table, TimestepTable) else None

    def for_sampling(self, times: Iterable[float]) -> Self:
        """Embed all times of a schedule in one call; parameters are shared with this network.

        A network of which processes hold parts is returned as it is: its weights are whole only inside `forward`.
        """
        if any(map(is_divided, self.parameters())):
            return self
        prepared = copy.copy(self)
        prepared._modules = dict(self._modules)  # copy.copy shares the dict, and this network must keep its embedder
        prepared._modules[self.time_embedder] = TimestepTable(self.get_submodule(self.time_embedder), times)
        return prepared


class ClassConditional(TimeConditional):
    """Base class of networks that embed a time and a label."""

    t_embedder: TimestepEmbedder | TimestepTable
    y_embedder: LabelEmbedder

    def null_conditioning(self, rows: int) -> dict[str, Tensor]:
        """Return labels of the null class; a ValueError if the network was built without label dropout."""
        return {"y": self.y_embedder.null_labels(rows)}


# ----------------------------------------------------------------------------------------------------------------------
# Block parts


class Attention(nn.Module):
    """Multi-head self-attention; rows of `qkv` are [q | k | v], heads contiguous."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """Attend over (N, T, D); a mask (N, H) or (1, H) multiplies the heads' outputs."""
        heads = attention_heads(self.qkv(x), self.num_heads)  # (N, T, H, D / H)
        if mask is not None:
            heads = masked(heads, mask, 1, 3)
        out: Tensor = self.proj(heads.flatten(2))
        return out


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        """Map (N, T, D) -> (N, T, D); a mask (N, H) or (1, H) multiplies H groups of neighbouring hidden channels."""
        inner = self.fc1(x)
        if mask is not None:  # before GELU, which keeps zeros: the position determines the gradient of the mask
            inner = masked(inner.unflatten(2, (mask.on.shape[1], -1)), mask, 1, 3).flatten(2)
        out: Tensor = self.fc2(gelu(inner))
        return out


class AdaLNModulation(nn.Sequential):
    """SiLU and one linear map from the conditioning to `chunks` vectors per sample, zero at first (adaLN-Zero)."""

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, chunks * width))  # so checkpoint keys end in ".1."
        self.chunks = chunks

    def reset_parameters(self) -> None:
        """Set weight and bias to zero: gates are closed, blocks are the identity."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, c: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Map (N, D) -> `chunks` tensors (N, 1, D) in a dtype: a GPU modulates tokens fastest in their own."""
        for layer in self:
            c = layer(c)
        return c.to(dtype or c.dtype).unsqueeze(1).chunk(self.chunks, dim=-1)


class FinalLayer(nn.Module):
    """Modulated layer norm and a linear map to the values of a patch: (N, T, D) -> (N, T, p * p * C_out)."""

    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = AdaLNModulation(width, 2)

    def reset_parameters(self) -> None:
        """Set all parameters to zero, so that an untrained network predicts 0."""
        self.adaLN_modulation.reset_parameters()
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens (N, T, D), given the conditioning (N, D), to (N, T, p * p * C_out)."""
        shift, scale = self.adaLN_modulation(c, x.dtype)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out
