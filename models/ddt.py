"""DDT: the decoupled diffusion transformer (Wang et al., 2025, arXiv 2504.05741), and the plain network it grew from.

A condition encoder turns the noisy image, the time and the label into tokens; a velocity decoder turns the noisy image
into a velocity, modulated token by token by the encoder's. What the encoder says changes slowly along a trajectory, so
its output is the state that a later evaluation may reuse. Undivided (`encoder_depth=None`) the same blocks are an
improved DiT, the baseline of the paper: IDiT in the registry.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.contract import ModelOutput, Network
from models.layers import FREQUENCY_DIM, LabelEmbedder, TimestepEmbedder, TimestepTable
from models.llama_layers import RMSNorm, RotaryAttention, SwiGLU, rotary_table

SLOWEST_PERIOD = 10.0  # of the time features: times lie in [0, 1]


@dataclass(frozen=True, kw_only=True)
class DDTConfig:
    """Everything that fixes a DDT's parameters, and the size of the images that scripts give it.

    Raises:
        ValueError: naming the field, its value and what would be right.
    """

    input_size: int = 32  # side of the (latent) image that scripts work on; the weights fit every size
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28  # blocks of encoder and decoder together
    num_heads: int = 16
    mlp_ratio: float = 4.0  # of a plain MLP with as many weights: SwiGLU's width is two thirds of it
    class_dropout_prob: float = 0.1  # 0: no null class, no guidance
    num_classes: int = 1000
    encoder_depth: int | None = 22  # blocks of the encoder; None: undivided

    def __post_init__(self) -> None:
        """Refuses what cannot be built."""
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} is "
                f"{self.hidden_size / self.num_heads:g}; rotary positions need a multiple of 4"
            )
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1), not {self.class_dropout_prob}")
        if self.mlp_width < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves the MLP without channels")
        if self.encoder_depth is not None and not 1 <= self.encoder_depth < self.depth:
            raise ValueError(
                f"encoder_depth must lie in 1..{self.depth - 1}, which leaves the decoder a block, not "
                f"{self.encoder_depth}; None makes the undivided network"
            )

    @property
    def mlp_width(self) -> int:
        """Channels inside the MLP, rounded down as the releases do (2730 of DDT-L is no multiple of 8)."""
        return int(2 * int(self.hidden_size * self.mlp_ratio) / 3)


class TokenEmbed(nn.Module):
    """A linear map from the values of a patch to a token: (N, T, C * p * p) -> (N, T, D)."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(values, width)

    def reset_parameters(self) -> None:
        """Xavier-uniform weight, zero bias."""
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, T, C * p * p) -> (N, T, D)."""
        return self.proj(patches)


class Modulation(nn.Sequential):
    """One linear map from the conditioning to `chunks` vectors, for every token or for all tokens alike.

    The conditioning has passed a SiLU already. It starts as any linear map does: nothing here begins at zero.
    """

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__(nn.Linear(width, chunks * width))  # so checkpoint keys end in ".0."
        self.chunks = chunks

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """(N or 1, T or 1, D) -> `chunks` tensors of that shape."""
        return super().forward(c).chunk(self.chunks, dim=-1)


class DDTBlock(nn.Module):
    """Rotary attention and SwiGLU, each behind a modulated RMSNorm and in front of a gate."""

    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        width, undivided = config.hidden_size, config.encoder_depth is None
        self.norm1 = RMSNorm(width, scale_in_float32=undivided)  # the two releases round in different places
        self.attn = RotaryAttention(width, config.num_heads, scale_in_float32=undivided)
        self.norm2 = RMSNorm(width, scale_in_float32=undivided)
        self.mlp = SwiGLU(width, config.mlp_width)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor, table: Tensor) -> Tensor:
        """Tokens (N, T, D), conditioning (N or 1, T or 1, D) and rotary table -> (N, T, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        x = torch.addcmul(x, gate_msa, self.attn(torch.addcmul(shift_msa, self.norm1(x), 1 + scale_msa), table))
        return torch.addcmul(x, gate_mlp, self.mlp(torch.addcmul(shift_mlp, self.norm2(x), 1 + scale_mlp)))


class VelocityHead(nn.Module):
    """Modulated layer norm and a linear map to the values of a patch: (N, T, D) -> (N, T, C * p * p)."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = Modulation(width, 2)

    def reset_parameters(self) -> None:
        """Zero everything: the untrained network predicts exactly 0."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (N, T, D) and conditioning (N or 1, T or 1, D) -> (N, T, C * p * p)."""
        shift, scale = self.adaLN_modulation(c)
        return self.linear(torch.addcmul(shift, self.norm(x), 1 + scale))


class DDT(Network):
    """Decoupled diffusion transformer; undivided if the config's `encoder_depth` is None.

    Source: arXiv 2504.05741.
    """

    time_convention = "unit"
    config_class = DDTConfig
    config: DDTConfig

    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = self.out_channels = config.in_channels
        self.input_size = config.input_size
        self.num_classes = config.num_classes
        self.class_dropout_prob = config.class_dropout_prob
        self.keeps_state = config.encoder_depth is not None

        width, values = config.hidden_size, config.in_channels * config.patch_size**2
        self.x_embedder = TokenEmbed(values, width)
        self.s_embedder = TokenEmbed(values, width) if self.keeps_state else None  # the encoder's own
        self.t_embedder: TimestepEmbedder | TimestepTable = TimestepEmbedder(width, SLOWEST_PERIOD)
        self.y_embedder = LabelEmbedder(config.num_classes, width, null_class=config.class_dropout_prob > 0)
        self.final_layer = VelocityHead(width, values)
        self.blocks = nn.ModuleList(DDTBlock(config) for _ in range(config.depth))
        self._tables: dict[tuple[int, int, torch.device], Tensor] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew: blocks as PyTorch's linear maps start, small normals for embedders, a zero output."""
        for module in (*self.blocks.modules(), *self.t_embedder.modules()):
            if isinstance(module, nn.Linear | RMSNorm):
                module.reset_parameters()
        for part in (self.x_embedder, self.s_embedder, self.t_embedder, self.y_embedder, self.final_layer):
            if part is not None:
                part.reset_parameters()

    def forward(
        self,
        x: Tensor,
        t: float | Tensor,
        y: Tensor,
        state: Any = None,
        *,
        features_at: int | None = None,
    ) -> ModelOutput:
        """Predicts the velocity of noisy images.

        Args:
            x: (N, C, H, W) noisy latents, float; H and W any multiples of the patch.
            t: time in [0, 1], 0 = noise; a number that all rows share, or an (N,) tensor.
            y: (N,) int64 labels in [0, num_classes], the last being the null class.
            state: of an earlier evaluation on as many rows and tokens: the decoder alone runs, and neither t nor y has
                any influence. Ignored where the network is undivided.
            features_at: 1-based number of the block whose output tokens are returned as `features`.

        Returns:
            `ModelOutput` with sample (N, C, H, W) and, unless undivided, state (N, T, D).

        Raises:
            ValueError: if x does not fit the patches or the state, or the block asked for does not run.
        """
        state = state if self.keeps_state else None
        self._check_inputs(x, state, features_at)
        rows, columns = (side // self.config.patch_size for side in x.shape[-2:])
        patches, table = patchify(x, self.config.patch_size), self._table(rows, columns, x.device)
        features: Tensor | None = None
        decoder_start = self.config.encoder_depth or 0

        def run(tokens: Tensor, c: Tensor, blocks: range) -> Tensor:
            nonlocal features
            for i in blocks:
                tokens = self.run_block(self.blocks[i], tokens, c, table)
                if i + 1 == features_at:
                    features = tokens
            return tokens

        if state is not None:
            c = state
        else:
            te = self.t_embedder(t)[:, None]  # (N or 1, 1, D)
            c = functional.silu(te + self.y_embedder(y)[:, None])
            if self.s_embedder is not None:
                c = state = functional.silu(te + run(self.s_embedder(patches), c, range(decoder_start)))  # (N, T, D)
        tokens = self.final_layer(run(self.x_embedder(patches), c, range(decoder_start, len(self.blocks))), c)
        sample = unpatchify(tokens, rows, columns, self.config.patch_size)
        return ModelOutput(sample, state, features=features)

    def _check_inputs(self, x: Tensor, state: Tensor | None, features_at: int | None) -> None:
        patch, first = self.config.patch_size, 1
        if x.shape[-3] != self.in_channels or x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(
                f"x is {tuple(x.shape)}; this network takes (N, {self.in_channels}, H, W) with sides that are "
                f"multiples of {patch}"
            )
        if state is not None:
            first += self.config.encoder_depth or 0
            tokens = x.shape[-2] * x.shape[-1] // patch**2
            if state.shape[:2] != (len(x), tokens):
                raise ValueError(f"the state is of {tuple(state.shape[:2])} rows and tokens, x of {(len(x), tokens)}")
        if features_at is not None and not first <= features_at <= len(self.blocks):
            raise ValueError(f"features_at must lie in {first}..{len(self.blocks)}, not {features_at}")

    def _table(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """The rotary table of a grid, computed once for each device."""
        key = (rows, columns, device)
        if key not in self._tables:
            width = self.config.hidden_size // self.config.num_heads
            with torch.inference_mode(False):  # tensors made in that mode could not serve training later
                self._tables[key] = rotary_table(rows, columns, width, device)
        return self._tables[key]

    def for_sampling(self, times: Iterable[float]) -> Self:
        """Embeds all times of a schedule in one call; parameters are shared with this network."""
        prepared = copy.copy(self)
        prepared._modules = dict(self._modules)  # a shallow copy shares the dict: replacing an entry would leak back
        prepared.t_embedder = TimestepTable(self.t_embedder, times)
        return prepared

    def multiply_adds(self) -> dict[str, int]:
        """Multiply-adds of one forward of one image, by part.

        Returns:
            Parts by name; norms, activations, rotations and softmax are not counted.
        """
        d, encoder, tokens = self.config.hidden_size, self.config.encoder_depth, self._tokens
        embedding = {"timestep_mlp": FREQUENCY_DIM * d + d * d}
        if encoder is None:
            return embedding | self._decoder(self.config.depth, tokens_modulated=1)
        patches = tokens * d * self.in_channels * self.config.patch_size**2
        parts = {"patch_embedding": patches} | self._blocks(encoder, tokens_modulated=1)
        return embedding | {f"encoder_{k}": n for k, n in parts.items()} | self.multiply_adds_with_state()

    def multiply_adds_with_state(self) -> dict[str, int]:
        """The same for the decoder alone, whose modulation is a linear map of every token."""
        if self.config.encoder_depth is None:
            return self.multiply_adds()
        parts = self._decoder(self.config.depth - self.config.encoder_depth, tokens_modulated=self._tokens)
        return {f"decoder_{k}": n for k, n in parts.items()}

    @property
    def _tokens(self) -> int:
        return (self.input_size // self.config.patch_size) ** 2

    def _decoder(self, depth: int, tokens_modulated: int) -> dict[str, int]:
        d, values = self.config.hidden_size, self.in_channels * self.config.patch_size**2
        blocks = self._blocks(depth, tokens_modulated)
        return {
            "patch_embedding": self._tokens * d * values,
            **blocks,
            "modulation": blocks["modulation"] + 2 * tokens_modulated * d * d,
            "final_linear": self._tokens * d * values,
        }

    def _blocks(self, depth: int, tokens_modulated: int) -> dict[str, int]:
        d, tokens = self.config.hidden_size, self._tokens
        return {
            "attention_linear": depth * 4 * tokens * d * d,
            "attention_products": depth * 2 * tokens * tokens * d,
            "mlp": depth * 3 * tokens * d * self.config.mlp_width,
            "modulation": depth * 6 * tokens_modulated * d * d,
        }

    def layer_norm_elements(self) -> int:
        """Two norms a block over the tokens, two over queries and keys, and the final one: T * D elements each."""
        return (4 * self.config.depth + 1) * self._tokens * self.config.hidden_size


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cuts images into tokens, row by row; inside a token the channel is slowest, then the row, then the column.

    Args:
        x: (N, C, H, W).
        patch: p.

    Returns:
        (N, T, C * p * p), contiguous.
    """
    n, channels, height, width = x.shape
    x = x.reshape(n, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n, -1, channels * patch * patch)


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Undoes `patchify`: (N, rows * columns, C * p * p) -> (N, C, rows * p, columns * p)."""
    x = tokens.view(len(tokens), rows, columns, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(tokens), -1, rows * patch, columns * patch)


# B, L and XL are the paper's; S divides its blocks as B does.
SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6, "encoder_depth": 8},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12, "encoder_depth": 8},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "encoder_depth": 20},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "encoder_depth": 22},
}
# Small enough that every script runs in seconds on a laptop; class-conditional 8 x 8 latents.
DEBUG: dict[str, Any] = {
    "depth": 4, "hidden_size": 64, "num_heads": 4, "input_size": 8, "num_classes": 10, "encoder_depth": 3,
}  # fmt: skip
# 8 x 8 grey digits.
DIGITS: dict[str, Any] = {
    "depth": 6, "hidden_size": 96, "num_heads": 4, "input_size": 8, "in_channels": 1, "num_classes": 10,
    "encoder_depth": 4,
}  # fmt: skip

DIVIDED: dict[str, dict[str, Any]] = {
    **{f"{size}/{patch}": {**SIZES[size], "patch_size": patch} for size in SIZES for patch in (2, 4, 8)},
    "debug/2": {**DEBUG, "patch_size": 2},
    "digits/2": {**DIGITS, "patch_size": 2},
}
CONFIGS: dict[str, dict[str, Any]] = {
    **{f"DDT-{name}": config for name, config in DIVIDED.items()},
    **{f"IDiT-{name}": {**config, "encoder_depth": None} for name, config in DIVIDED.items()},
}
