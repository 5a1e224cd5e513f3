"""DiT: the plain diffusion transformer (Peebles and Xie, 2023, arXiv 2212.09748).

A ViT over latent patches whose layer norms are modulated by timestep and label (adaLN-Zero). Differences from a plain
ViT: no class token, fixed 2-D sine-cosine positions, norms without parameters, gates that start at zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.contract import ModelOutput, Network
from models.layers import (
    FREQUENCY_DIM,
    AdaLNModulation,
    Attention,
    FinalLayer,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    TimestepTable,
    gated_add,
    modulate,
    sincos_position_table,
    unpatchify,
    xavier_linear_,
)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Everything that fixes a DiT's parameters.

    Raises:
        ValueError: naming the field, its value and what would be right.
    """

    input_size: int = 32  # side of the (latent) image: 32 for 256 pixels behind an f8 autoencoder
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1  # 0: no null class, no guidance
    num_classes: int = 1000
    learn_sigma: bool = True  # twice the output channels: epsilon, then variance values
    cache_depth: int | None = None  # last blocks that a cached step still runs; None: no state is kept

    def __post_init__(self) -> None:
        """Refuses what cannot be built."""
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1), not {self.class_dropout_prob}")
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves the MLP without channels")
        if self.cache_depth is not None and not 1 <= self.cache_depth <= self.depth // 2:
            raise ValueError(f"cache_depth {self.cache_depth} must lie in 1..{self.depth // 2}, half the depth")


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a modulated layer norm and in front of a gate (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = AdaLNModulation(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens (N, T, D) and conditioning (N, D) or (1, D) -> (N, T, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        x = gated_add(x, gate_msa, self.attn(modulate(self.norm1(x), shift_msa, scale_msa)))
        return gated_add(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class DiT(Network):
    """Diffusion transformer with adaLN-Zero blocks.

    With `cache_depth` B set, the tokens that enter block L - B are handed out as state, and an evaluation that is given
    them back runs the last B blocks on them, without a look at x. That is the baseline Skip-DiT is measured against.

    Attributes:
        cache_at: L - B, the index of the block whose input is remembered; None without `cache_depth`.

    Source: arXiv 2212.09748, section 3; sizes from table 1.
    """

    config_class = DiTConfig
    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = config.in_channels
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.input_size = config.input_size
        self.num_classes = config.num_classes
        self.class_dropout_prob = config.class_dropout_prob
        self.cache_at = None if config.cache_depth is None else config.depth - config.cache_depth
        self.keeps_state = self.cache_at is not None

        width, grid = config.hidden_size, config.input_size // config.patch_size
        # A parameter because checkpoints carry it and fine-tuning at another resolution replaces it; never trained.
        positions = torch.as_tensor(sincos_position_table(width, grid).float()[None])  # onto the default device
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, width)
        self.t_embedder: TimestepEmbedder | TimestepTable = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width, null_class=config.class_dropout_prob > 0)
        self.blocks = nn.ModuleList(self.make_block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch_size, self.out_channels)
        self.reset_parameters()

    def make_block(self, config: DiTConfig) -> DiTBlock:
        """One block, as the constructor wants `depth` of them."""
        return DiTBlock(config.hidden_size, config.num_heads, config.mlp_ratio)

    def reset_parameters(self) -> None:
        """Draws all weights anew: Xavier for linear maps, small normals for embedders, zeros for gates and output."""
        self.apply(xavier_linear_)
        for part in (self.x_embedder, self.t_embedder, self.y_embedder, self.final_layer):
            part.reset_parameters()
        for module in self.modules():
            if isinstance(module, AdaLNModulation):
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
            state: of an earlier evaluation of the same rows, to be reused; ignored without `cache_depth`.
            features_at: 1-based number of the block whose output tokens are returned as `features`.

        Returns:
            `ModelOutput` with sample (N, C_out, S, S); state (N, T, D) if `cache_depth` is set.

        Raises:
            ValueError: if x has another size than the positions were made for, the state belongs to another number of
                rows, or there is no such block among those that run.
        """
        state = state if self.keeps_state else None
        blocks = self.blocks_to_run(reused=state is not None)
        self.check_inputs(x, state, features_at, blocks)
        features = None
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        x = self.x_embedder(x) + self.pos_embed if state is None else state  # (N, T, D)
        for i in blocks:
            if i == self.cache_at:
                state = x
            x = self.run_block(self.blocks[i], x, c)
            if i + 1 == features_at:
                features = x
        x = self.final_layer(x, c)  # (N, T, p * p * C_out)
        return ModelOutput(unpatchify(x, self.out_channels, self.config.patch_size), state, features=features)

    def blocks_to_run(self, *, reused: bool) -> Sequence[int]:
        """Indices of the blocks that an evaluation runs, with or without state, in order."""
        return range(self.cache_at if reused and self.cache_at is not None else 0, self.config.depth)

    def check_inputs(self, x: Tensor, state: Any, features_at: int | None, blocks: Sequence[int]) -> None:
        """Refuses what an evaluation of these blocks cannot serve.

        Raises:
            ValueError: see `forward`.
        """
        if x.shape[-3:] != (self.in_channels, self.input_size, self.input_size):
            side = self.input_size
            raise ValueError(f"x is {tuple(x.shape)}; this network takes (N, {self.in_channels}, {side}, {side})")
        if state is not None and len(state) != len(x):
            raise ValueError(f"state of {len(state)} rows cannot be reused for {len(x)} rows")
        if features_at is not None and not 1 <= features_at <= len(self.blocks):
            raise ValueError(f"features_at must lie in 1..{len(self.blocks)}, not {features_at}")
        if features_at is not None and features_at - 1 not in blocks:
            raise ValueError(f"features_at {features_at}: that block does not run when state is reused")

    def for_sampling(self, times: Iterable[float]) -> Self:
        """Embeds all timesteps of a schedule in one call; parameters are shared with this network."""
        prepared = copy.copy(self)
        prepared._modules = dict(self._modules)  # a shallow copy shares the dict: replacing an entry would leak back
        prepared.t_embedder = TimestepTable(self.t_embedder, times)
        return prepared

    def multiply_adds(self) -> dict[str, int]:
        """Multiply-adds of one forward of one image, by part; sums to the "Gflops" of the paper's table 1 (as GMACs).

        Returns:
            Parts by name; layer norms, activations and softmax are not counted (see `layer_norm_elements`).
        """
        return self.cost_of_blocks(self.config.depth)

    def multiply_adds_with_state(self) -> dict[str, int]:
        """The same for an evaluation that is handed state, which looks at no patch."""
        parts = self.cost_of_blocks(len(self.blocks_to_run(reused=True)))
        if self.keeps_state:
            del parts["patch_embedding"]
        return parts

    def cost_of_blocks(self, count: int) -> dict[str, int]:
        """Multiply-adds, by part, of an evaluation that runs this many blocks between embedders and final layer."""
        config, d = self.config, self.config.hidden_size
        tokens = self.pos_embed.shape[1]
        patch_values = config.patch_size**2
        return {
            "patch_embedding": tokens * d * patch_values * self.in_channels,
            "timestep_mlp": FREQUENCY_DIM * d + d * d,
            "attention_linear": count * 4 * tokens * d * d,
            "attention_products": count * 2 * tokens * tokens * d,
            "mlp": count * 2 * tokens * d * int(d * config.mlp_ratio),
            "modulation": (count * 6 + 2) * d * d,
            "final_linear": tokens * d * patch_values * self.out_channels,
        }

    def layer_norm_elements(self) -> int:
        """Two norms a block and the final one, T * D elements each."""
        return (2 * self.config.depth + 1) * self.pos_embed.shape[1] * self.config.hidden_size


SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
PATCH_SIZES = (2, 4, 8)

# Small enough that every script runs in seconds on a laptop; class-conditional 8 x 8 latents.
DEBUG: dict[str, Any] = {
    "depth": 4, "hidden_size": 64, "num_heads": 4, "input_size": 8, "num_classes": 10,
}  # fmt: skip
# The quick start's: 8 x 8 grey digits, epsilon only.
DIGITS: dict[str, Any] = {
    "depth": 4, "hidden_size": 96, "num_heads": 4, "input_size": 8, "in_channels": 1, "num_classes": 10,
    "learn_sigma": False,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    **{f"DiT-{size}/{patch}": {**SIZES[size], "patch_size": patch} for size in SIZES for patch in PATCH_SIZES},
    "DiT-debug/2": {**DEBUG, "patch_size": 2},
    "DiT-digits/2": {**DIGITS, "patch_size": 2},
    "DiT-digits-deep/2": {**DIGITS, "depth": 8, "patch_size": 2},  # beside a Skip-DiT of that depth
}
