"""Latte from text (Ma et al., 2024, arXiv 2401.03048): clips and images from encoded captions, plain and with skips.

Its blocks are PixArt's and come in pairs, as Latte's do: in the first, the tokens of a frame attend to each other and
to the text, in the second those of one place in all frames attend to each other. A Skip-LatteT2V (Chen et al., 2024,
arXiv 2411.17616) has a skip unit before every pair of its second half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from models import dit
from models.config import ClipConfig, SkipClipConfig
from models.contract import ModelOutput
from models.frame_positions import frame_positions
from models.latte import PairedTransformer, SkipPairs, over_frames
from models.layers import (
    PatchEmbed,
    TimeConditional,
    TimestepTable,
    gelu,
    modulate,
    sincos_positions,
    unpatchify,
    xavier_linear_,
)
from models.pixart_layers import MASKED, AdaLNSingle, Projection, TextBlock, spread
from runtime.settings import setting

CACHE_BOUNDS = (700.0, 50.0, True)


@dataclass(frozen=True, kw_only=True)
class LatteT2VConfig(ClipConfig):
    """Everything that fixes a LatteT2V's parameters, and its reusable state.

    `depth` counts blocks, of which every second is temporal; `cache_depth` counts pairs of them. The parameters fit any
    number of frames, height and width; `sample_shape` has those that are sampled and counted.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    any_frames: ClassVar[bool] = True

    text_width: int = 4096  # K, of a word's features; no flag, because it follows from the encoder
    text_length: int = 120  # L, words of a text with its padding; likewise
    base_size: int = setting(32, "tokens of a side that positions span; those of other sizes are scaled to it")
    temporal_blocks: bool = setting(
        True, "run temporal blocks; without them frames are pictures, as joint training has them", sampling=True
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        self.check_at_least(1, "text_width", "text_length", "base_size")


@dataclass(frozen=True, kw_only=True)
class SkipLatteT2VConfig(SkipClipConfig, LatteT2VConfig):
    """Everything that fixes a Skip-LatteT2V's parameters, and its reusable state: one pair at each end by default.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """


class LatteT2V(PairedTransformer, TimeConditional):
    """Diffusion transformer of spatial and temporal blocks in turn, for clips of any length with a text.

    A clip of one frame is an image: temporal blocks run, but it has no position in time. With `cache_depth` B, the
    tokens (N, F, T, D) that enter the B-th pair from the end are returned as state.

    In training, I images with texts of their own may follow the frames of every clip: spatial blocks see all,
    temporal ones the frames alone.

    Source: arXiv 2401.03048 and its released text-to-video network; blocks from arXiv 2310.00426, section 2.3.
    """

    config: LatteT2VConfig
    conditioning = ("text", "text_mask")
    time_embedder = "adaln_single"

    def __init__(self, config: LatteT2VConfig) -> None:
        super().__init__(config)
        width, hidden = config.hidden_size, config.mlp_width
        self.pos_embed = PatchEmbed(config.patch_size, config.sample_shape[-3], width)
        self.adaln_single: AdaLNSingle | TimestepTable = AdaLNSingle(width)
        self.caption_projection = Projection(config.text_width, width, gelu)
        self.transformer_blocks, self.temporal_transformer_blocks = (
            nn.ModuleList(TextBlock(width, config.num_heads, hidden, text=text) for _ in range(config.depth // 2))
            for text in (True, False)
        )
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(width, config.patch_size**2 * self.out_channels)
        self._tables: dict[tuple[object, ...], Tensor] = {}
        self.reset_parameters()

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]  # the official names have two lists
        """Spatial and temporal blocks in turn."""
        pairs = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        return nn.ModuleList(block for pair in pairs for block in pair)

    def reset_parameters(self) -> None:
        """Re-initialise: Xavier for linear maps, small normals for embedders, zeros for gates and output."""
        self.apply(xavier_linear_)
        for part in self.modules():
            if isinstance(part, PatchEmbed | AdaLNSingle | Projection | TextBlock):
                part.reset_parameters()
        for parameter in (self.scale_shift_table, *self.proj_out.parameters()):
            nn.init.zeros_(parameter)

    def null_conditioning(self, rows: int) -> dict[str, Tensor]:
        """Raise a ValueError: the unconditional rows are an encoded text."""
        raise ValueError(
            "this network takes texts: its unconditional rows are the encoded empty text, or a negative one"
        )

    def for_sampling(self, times: Iterable[float]) -> Self:
        """Embed all times of a schedule in one call, and compute positions; parameters are shared with this network."""
        self.positions(self.config.frames, self.grid)
        return super().for_sampling(times)

    def forward(
        self,
        x: Tensor,
        t: float | Tensor,
        *,
        text: Tensor,
        text_mask: Tensor | None = None,
        image_text: Tensor | None = None,
        image_text_mask: Tensor | None = None,
        state: Tensor | None = None,
        features_at: Collection[int] = (),
    ) -> ModelOutput:
        """Predict noise (and variance values) for noisy clips at timesteps 0..999; see `Network`.

        Args:
            x: (N, F, C, H, W), or (N, F + I, C, H, W) with images behind the frames; any F, and any multiples of the
                patch as H and W.
            t: Timesteps; images have their clip's.
            text: (N, L, K) encoded texts of the clips; any L.
            text_mask: (N, L) of 1 for words that are attended to and 0 for others; None attends to all, as released
                pipelines do.
            image_text: (N, I, L, K) texts of the images; None if there are none.
            image_text_mask: (N, I, L), with `text_mask`.
            state: State of an earlier evaluation of the same rows.
            features_at: 1-based numbers of blocks; their tokens (N, (F + I) * T, D) are returned, frame by frame.

        Returns:
            `ModelOutput` with sample (N, F + I, C_out, H, W), and state (N, F + I, T, D) with `cache_depth`.
        """
        state = state if self.keeps_state else None
        blocks = self.blocks_to_run(reused=state is not None)
        self.check_inputs(x, state, features_at, blocks)
        texts, mask = self.embed_texts(x, text, text_mask, image_text, image_text_mask)  # (N, 1 + I, L, D)
        count, frames = x.shape[1], x.shape[1] - texts.shape[1] + 1  # F + I and F
        grid = x.shape[-2] // self.config.patch_size, x.shape[-1] // self.config.patch_size
        of_tokens, of_frames = self.positions(frames, grid)
        embedded, c = self.adaln_single(t).tensor_split([self.config.hidden_size], dim=1)  # (N, D) and (N, 6 D)
        features: dict[int, Tensor] = {}
        skips: list[Tensor] = []  # outputs of the first half's pairs; the second half takes the latest first
        if state is None or blocks[0] != self.cache_at:
            x = (self.pos_embed(x.flatten(0, 1)) + of_tokens).unflatten(0, (-1, count))
        for i in blocks:  # (N, F + I, T, D)
            temporal, pair = i % 2 == 1, i // 2
            if i == self.cache_at:
                x = state = x if state is None else state
            if temporal and self.config.temporal_blocks:
                x = over_frames(self.temporal_transformer_blocks[pair], x, c, frames, of_frames if pair == 0 else None)
            elif not temporal:
                tokens = self.join(pair, x, skips).flatten(1, 2)
                x = self.transformer_blocks[pair](tokens, c, count, texts, mask).view_as(x)
            if temporal and pair < self.config.skip_units:
                skips.append(x)
            if i + 1 in features_at:
                features[i + 1] = x.flatten(1, 2)
        shift, scale = (self.scale_shift_table + embedded.unsqueeze(1)).chunk(2, dim=1)
        values = self.proj_out(
            modulate(self.norm_out(x.flatten(1, 2)), shift, scale)
        )  # (N, (F + I) * T, p * p * C_out)
        samples = unpatchify(
            values.unflatten(1, x.shape[1:3]).flatten(0, 1), grid, self.config.patch_size, self.out_channels
        )
        return ModelOutput(samples.unflatten(0, (-1, count)), state, features)

    def embed_texts(
        self, x: Tensor, text: Tensor, mask: Tensor | None, image_text: Tensor | None, image_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Embed the texts of clips and their images; arguments are those of `forward`.

        Returns:
            Texts (N, 1 + I, L, D), and what is added to scores in every frame (N (F + I), 1, 1, L); None for nothing.

        Raises:
            ValueError: If texts and masks do not fit x or each other.
        """
        if text.ndim != 3 or (len(text), text.shape[2]) != (len(x), self.config.text_width):
            raise ValueError(
                f"text is {tuple(text.shape)}; for {len(x)} rows this network takes ({len(x)}, L, "
                f"{self.config.text_width})"
            )
        texts = text.unsqueeze(1)
        if image_text is not None:
            images = image_text.shape[1] if image_text.ndim == 4 else 0
            if image_text.shape != (len(x), images, *text.shape[1:]) or not 0 < images < x.shape[1]:
                raise ValueError(
                    f"image_text is {tuple(image_text.shape)}; with x {tuple(x.shape)} and text {tuple(text.shape)} it "
                    f"must be ({len(x)}, I, {text.shape[1]}, {text.shape[2]}) for I of 1..{x.shape[1] - 1}"
                )
            texts = torch.cat([texts, image_text], dim=1)
        masks = [each for each in (mask, image_mask) if each is not None]
        if masks and len(masks) != (1 if image_text is None else 2):
            raise ValueError("text_mask and image_text_mask: give one for each of text and image_text, or none")
        projected = self.caption_projection(texts.to(x.dtype))
        if mask is None:
            return projected, None
        kept = mask.unsqueeze(1) if image_mask is None else torch.cat([mask.unsqueeze(1), image_mask], dim=1)
        if kept.shape != texts.shape[:3]:
            raise ValueError(f"text_mask is {tuple(mask.shape)} for texts of {tuple(text.shape[:2])} words")
        added = spread((1 - kept.to(x.dtype)) * MASKED, x.shape[1])  # (N, F + I, L)
        return projected, added.flatten(0, 1)[:, None, None]

    def positions(self, frames: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Return positions of tokens (T, D), and of frames (F, D) unless there is one."""
        width = self.config.hidden_size
        of_tokens = self._table(grid, lambda: sincos_positions(width, *grid, self.config.base_size))
        of_frames = self._table((frames,), lambda: frame_positions(width, np.arange(frames)))
        return of_tokens, of_frames if frames > 1 else None

    def _table(self, size: tuple[int, ...], make: Callable[[], np.ndarray]) -> Tensor:
        """Return the table of a size, computed once for each device and type."""
        like = self.scale_shift_table
        key = (size, like.device, like.dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # tensors made in that mode could not be used in training later
                # Rounded here and not on the device, which may have no float64
                self._tables[key] = torch.from_numpy(make().astype(np.float32)).to(like.device, like.dtype)
        return self._tables[key]

    def check_shape(self, x: Tensor) -> None:
        """Raise a ValueError unless x is of clips that the network takes."""
        patch, channels = self.config.patch_size, self.sample_shape[-3]
        if x.ndim != 5 or x.shape[2] != channels or 0 in x.shape or x.shape[3] % patch or x.shape[4] % patch:
            raise ValueError(
                f"x is {tuple(x.shape)}; this network takes (N, F, {channels}, H, W) with sides that are multiples of "
                f"{patch}"
            )

    def check_inputs(
        self, x: Tensor, state: Tensor | None, features_at: Collection[int], blocks: Sequence[int]
    ) -> None:
        """Validate the arguments of an evaluation that runs these blocks; raises the ValueErrors of `forward`."""
        super().check_inputs(x, state, features_at, blocks)
        shape = (x.shape[1], math.prod(x.shape[3:]) // self.config.patch_size**2)
        if state is not None and state.shape[1:3] != shape:
            raise ValueError(f"state of {tuple(state.shape[1:3])} frames and tokens cannot be reused for {shape}")

    def modulation_cost(self, blocks: int) -> int:
        """Count the MACs that make the modulation of all blocks at once; the final layer's is the embedding."""
        return 6 * self.config.hidden_size**2

    def cost_of(self, blocks: Sequence[int]) -> dict[str, int]:
        """Count the MACs by part of these blocks with the embedders and the final layer."""
        config, d, words = self.config, self.config.hidden_size, self.config.text_length
        spatial = sum(i % 2 == 0 for i in blocks)
        if not config.temporal_blocks:
            blocks = [i for i in blocks if i % 2 == 0]
        return {
            **super().cost_of(blocks),
            "text_projection": words * (config.text_width + d) * d,
            "text_attention_linear": spatial * 2 * (config.tokens + words) * d * d,
            "text_attention_products": spatial * 2 * config.tokens * words * d,
        }


class SkipLatteT2V(SkipPairs, LatteT2V):
    """LatteT2V with a skip unit before every pair of blocks of the second half."""

    config: SkipLatteT2VConfig


def data_settings(weights: Mapping[str, Tensor], config: LatteT2VConfig) -> dict[str, object] | None:
    """Infer channels, text_width and learn_sigma from weights of this size; None if they have another size.

    Frames, height, width and the length of texts leave no trace.
    """
    width, channels, *patch = weights["pos_embed.proj.weight"].shape
    if (width, patch) != (config.hidden_size, [config.patch_size] * 2):
        return None
    frames, _, *sides = config.sample_shape
    return {
        "sample_shape": (frames, channels, *sides),
        "text_width": weights["caption_projection.linear_1.weight"].shape[1],
        "learn_sigma": len(weights["proj_out.bias"]) == 2 * channels * config.patch_size**2,
    }


def published(family: str) -> dict[str, dict[str, object]]:
    """Configs of DiT's sizes and patch sizes by name, with a pair of blocks for each of its blocks, for 512 pixels."""
    return {
        name: {
            **fields,
            "depth": 2 * fields["depth"],  # type: ignore[operator]
            "sample_shape": (16, 4, 64, 64),
            "base_size": 64 // fields["patch_size"],  # type: ignore[operator]
        }
        for name, fields in dit.published(family).items()
    }


# Small enough for every script to run in seconds on a laptop; texts of five words, clips of four frames.
DEBUG: dict[str, object] = {
    "depth": 4, "hidden_size": 64, "num_heads": 4, "sample_shape": (4, 4, 8, 8), "base_size": 4, "text_width": 12,
    "text_length": 5,
}  # fmt: skip
# Moving digits: eight grey frames of 16 x 16, or one.
DIGITS: dict[str, object] = {
    "depth": 8, "hidden_size": 96, "num_heads": 4, "patch_size": 4, "sample_shape": (8, 1, 16, 16), "base_size": 4,
    "text_width": 32, "text_length": 8, "learn_sigma": False,
}  # fmt: skip

CONFIGS: dict[str, dict[str, object]] = {
    **published("LatteT2V"),
    "LatteT2V-debug/2": DEBUG,
    "LatteT2V-digits/4": DIGITS,
}
SKIP_CONFIGS: dict[str, dict[str, object]] = {
    **published("Skip-LatteT2V"),
    "Skip-LatteT2V-debug/2": {**DEBUG, "depth": 8},
    "Skip-LatteT2V-digits/4": DIGITS,
}
