"""DDT: the decoupled diffusion transformer (Wang et al., 2025, arXiv 2504.05741), and the plain network it grew from.

A condition encoder maps the noisy image, the time and the label to tokens; a velocity decoder maps the noisy image to a
velocity, modulated token by token by the encoder's output. That output changes slowly along a trajectory, so it is the
state that a later evaluation may reuse. Undivided (`encoder_depth=None`) the same blocks are an improved DiT, the
baseline of the paper: IDiT in the registry.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.config import LabelledConfig
from models.contract import ModelOutput
from models.layers import FREQUENCY_DIM, ClassConditional, LabelEmbedder, TimestepEmbedder, multiply_add
from models.llama_layers import RMSNorm, RotaryAttention, SwiGLU, rotary_table
from models.transformer import Detour, TokenRoute, choose_blocks, routed_cost
from runtime.settings import setting

SLOWEST_PERIOD = 10.0  # of the time features, for times in [0, 1]


@dataclass(frozen=True, kw_only=True)
class DDTConfig(LabelledConfig):
    """Everything that fixes a DDT's parameters, which fit every height and width.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    encoder_depth: int | None = setting(22, "blocks of the condition encoder; none makes the network undivided")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} is "
                f"{self.hidden_size / self.num_heads:g}; rotary positions need a multiple of 4"
            )
        if self.encoder_depth is not None and not 1 <= self.encoder_depth < self.depth:
            raise ValueError(
                f"encoder_depth must lie in 1..{self.depth - 1}, which leaves the decoder a block, not "
                f"{self.encoder_depth}; None makes the undivided network"
            )

    @property
    def mlp_width(self) -> int:
        """Channels inside SwiGLU: two thirds of a plain MLP's, for as many weights.

        They are rounded down as in the releases (2730 of DDT-L is no multiple of 8).
        """
        return int(2 * int(self.hidden_size * self.mlp_ratio) / 3)


class TokenEmbed(nn.Module):
    """Linear map of the values of a patch: (N, T, C * p * p) -> (N, T, D)."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(values, width)

    def reset_parameters(self) -> None:
        """Initialise with Xavier-uniform weight and zero bias."""
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Map (N, T, C * p * p) -> (N, T, D)."""
        out: Tensor = self.proj(patches)
        return out


class Modulation(nn.Sequential):
    """Linear map from the activated conditioning to `chunks` vectors, for each token or for all of them.

    It is initialised as any linear map, not with zeros.
    """

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__(nn.Linear(width, chunks * width))  # so checkpoint keys end in ".0."
        self.chunks = chunks

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """Map (N or 1, T or 1, D) -> `chunks` tensors of that shape."""
        for layer in self:
            c = layer(c)
        return c.chunk(self.chunks, dim=-1)


class DDTBlock(nn.Module):
    """Rotary attention and SwiGLU, each with a modulated RMSNorm before it and a gate after it."""

    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = RMSNorm(width)
        self.attn = RotaryAttention(width, config.num_heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, config.mlp_width)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor, table: Tensor) -> Tensor:
        """Map tokens (N, T, D), given the conditioning (N or 1, T or 1, D) and a rotary table, to (N, T, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)
        x = multiply_add(x, gate_msa, self.attn(multiply_add(shift_msa, self.norm1(x), 1 + scale_msa), table))
        return multiply_add(x, gate_mlp, self.mlp(multiply_add(shift_mlp, self.norm2(x), 1 + scale_mlp)))


class VelocityHead(nn.Module):
    """Modulated layer norm and a linear map to the values of a patch: (N, T, D) -> (N, T, C * p * p)."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = Modulation(width, 2)

    def reset_parameters(self) -> None:
        """Set all parameters to zero, so that an untrained network predicts 0."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens (N, T, D), given the conditioning (N or 1, T or 1, D), to (N, T, C * p * p)."""
        shift, scale = self.adaLN_modulation(c)
        out: Tensor = self.linear(multiply_add(shift, self.norm(x), 1 + scale))
        return out


class DDT(ClassConditional):
    """Decoupled diffusion transformer; undivided if the config's `encoder_depth` is None.

    Source: arXiv 2504.05741.
    """

    time_convention = "unit"
    config: DDTConfig

    def __init__(self, config: DDTConfig) -> None:
        super().__init__()
        self.config = config
        self.sample_shape = config.sample_shape
        self.out_channels = config.sample_shape[0]
        self.keeps_state = config.encoder_depth is not None

        width, values = config.hidden_size, self.out_channels * config.patch_size**2
        self.x_embedder = TokenEmbed(values, width)
        self.s_embedder = TokenEmbed(values, width) if self.keeps_state else None  # the encoder's own
        self.t_embedder = TimestepEmbedder(width, SLOWEST_PERIOD)
        self.y_embedder = LabelEmbedder(config.num_classes, width, null_class=config.class_dropout_prob > 0)
        self.final_layer = VelocityHead(width, values)
        self.blocks = nn.ModuleList(DDTBlock(config) for _ in range(config.depth))
        self._tables: dict[tuple[int, int, torch.device], Tensor] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Re-initialise: blocks as PyTorch's linear maps, small normals for embedders, zeros for the output."""
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
        *,
        y: Tensor,
        state: Tensor | None = None,
        features_at: Collection[int] = (),
        route: TokenRoute | None = None,
    ) -> ModelOutput:
        """Predict the velocity of noisy images (N, C, H, W) at times in [0, 1], 0 = noise; see `Network`.

        H and W may be any multiples of the patch. With a state, of as many rows and tokens, only the decoder runs, and
        neither t nor y has any influence; an undivided network ignores it. In training some tokens may take a route
        past blocks of the encoder, or of an undivided network.

        Returns:
            `ModelOutput` with sample (N, C, H, W) and, unless undivided, state (N, T, D).
        """
        state = state if self.keeps_state else None
        self._check_inputs(x, state, features_at)
        rows, columns = (side // self.config.patch_size for side in x.shape[-2:])
        patches, table = patchify(x, self.config.patch_size), self._table(rows, columns, x.device)
        features: dict[int, Tensor] = {}
        detour, kept_table = Detour(route, state, features_at), table if route is None else route.take(table[None])
        decoder_start = self.config.encoder_depth or 0

        def run(tokens: Tensor, c: Tensor, blocks: range) -> Tensor:
            for i in blocks:
                places = table if route is None or i not in route.blocks else kept_table
                tokens = detour.leave(i, self.blocks[i](detour.enter(i, tokens), c, places))
                if i + 1 in features_at:
                    features[i + 1] = tokens
            return tokens

        if state is not None:
            c = state
        else:
            te = self.t_embedder(t)[:, None]  # (N or 1, 1, D)
            c = functional.silu(te + self.y_embedder(y)[:, None])
            if self.s_embedder is not None:
                c = state = functional.silu(te + run(self.s_embedder(patches), c, range(decoder_start)))  # (N, T, D)
        tokens = self.final_layer(run(self.x_embedder(patches), c, range(decoder_start, len(self.blocks))), c)
        return ModelOutput(unpatchify(tokens, rows, columns, self.config.patch_size), state, features)

    def _check_inputs(self, x: Tensor, state: Tensor | None, features_at: Collection[int]) -> None:
        patch, first = self.config.patch_size, 1
        if x.shape[-3] != self.out_channels or x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(
                f"x is {tuple(x.shape)}; this network takes (N, {self.out_channels}, H, W) with sides that are "
                f"multiples of {patch}"
            )
        if state is not None:
            first += self.config.encoder_depth or 0
            tokens = x.shape[-2] * x.shape[-1] // patch**2
            if state.shape[:2] != (len(x), tokens):
                raise ValueError(f"the state is of {tuple(state.shape[:2])} rows and tokens, x of {(len(x), tokens)}")
        for number in features_at:
            if not first <= number <= len(self.blocks):
                raise ValueError(f"features_at must lie in {first}..{len(self.blocks)}, not {number}")

    def _table(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return the rotary table of a grid, computed once for each device."""
        key = (rows, columns, device)
        if key not in self._tables:
            width = self.config.hidden_size // self.config.num_heads
            with torch.inference_mode(False):  # tensors made in that mode could not be used in training later
                self._tables[key] = rotary_table(rows, columns, width, device)
        return self._tables[key]

    def routable(self, chosen: tuple[int, int] | None) -> range:
        """Return the indices of the blocks that tokens pass by in training: of the encoder, unless undivided."""
        depth = self.config.encoder_depth or self.config.depth
        return choose_blocks(chosen, range(depth), margins=(2, 2))

    def routed_cost(self, blocks: range, share: float) -> float:
        """Count the MACs of these blocks for one sample of which a share of the tokens passes through them."""
        return routed_cost(self._blocks_cost(len(blocks), tokens_modulated=1), share)

    def cost(self) -> dict[str, int]:
        """Count the MACs of one forward of one sample by part, those of encoder and decoder apart.

        Norms, activations, rotations and softmax are not counted.
        """
        config, d = self.config, self.config.hidden_size
        values = config.tokens * d * self.out_channels * config.patch_size**2  # of a linear map from or to patches
        embedding = {"timestep_mlp": FREQUENCY_DIM * d + d * d}
        if config.encoder_depth is None:
            return embedding | self._decoder_cost(config.depth, values, tokens_modulated=1)
        encoder = {"patch_embedding": values} | self._blocks_cost(config.encoder_depth, tokens_modulated=1)
        decoder = self._decoder_cost(config.depth - config.encoder_depth, values, tokens_modulated=config.tokens)
        return {
            **embedding,
            **{f"encoder_{part}": count for part, count in encoder.items()},
            **{f"decoder_{part}": count for part, count in decoder.items()},
        }

    def _decoder_cost(self, depth: int, values: int, tokens_modulated: int) -> dict[str, int]:
        blocks = self._blocks_cost(depth, tokens_modulated)
        modulation = blocks["modulation"] + 2 * tokens_modulated * self.config.hidden_size**2
        return {"patch_embedding": values, **blocks, "modulation": modulation, "final_linear": values}

    def _blocks_cost(self, depth: int, tokens_modulated: int) -> dict[str, int]:
        d, tokens = self.config.hidden_size, self.config.tokens
        return {
            "attention_linear": depth * 4 * tokens * d * d,
            "attention_products": depth * 2 * tokens * tokens * d,
            "mlp": depth * 3 * tokens * d * self.config.mlp_width,
            "modulation": depth * 6 * tokens_modulated * d * d,
        }


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut images into tokens, row by row: (N, C, H, W) -> (N, T, C * p * p), contiguous.

    Inside a token the channel is slowest, then the row, then the column.
    """
    n, channels, height, width = x.shape
    x = x.reshape(n, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n, -1, channels * patch * patch)


def unpatchify(tokens: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """Undo `patchify`: (N, rows * columns, C * p * p) -> (N, C, rows * p, columns * p)."""
    x = tokens.view(len(tokens), rows, columns, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(tokens), -1, rows * patch, columns * patch)


def data_settings(weights: Mapping[str, Tensor], config: DDTConfig) -> dict[str, object] | None:
    """Infer sample_shape and num_classes from weights of a DDT of this size; None if they have another size.

    Height and width leave no trace.
    """
    width, values = weights["x_embedder.proj.weight"].shape
    if width != config.hidden_size or values % config.patch_size**2:
        return None
    return {
        "sample_shape": (values // config.patch_size**2, *config.sample_shape[1:]),
        "num_classes": weights["y_embedder.embedding_table.weight"].shape[0] - 1,
    }


# B, L and XL are the paper's; S divides its blocks as B does.
SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6, "encoder_depth": 8},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12, "encoder_depth": 8},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "encoder_depth": 20},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "encoder_depth": 22},
}
# Small enough for every script to run in seconds on a laptop; class-conditional 8 x 8 latents.
DEBUG: dict[str, object] = {
    "depth": 4, "hidden_size": 64, "num_heads": 4, "sample_shape": (4, 8, 8), "num_classes": 10, "encoder_depth": 3,
}  # fmt: skip
# 8 x 8 grey digits.
DIGITS: dict[str, object] = {
    "depth": 6, "hidden_size": 96, "num_heads": 4, "sample_shape": (1, 8, 8), "num_classes": 10, "encoder_depth": 4,
}  # fmt: skip

DIVIDED: dict[str, dict[str, object]] = {
    **{f"{size}/{patch}": {**SIZES[size], "patch_size": patch} for size in SIZES for patch in (2, 4, 8)},
    "debug/2": DEBUG,
    "digits/2": DIGITS,
}
CONFIGS: dict[str, dict[str, object]] = {
    **{f"DDT-{name}": config for name, config in DIVIDED.items()},
    **{f"IDiT-{name}": {**config, "encoder_depth": None} for name, config in DIVIDED.items()},
}
