"""Fields and checks that the configs of all families have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from runtime.settings import setting


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Size of a class-conditional transformer on patches.

    Attributes:
        axes: Names of the numbers in `sample_shape`.
        fewest_classes: Smallest `num_classes` that is possible.

    Raises:
        ValueError: Naming the field, its value, and the values that are possible.
    """

    axes: ClassVar[tuple[str, ...]] = ("channels", "height", "width")
    fewest_classes: ClassVar[int] = 1

    sample_shape: tuple[int, ...] = (4, 32, 32)  # (C, H, W) of a latent; no flag, because it follows from the data
    patch_size: int = setting(2, "side of a patch in latent pixels")
    hidden_size: int = setting(1152, "width of the tokens")
    depth: int = setting(28, "number of transformer blocks")
    num_heads: int = setting(16, "number of attention heads")
    mlp_ratio: float = setting(4.0, "width of the MLP relative to the tokens")
    class_dropout_prob: float = setting(0.1, "share of labels dropped in training; 0 means no null class, no guidance")
    num_classes: int = setting(1000, "number of classes")

    def __post_init__(self) -> None:
        """Validate the fields."""
        object.__setattr__(self, "sample_shape", tuple(self.sample_shape))  # JSON has lists
        fewest = dict.fromkeys(("patch_size", "hidden_size", "depth", "num_heads"), 1)
        for name, least in {**fewest, "num_classes": self.fewest_classes}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        check_sample_shape(self.sample_shape, self.patch_size, self.axes)
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1), not {self.class_dropout_prob}")
        if self.mlp_width < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves the MLP without channels")

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
