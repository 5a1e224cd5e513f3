"""Layers of text-conditioned transformers after PixArt-alpha (Chen et al., 2023, arXiv 2310.00426).

One vector made from the time modulates all blocks, each of which adds its own table (adaLN-single), and tokens
attend to a text. Parameter names are those of diffusers, so that checkpoints load unchanged.

Shapes: N batch, T tokens, G sequences a sample, L words of a text, K their width, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import FREQUENCY_DIM, gelu, modulate, multiply_add, timestep_features

CHUNKS = 6  # shift, scale and gate of attention, then of the MLP
MASKED = -10_000.0  # added to the scores of masked words; finite, so that a text without any words has an output


class Projection(nn.Module):
    """Linear map, activation, linear map."""

    def __init__(self, inputs: int, width: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        """Initialise weights from Normal(0, 0.02), biases with zeros."""
        for layer in (self.linear_1, self.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., K) -> (..., D)."""
        out: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return out


class AdaLNSingle(nn.Module):
    """Embedding of a time, and the vector made from it that modulates all blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": Projection(FREQUENCY_DIM, width, functional.silu)})
        self.linear = nn.Linear(width, CHUNKS * width)

    def reset_parameters(self) -> None:
        """Initialise the embedding from Normal(0, 0.02), the modulation with zeros (adaLN-Zero)."""
        self.emb["timestep_embedder"].reset_parameters()  # type: ignore[operator]
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: float | Tensor) -> Tensor:
        """Map a number -> (1, 7 D), or an (N,) tensor -> (N, 7 D): the embedding, then the modulation."""
        weight = self.linear.weight
        features = timestep_features(t, FREQUENCY_DIM, device=weight.device).to(weight.dtype)
        embedded = self.emb["timestep_embedder"](features)
        return torch.cat([embedded, self.linear(functional.silu(embedded))], dim=1)


class TextAttention(nn.Module):
    """Multi-head attention with separate maps to queries, keys and values; heads are contiguous."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # so checkpoint keys end in ".0."

    def forward(self, x: Tensor, groups: int) -> Tensor:
        """Attend inside each of G sequences of equal length, one after the other: (N, G T, D) -> the same."""
        q, k, v = (self._heads(layer(x), groups) for layer in (self.to_q, self.to_k, self.to_v))
        return self._joined(functional.scaled_dot_product_attention(q, k, v), x)

    def to_text(self, x: Tensor, groups: int, text: Tensor, mask: Tensor | None) -> Tensor:
        """Attend to texts from each of G sequences (N, G T, D).

        Args:
            x: Tokens (N, G T, D).
            groups: G.
            text: (N, 1 + I, L, D); the last I sequences have a text each, those before share the first.
            mask: (N G, 1, 1, L), added to the scores; None adds nothing.
        """
        q = self._heads(self.to_q(x), groups)
        # Keys and values are made once a text, not once a frame
        k, v = (self._heads(spread(layer(text), groups).flatten(1, 2), groups) for layer in (self.to_k, self.to_v))
        return self._joined(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), x)

    def _heads(self, x: Tensor, groups: int) -> Tensor:
        """Arrange (N, G T, D) as (N G, H, T, D / H)."""
        return x.view(len(x) * groups, -1, self.num_heads, x.shape[2] // self.num_heads).transpose(1, 2)

    def _joined(self, heads: Tensor, like: Tensor) -> Tensor:
        """Map the outputs of heads (N G, H, T, D / H) to (N, G T, D)."""
        out: Tensor = self.to_out[0](heads.transpose(1, 2).reshape(like.shape))
        return out


def spread(texts: Tensor, groups: int) -> Tensor:
    """Give each of G sequences its text: (N, 1 + I, ...) -> (N, G, ...), the first for all but the last I."""
    own = texts.shape[1] - 1
    shared = texts[:, :1].expand(-1, groups - own, *texts.shape[2:])
    return torch.cat([shared, texts[:, 1:]], dim=1) if own else shared


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # So checkpoint keys have "net.0.proj" and "net.2"
        self.net = nn.ModuleDict(
            {"0": nn.ModuleDict({"proj": nn.Linear(width, hidden)}), "2": nn.Linear(hidden, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, D) -> (N, T, D)."""
        out: Tensor = self.net["2"](gelu(self.net["0"]["proj"](x)))  # type: ignore[index]
        return out


class TextBlock(nn.Module):
    """Attention, attention to a text in blocks that have it, and MLP.

    The first and the last have a modulated layer norm before and a gate after them; attention to text has neither.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, *, text: bool) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(CHUNKS, width))
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn1 = TextAttention(width, num_heads)
        self.attn2 = TextAttention(width, num_heads) if text else None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(width, hidden)

    def reset_parameters(self) -> None:
        """Set the modulation and the output of the attention to text to zero: the block is the identity."""
        nn.init.zeros_(self.scale_shift_table)
        if self.attn2 is not None:
            for parameter in self.attn2.to_out.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, x: Tensor, c: Tensor, groups: int, text: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Map G sequences of tokens, one after the other, (N, G T, D) to the same.

        Args:
            x: Tokens.
            c: (N, 6 D) or (1, 6 D) modulation of all blocks.
            groups: G.
            text: (N, 1 + I, L, D) texts, as `TextAttention.to_text` takes them; None in blocks without that attention.
            mask: (N G, 1, 1, L), added to the scores of the texts.
        """
        modulation = (self.scale_shift_table + c.unflatten(1, (CHUNKS, -1))).chunk(CHUNKS, dim=1)  # (N, 1, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = multiply_add(x, gate_msa, self.attn1(modulate(self.norm1(x), shift_msa, scale_msa), groups))
        if self.attn2 is not None:
            assert text is not None
            x = x + self.attn2.to_text(x, groups, text, mask)
        return multiply_add(x, gate_mlp, self.ff(modulate(self.norm2(x), shift_mlp, scale_mlp)))
