"""DiT: the plain diffusion transformer (Peebles and Xie, 2023, arXiv 2212.09748).

A ViT over latent patches with layer norms modulated by timestep and label (adaLN-Zero). Differences from a plain
ViT: no class token, fixed 2-D sine-cosine positions, norms without parameters, gates that start at zero.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.config import BackboneConfig, LabelledConfig
from models.contract import ModelOutput
from models.layers import (
    AdaLNModulation,
    Attention,
    ClassConditional,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    modulate,
    multiply_add,
    sincos_position_table,
    unpatchify,
    xavier_linear_,
)
from models.transformer import Detour, TokenRoute, Transformer


@dataclass(frozen=True, kw_only=True)
class DiTConfig(BackboneConfig, LabelledConfig):
    """Everything that fixes a DiT's parameters, and its reusable state.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """


class DiTBlock(nn.Module):
    """Attention and MLP, each with a modulated layer norm before it and a gate after it (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = AdaLNModulation(width, 6)

    def forward(self, x: Tensor, c: Tensor, groups: int = 1) -> Tensor:
        """Map tokens (N, T, D), given the conditioning (N, D) or (1, D), to (N, T, D).

        With `groups`, tokens are that many sequences of equal length, one after the other, and attend to their own.
        """
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c, x.dtype)
        h = modulate(self.norm1(x), shift_msa, scale_msa)
        attended = self.attn(h) if groups == 1 else self.attn(h.unflatten(1, (groups, -1)).flatten(0, 1)).view_as(h)
        x = multiply_add(x, gate_msa, attended)
        return multiply_add(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class DiT(Transformer, ClassConditional):
    """Diffusion transformer with adaLN-Zero blocks.

    Source: arXiv 2212.09748, section 3; sizes from table 1.
    """

    config: DiTConfig
    pos_embed: nn.Parameter
    y_embedder: LabelEmbedder

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.conditioning = ("y",) if config.num_classes else ()
        channels, width = config.sample_shape[-3], config.hidden_size

        # Parameters because checkpoints hold them and fine-tuning at another resolution replaces them; never trained.
        for name, table in self.position_tables().items():
            self.register_parameter(name, nn.Parameter(torch.empty(table.shape), requires_grad=False))
        self.x_embedder = PatchEmbed(config.patch_size, channels, width)
        self.t_embedder = TimestepEmbedder(width)
        if "y" in self.conditioning:
            self.y_embedder = LabelEmbedder(config.num_classes, width, null_class=config.class_dropout_prob > 0)
        self.blocks = nn.ModuleList(self.make_block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch_size, self.out_channels)
        self.reset_parameters()

    def make_block(self, config: DiTConfig) -> DiTBlock:
        """Build one block."""
        return DiTBlock(config.hidden_size, config.num_heads, config.mlp_ratio)

    def position_tables(self) -> dict[str, Tensor]:
        """Fixed values of the parameters that hold positions, by name; `pos_embed` is (1, T, D)."""
        return {"pos_embed": sincos_position_table(self.config.hidden_size, *self.grid)[None]}

    def reset_parameters(self) -> None:
        """Re-initialise: Xavier for linear maps, small normals for embedders, zeros for gates and output."""
        with torch.no_grad():
            for name, table in self.position_tables().items():
                self.get_parameter(name).copy_(table)
        self.apply(xavier_linear_)
        for part in self.children():
            if isinstance(part, PatchEmbed | TimestepEmbedder | LabelEmbedder | FinalLayer):
                part.reset_parameters()
        for module in self.modules():
            if isinstance(module, AdaLNModulation):
                module.reset_parameters()

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
        """Predict noise (and variance values) for noisy images (N, C, H, W) at timesteps 0..999; see `Network`.

        Some tokens may take a route past blocks in training; nothing can be reused then.

        Returns:
            `ModelOutput` with sample (N, C_out, H, W), and state (N, T, D) with `cache_depth`.
        """
        state = state if self.keeps_state else None
        blocks = self.blocks_to_run(reused=state is not None)
        self.check_inputs(x, state, features_at, blocks)
        features: dict[int, Tensor] = {}
        detour = Detour(route, state, features_at)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        x = self.x_embedder(x) + self.pos_embed if state is None else state  # (N, T, D)
        for i in blocks:
            if i == self.cache_at:
                state = x
            x = detour.leave(i, self.blocks[i](detour.enter(i, x), c))
            if i + 1 in features_at:
                features[i + 1] = x
        x = self.final_layer(x, c)  # (N, T, p * p * C_out)
        return ModelOutput(self.unpatchify(x), state if route is None else None, features)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Arrange tokens (N, T, p * p * C_out) as images (N, C_out, H, W)."""
        return unpatchify(x, self.grid, self.config.patch_size, self.out_channels)


def data_settings(weights: Mapping[str, Tensor], config: DiTConfig) -> dict[str, object] | None:
    """Infer sample_shape, num_classes and learn_sigma from weights of this size; None if they have another size.

    The weights are those of a DiT or a family with its embedders. A label table without a null class looks like one of
    a class less.
    """
    width, channels, *patch = weights["x_embedder.proj.weight"].shape
    if (width, patch) != (config.hidden_size, [config.patch_size] * 2):
        return None
    tokens, values = weights["pos_embed"].shape[1], weights["final_layer.linear.weight"].shape[0]
    side = math.isqrt(tokens) * config.patch_size
    height, width = config.sample_shape[-2:] if tokens == math.prod(config.grid) else (side, side)
    return {
        "sample_shape": (channels, height, width),
        "num_classes": weights["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": values == 2 * channels * config.patch_size**2,
    }


SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}


def published(family: str) -> dict[str, dict[str, object]]:
    """Configs of all sizes and patch sizes by name, such as "DiT-XL/2"."""
    sizes = SIZES.items()
    return {f"{family}-{size}/{p}": {**numbers, "patch_size": p} for size, numbers in sizes for p in (2, 4, 8)}


# Small enough for every script to run in seconds on a laptop; class-conditional 8 x 8 latents.
DEBUG: dict[str, object] = {"depth": 4, "hidden_size": 64, "num_heads": 4, "sample_shape": (4, 8, 8), "num_classes": 10}
# The quick start's: 8 x 8 grey digits, epsilon only.
DIGITS: dict[str, object] = {
    "depth": 4, "hidden_size": 96, "num_heads": 4, "sample_shape": (1, 8, 8), "num_classes": 10, "learn_sigma": False,
}  # fmt: skip

CONFIGS: dict[str, dict[str, object]] = {
    **published("DiT"),
    "DiT-debug/2": DEBUG,
    "DiT-digits/2": DIGITS,
    "DiT-digits-deep/2": {**DIGITS, "depth": 8},  # for comparison with a Skip-DiT of that depth
}
