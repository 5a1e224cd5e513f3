"""Fields and checks that the configs of several families have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Size of a transformer on patches.

    Attributes:
        axes: Names of the numbers in `sample_shape`.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    axes: ClassVar[tuple[str, ...]] = ("channels", "height", "width")

    sample_shape: tuple[int, ...] = (4, 32, 32)  # (C, H, W) of a latent; no flag, because it follows from the data
    patch_size: int = setting(2, "side of a patch in latent pixels")
    hidden_size: int = setting(1152, "width of the tokens")
    depth: int = setting(28, "number of transformer blocks")
    num_heads: int = setting(16, "number of attention heads")
    mlp_ratio: float = setting(4.0, "width of the MLP relative to the tokens")

    def __post_init__(self) -> None:
        """Validate the fields."""
        object.__setattr__(self, "sample_shape", tuple(self.sample_shape))  # JSON has lists
        self.check_at_least(1, "patch_size", "hidden_size", "depth", "num_heads")
        check_sample_shape(self.sample_shape, self.patch_size, self.axes)
        if self.mlp_width < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves the MLP without channels")

    def check_at_least(self, least: int, *names: str) -> None:
        """Raise a ValueError if one of these fields is smaller."""
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def mlp_width(self) -> int:
        """Channels inside the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        *_, height, width = self.sample_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def tokens(self) -> int:
        """T, the number of tokens of a sample."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, kw_only=True)
class LabelledConfig(TransformerConfig):
    """Size of a class-conditional transformer on patches.

    Attributes:
        fewest_classes: Smallest `num_classes` that is possible.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    fewest_classes: ClassVar[int] = 1

    class_dropout_prob: float = setting(0.1, "share of labels dropped in training; 0 means no null class, no guidance")
    num_classes: int = setting(1000, "number of classes")

    def __post_init__(self) -> None:
        """Validate the fields."""
        self.check_at_least(self.fewest_classes, "num_classes")
        super().__post_init__()
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1), not {self.class_dropout_prob}")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(TransformerConfig):
    """Size of a transformer that can keep the tokens which enter one of its last blocks.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    learn_sigma: bool = setting(True, "predict variance values, in as many channels again")
    cache_depth: int | None = setting(
        None, "blocks at the end (Skip-DiT: at each end) that an evaluation with reused state computes", sampling=True
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.cache_depth is not None and not 1 <= self.cache_depth <= self.depth // 2:
            raise ValueError(f"cache_depth {self.cache_depth} must lie in 1..{self.depth // 2}, half the depth")

    @property
    def cache_at(self) -> int | None:
        """L - B, the index of the block that takes the state as input; None without `cache_depth`."""
        return None if self.cache_depth is None else self.depth - self.cache_depth

    @property
    def skip_units(self) -> int:
        """Number of units that join the second half's tokens with the first half's: none."""
        return 0


@dataclass(frozen=True, kw_only=True)
class ClipConfig(BackboneConfig):
    """Size of a transformer of spatial and temporal blocks in turn, for clips.

    `depth` counts blocks, of which every second is temporal; `cache_depth` counts pairs of them.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    axes: ClassVar[tuple[str, ...]] = ("frames", "channels", "height", "width")

    sample_shape: tuple[int, ...] = (16, 4, 32, 32)  # (F, C, H, W) of a clip's latents

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        if self.depth % 2:
            raise ValueError(f"depth {self.depth} must be even: blocks are spatial and temporal in turn")
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size {self.hidden_size} must be even for the positions of frames")
        if self.cache_depth is not None and not 1 <= self.cache_depth <= self.depth // 4:
            raise ValueError(
                f"cache_depth {self.cache_depth} must lie in 1..{self.depth // 4}: it counts pairs of blocks, at most "
                "half of them"
            )

    @property
    def cache_at(self) -> int | None:
        """Index of the block that takes the state as input, the first of its pair; None without `cache_depth`."""
        return None if self.cache_depth is None else self.depth - 2 * self.cache_depth

    @property
    def frames(self) -> int:
        """F, the number of frames."""
        return self.sample_shape[0]

    @property
    def frame_tokens(self) -> int:
        """T, the number of tokens of a frame."""
        return super().tokens

    @property
    def tokens(self) -> int:
        """F * T, the number of tokens of a clip."""
        return self.frames * self.frame_tokens


@dataclass(frozen=True, kw_only=True)
class SkipClipConfig(ClipConfig):
    """Size of the same with a skip unit before every pair of the second half; state is one pair at each end by default.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    def __post_init__(self) -> None:
        """Fill in `cache_depth` and validate the fields."""
        if self.depth % 4:
            raise ValueError(f"depth {self.depth} must be a multiple of 4: every pair of blocks has one in each half")
        if self.cache_depth is None:
            object.__setattr__(self, "cache_depth", 1)
        super().__post_init__()

    @property
    def skip_units(self) -> int:
        """Number of skip units: one before every pair of the second half."""
        return self.depth // 4


def check_sample_shape(
    shape: tuple[int, ...], patch: int, axes: tuple[str, ...] = ("channels", "height", "width")
) -> None:
    """Raise a ValueError, naming the nearest shapes that fit, unless patches cover a sample of these axes.

    The last two are height and width.
    """
    if len(shape) != len(axes) or min(shape) < 1:
        count = {3: "three", 4: "four"}[len(axes)]
        raise ValueError(f"sample_shape {shape} must be {count} numbers of at least 1: {', '.join(axes)}")
    *others, height, width = shape
    if height % patch or width % patch:
        below = tuple(max(patch, side // patch * patch) for side in (height, width))
        above = tuple(-(-side // patch) * patch for side in (height, width))
        nearest = " or ".join(str((*others, *fitting)) for fitting in dict.fromkeys((below, above)))
        raise ValueError(
            f"sample_shape {shape}: height and width must be multiples of patch_size {patch}; nearest: {nearest}"
        )
