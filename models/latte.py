"""Latte: a diffusion transformer for clips (Ma et al., 2024, arXiv 2401.03048), plain and with skip units.

Its blocks are DiT's and come in pairs: in the first, the tokens of a frame attend to each other, in the second those of
one place in all frames do. A Skip-Latte (Chen et al., 2024, arXiv 2411.17616) has a skip unit before every pair of its
second half, as Skip-DiT has before every block.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from models import dit
from models.config import ClipConfig, SkipClipConfig
from models.contract import ModelOutput
from models.dit import DiT, DiTConfig
from models.frame_positions import frame_position_table
from models.skip_dit import SkipUnits
from models.transformer import Transformer

CACHE_BOUNDS = (900.0, 50.0, False)
LABEL_TABLE = "y_embedder.embedding_table.weight"


@dataclass(frozen=True, kw_only=True)
class LatteConfig(ClipConfig, DiTConfig):
    """Everything that fixes a Latte's parameters, and its reusable state.

    `depth` counts blocks, of which every second is temporal; `cache_depth` counts pairs of them. Without classes
    (`num_classes` 0) the network is unconditional.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    fewest_classes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.num_classes == 0:
            object.__setattr__(self, "class_dropout_prob", 0.0)  # there is nothing to drop
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class SkipLatteConfig(SkipClipConfig, LatteConfig):
    """Everything that fixes a Skip-Latte's parameters, and its reusable state: one pair at each end by default.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """


def over_frames(block: nn.Module, x: Tensor, c: Tensor, frames: int, positions: Tensor | None = None) -> Tensor:
    """Run a temporal block, in which the tokens of one place attend to each other.

    Args:
        block: The block, called with tokens (N, T F, D), c and T.
        x: Tokens (N, F + I, T, D); those of the I images pass unchanged.
        c: Conditioning of the clips.
        frames: F.
        positions: (F, D) or (1, F, D) positions of frames, to be added before; None adds nothing.
    """
    clip = x[:, :frames].transpose(1, 2)  # (N, T, F, D)
    if positions is not None:
        clip = clip + positions
    n, tokens, _, width = clip.shape
    out = block(clip.reshape(n, tokens * frames, width), c, tokens)
    clip = out.view(n, tokens, frames, width).transpose(1, 2)
    return clip.contiguous() if x.shape[1] == frames else torch.cat([clip, x[:, frames:]], dim=1)


class PairedTransformer(Transformer):
    """Base class of transformers of spatial and temporal blocks in turn."""

    config: ClipConfig

    def join(self, pair: int, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Join the tokens that enter a pair with those kept from the first half: here, none are kept."""
        return x

    def attended_tokens(self, block: int) -> int:
        """Number of tokens that each token attends to: those of a frame or, in temporal blocks, of a place."""
        return self.config.frames if block % 2 else self.config.frame_tokens


class SkipPairs(SkipUnits, PairedTransformer):
    """A transformer with a skip unit before every pair of blocks of the second half.

    The state (N, F, T, D) is the tokens that enter the `cache_depth`-th pair from the end, before its skip unit. An
    evaluation that is given it runs the first and last `cache_depth` pairs only.

    Source: arXiv 2411.17616, section 4, with the released code's formula for 28 blocks continued to other depths.
    """

    def join(self, pair: int, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Apply the skip unit of a pair of the second half, to the latest tokens that were kept."""
        return x if pair < self.num_units else self.fuse(pair - self.num_units, x, skips.pop())


class Latte(PairedTransformer, DiT):
    """Diffusion transformer of spatial and temporal blocks in turn, for clips with a label or without.

    With `cache_depth` B, the tokens (N, F, T, D) that enter the B-th pair from the end are returned as state, and an
    evaluation that is given them runs the last B pairs on them and ignores x.

    In training, I single images may follow the frames of every clip: spatial blocks see all, temporal ones the frames
    alone. Images may have labels of their own.

    Source: arXiv 2401.03048, section 3 (its first variant), sizes from DiT; joint training from arXiv 2411.17616's
    released code.
    """

    config: LatteConfig
    temp_embed: nn.Parameter

    def position_tables(self) -> dict[str, Tensor]:
        """Fixed positions: `pos_embed` (1, T, D) of tokens in a frame, `temp_embed` (1, F, D) of frames in a clip."""
        return {
            **super().position_tables(),
            "temp_embed": frame_position_table(self.config.hidden_size, self.config.frames)[None],
        }

    def null_conditioning(self, rows: int) -> dict[str, Tensor]:
        """Return labels of the null class; a ValueError for an unconditional network."""
        if not self.conditioning:
            raise ValueError("this network is unconditional: it has no labels, and cannot be guided by them")
        return super().null_conditioning(rows)

    def forward(  # type: ignore[override]  # takes no route: blocks in turn attend over other tokens
        self,
        x: Tensor,
        t: float | Tensor,
        *,
        y: Tensor | None = None,
        image_labels: Tensor | None = None,
        state: Tensor | None = None,
        features_at: Collection[int] = (),
    ) -> ModelOutput:
        """Predict noise (and variance values) for noisy clips at timesteps 0..999; see `Network`.

        Args:
            x: (N, F, C, H, W), or (N, F + I, C, H, W) with single images behind the frames.
            t: Timesteps; images have their clip's.
            y: (N,) int64 labels; None for an unconditional network.
            image_labels: (N, I) int64 labels of the images of a class-conditional network.
            state: State of an earlier evaluation of the same rows.
            features_at: 1-based numbers of blocks; their tokens (N, (F + I) * T, D) are returned, frame by frame.

        Returns:
            `ModelOutput` with sample (N, F + I, C_out, H, W), and state (N, F + I, T, D) with `cache_depth`.
        """
        state = state if self.keeps_state else None
        blocks = self.blocks_to_run(reused=state is not None)
        self.check_inputs(x, state, features_at, blocks)
        if (y is None) == ("y" in self.conditioning):
            raise ValueError(
                "y must be (N,) labels" if y is None else "y: this network is unconditional, without labels"
            )
        c = self.t_embedder(t) if y is None else self.t_embedder(t) + self.y_embedder(y)  # (N, D) or (1, D)
        frame_c = self.frame_conditioning(t, c, x, image_labels)
        features: dict[int, Tensor] = {}
        skips: list[Tensor] = []  # outputs of the first half's pairs; the second half takes the latest first
        if state is None or blocks[0] != self.cache_at:
            x = self.embed(x)
        for i in blocks:  # (N, F + I, T, D)
            temporal, pair = i % 2 == 1, i // 2
            if i == self.cache_at:
                x = state = x if state is None else state
            if temporal:
                x = over_frames(self.blocks[i], x, c, self.config.frames, self.temp_embed if pair == 0 else None)
            else:
                x = self.over_places(i, self.join(pair, x, skips), c, frame_c)
            if temporal and pair < self.config.skip_units:
                skips.append(x)
            if i + 1 in features_at:
                features[i + 1] = x.flatten(1, 2)
        return ModelOutput(self.decode(x, c, frame_c), state, features)

    def embed(self, x: Tensor) -> Tensor:
        """Embed frames and images (N, F + I, C, H, W) -> (N, F + I, T, D)."""
        tokens: Tensor = self.x_embedder(x.flatten(0, 1)) + self.pos_embed
        return tokens.view(*x.shape[:2], *tokens.shape[1:])

    def frame_conditioning(self, t: float | Tensor, c: Tensor, x: Tensor, labels: Tensor | None) -> Tensor | None:
        """Conditioning of every frame and image (N, F + I, D); None if images have no labels of their own.

        Args:
            t: Timesteps.
            c: (N, D) conditioning of the clips.
            x: (N, F + I, C, H, W).
            labels: (N, I) labels of the images.

        Raises:
            ValueError: If images and labels do not match.
        """
        images = x.shape[1] - self.config.frames
        wanted = (len(x), images) if images and self.conditioning else None
        if (None if labels is None else tuple(labels.shape)) != wanted:
            given = "none" if labels is None else f"of shape {tuple(labels.shape)}"
            raise ValueError(f"image_labels must be {wanted or 'left out'} for x of {tuple(x.shape)}; given: {given}")
        if labels is None:
            return None
        of_images = self.t_embedder(t).unsqueeze(1) + self.y_embedder(labels)  # (N, I, D)
        return torch.cat([c.unsqueeze(1).expand(-1, self.config.frames, -1), of_images], dim=1)

    def over_places(self, i: int, x: Tensor, c: Tensor, frame_c: Tensor | None) -> Tensor:
        """Run a spatial block, in which the tokens of a frame attend to each other: (N, F + I, T, D) -> the same."""
        out: Tensor
        if frame_c is not None:
            out = self.blocks[i](x.flatten(0, 1), frame_c.flatten(0, 1))
        else:
            out = self.blocks[i](x.flatten(1, 2), c, x.shape[1])
        return out.view_as(x)

    def decode(self, x: Tensor, c: Tensor, frame_c: Tensor | None) -> Tensor:
        """Map tokens (N, F + I, T, D) to predictions (N, F + I, C_out, H, W)."""
        if frame_c is None:
            values = self.final_layer(x.flatten(1, 2), c).unflatten(1, x.shape[1:3]).flatten(0, 1)
        else:
            values = self.final_layer(x.flatten(0, 1), frame_c.flatten(0, 1))
        samples = self.unpatchify(values)
        return samples.view(*x.shape[:2], *samples.shape[1:])

    def check_inputs(
        self, x: Tensor, state: Tensor | None, features_at: Collection[int], blocks: Sequence[int]
    ) -> None:
        """Validate the arguments of an evaluation that runs these blocks; raises the ValueErrors of `forward`."""
        frames = self.config.frames
        if x.ndim == 5 and x.shape[1] < frames:
            raise ValueError(f"x has {x.shape[1]} frames; this network was made for clips of {frames}")
        super().check_inputs(x[:, :frames], state, features_at, blocks)


class SkipLatte(SkipPairs, Latte):
    """Latte with a skip unit before every pair of blocks of the second half."""

    config: SkipLatteConfig


def data_settings(weights: Mapping[str, Tensor], config: LatteConfig) -> dict[str, object] | None:
    """Infer sample_shape, num_classes (0: unconditional) and learn_sigma; None if the weights have another size."""
    labels = {LABEL_TABLE: torch.empty(1, 0)} if LABEL_TABLE not in weights else {}
    found = dit.data_settings({**weights, **labels}, config)
    if found is None or "temp_embed" not in weights:
        return None
    shape: tuple[int, ...] = found["sample_shape"]  # type: ignore[assignment]
    return {**found, "sample_shape": (weights["temp_embed"].shape[1], *shape)}


# Small enough for every script to run in seconds on a laptop; class-conditional clips of four frames.
DEBUG: dict[str, object] = {**dit.DEBUG, "sample_shape": (4, 4, 8, 8)}
# Moving digits: eight grey frames of 16 x 16, ten digits in four directions.
DIGITS: dict[str, object] = {
    "depth": 8, "hidden_size": 96, "num_heads": 4, "patch_size": 4, "sample_shape": (8, 1, 16, 16), "num_classes": 40,
    "learn_sigma": False,
}  # fmt: skip

CONFIGS: dict[str, dict[str, object]] = {
    **dit.published("Latte"),
    "Latte-debug/2": DEBUG,
    "Latte-digits/4": DIGITS,
}
SKIP_CONFIGS: dict[str, dict[str, object]] = {
    **dit.published("Skip-Latte"),
    "Skip-Latte-debug/2": {**DEBUG, "depth": 8},
    "Skip-Latte-digits/4": DIGITS,
}
